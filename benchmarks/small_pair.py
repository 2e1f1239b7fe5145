"""The pair that counts and small measurements are made on: ``small``, random weights of its shape, or tiny random models."""

import json
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from benchmarks.harness import Options, random_examples, random_pair
from switchkd.base.terminal import console
from switchkd.data.settings import DataConfig
from switchkd.data.small_data import NOT_MADE, TASKS, small_pair_folder
from switchkd.data.texts import TokenizedExample
from switchkd.models.pair import Pair, load_pair
from switchkd.runs.opening import load_task
from switchkd.studies.small_pair import MAX_COMPLETION, MAX_PROMPT, SCALES, new_model, train_tokenizer

DATA = DataConfig(template="chat", max_prompt_length=MAX_PROMPT, max_completion_length=MAX_COMPLETION)
# As many rows of a task as its words need to be met: the tokenizer is then that of the pair.
_ROWS = 4000


def why_missing() -> str:
    """What to do to have the pair ``small``; empty where it is there."""
    folder = small_pair_folder()
    return "" if folder.is_dir() else NOT_MADE.format(folder)


def skipped(options: Options) -> bool:
    """Whether there is no small pair to measure on, which is then said; a quick run needs none."""
    missing = "" if options.quick else why_missing()
    if missing:
        console.print(f"skipped: {missing}", soft_wrap=True)
    return bool(missing)


def small_pair(options: Options) -> tuple[str, Pair]:
    """What the pair is, in words for a table, and the pair."""
    if options.quick:
        return "tiny random models", random_pair(options.device, quick=True)
    if not why_missing():
        return "small", load_pair("small", device=options.device)
    tokenizer = train_tokenizer(chain.from_iterable(_texts(index, "train") for index in range(_ROWS)))
    sizes = SCALES["full"]
    teacher = new_model(sizes.teacher, tokenizer, 0, "teacher").to(options.device).requires_grad_(False)
    student = new_model(sizes.students["little"], tokenizer, 0, "little").to(options.device)
    ends = (tokenizer.eos_token_id,)
    return "random weights in the shapes of small", Pair(teacher, student, tokenizer, len(tokenizer), ends, ())


def small_examples(options: Options, pair: Pair, count: int, part: str = "heldout") -> list[TokenizedExample]:
    """Rows of two of the tasks in turn, as ``switchkd make-pair`` writes them for the seed 0."""
    if options.quick:
        return random_examples(pair, count)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        rows = [_texts(index, part) for index in range((count + 1) // 2)]
        lines = [json.dumps({"prompt": p, "completion": c}) for row in rows for p, c in (row[:2], row[2:])]
        file.write_text("\n".join(lines), encoding="utf-8")
        return load_task(DATA, pair, str(file), count, quiet=True)


def _texts(index: int, part: str) -> Sequence[str]:
    """Prompt and answer of an arithmetic row, then of a text row."""
    sums, notes = (TASKS[task](0, index, part) for task in ("arithmetic", "text"))
    output = notes["output"] if part == "train" else notes["output"][0]
    return sums["question"], sums["answer"], f"{notes['instruction']}\n\n{notes['input']}", output
