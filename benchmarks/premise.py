"""Is the teacher worse where the student has written before it? The premise of SWITCH and AdaSwitch, measured on the small pair.

A writer (the teacher itself, or a student) writes the first tokens of an answer, sampled at temperature 1, and the teacher goes on
to the end, sampled too. Two shares are taken, for each task and each number of tokens that the writer had:

right         the whole answer is right. One mistake of the writer spoils it, whatever the teacher does.
next right    the first line that the teacher begins follows from what stands there: the next change of the question, done to the
              total or the row of digits that the line before ends with, be that right or wrong. It tells whether the teacher itself
              is worse on strange ground. Retold notes (`text`) have no such lines.
mistakes      answers in which the writer had already made a mistake.

Texts that the writer ended within its tokens are left out; ``rows`` says how many are left.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure
from transformers import PreTrainedModel

from benchmarks.harness import Options, Row, parse, print_table, publish, random_examples, random_pair
from benchmarks.small_pair import DATA, skipped
from switchkd.base.terminal import bar
from switchkd.data.small_data import DIGITS, STUDENTS, TASKS, moved
from switchkd.data.texts import TokenizedExample
from switchkd.decoding.decode import decode
from switchkd.evaluation.scores import small_right, until_mistake
from switchkd.methods.policy import StudentOnly
from switchkd.models.loading import load_model
from switchkd.models.pair import Pair, load_pair
from switchkd.runs.opening import load_task
from switchkd.studies.small_pair import MAX_COMPLETION

CUTS = (0, 16, 32, 64, 96)
ROWS = 256
BATCH = 128
ARITHMETIC = re.compile(r"(\d+)(?:\+|-| plus | minus | and | less )(\d+)(?:=| is | make | leaves )(\d+)\.")
CHANGE = re.compile(r" (gets|finds|buys|gives|loses|sells) (\d+);")
MOVE = re.compile(r"(?:after )?(.*?)(?: gives|:|) (\d+)\.")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every task, writer and cut; says so and ends where there is no small pair."""
    options = parse(argv, "premise", __doc__)
    if skipped(options):
        return 0
    rows = [row for task in TASKS for row in measure(task, options)]
    print_table("the teacher goes on where another has written; shares in percent", rows)
    publish("premise", options, {"rows": ROWS, "cuts": CUTS, "temperature": 1.0}, rows, plot(rows))
    return 0


def measure(task: str, options: Options) -> Iterator[Row]:
    """A row for each writer and cut."""
    pair, examples, writers, cuts = quick(options) if options.quick else whole(task, options)
    with bar(f"premise: {task}", len(writers) * len(cuts)) as progress:
        for name, writer in writers.items():
            for cut in cuts:
                seconds, numbers = _go_on(task, pair, writer, examples, cut)
                yield Row({"task": task, "tokens": cut}, name, seconds, numbers)
                progress.advance(1, name)


def whole(
    task: str, options: Options
) -> tuple[Pair, list[TokenizedExample], dict[str, PreTrainedModel], Sequence[int]]:
    """The small pair, held-out rows of a task, the writers by name, and after how many tokens they stop."""
    pair = load_pair("small", device=options.device)
    examples = load_task(DATA, pair, f"small:{task}-heldout", ROWS, quiet=True)
    students = {name: load_model(f"small:{name}", device=options.device) for name in STUDENTS}
    return pair, examples, {"teacher": pair.teacher, **students}, CUTS


def quick(options: Options) -> tuple[Pair, list[TokenizedExample], dict[str, PreTrainedModel], Sequence[int]]:
    """The same of tiny random models."""
    pair = random_pair(options.device, quick=True)
    return pair, random_examples(pair, 2), {"teacher": pair.teacher, "little-warm": pair.student}, (0, 2)


def _go_on(
    task: str, pair: Pair, writer: PreTrainedModel, examples: Sequence[TokenizedExample], cut: int
) -> tuple[list[float], dict[str, Any]]:
    """The shares where the teacher goes on behind ``cut`` tokens of ``writer``."""
    prompts = [list(e.prompt_ids) for e in examples]
    begun = _written(pair, writer, prompts, cut, seed=1) if cut else [[] for _ in prompts]
    ends = set(pair.eos_token_ids)
    left = [i for i, ids in enumerate(begun) if not ends & set(ids)]
    rest = _written(pair, pair.teacher, [prompts[i] + begun[i] for i in left], MAX_COMPLETION - cut, seed=2)
    found: dict[str, list[float]] = {"right": [], "next right": [], "mistakes": []}
    for i, ids in zip(left, rest, strict=True):
        before = pair.tokenizer.decode(begun[i], skip_special_tokens=True)
        text = pair.tokenizer.decode(begun[i] + ids, skip_special_tokens=True)
        references = examples[i].references
        found["right"].append(max(small_right(text, reference) for reference in references))
        found["mistakes"].append(100.0 * bool(spoilt(before, references)))
        if (follows := next_follows(task, pair.tokenizer.decode(prompts[i]), before, text)) is not None:
            found["next right"].append(100.0 * follows)
    means = {name: sum(values) / len(values) for name, values in found.items() if values}
    return [], means | {"rows": len(left)}


def _written(pair: Pair, writer: PreTrainedModel, prompts: list[list[int]], tokens: int, seed: int) -> list[list[int]]:
    """What a model writes alone."""
    written = decode(
        writer, pair.teacher, prompts, StudentOnly(), tokens, seed=seed, eos_token_ids=pair.eos_token_ids, batch_size=BATCH,
        vocab_size=pair.vocab_size,
    )  # fmt: skip
    return [list(rollout.completion_ids) for rollout in written]


def spoilt(before: str, references: Sequence[str]) -> bool:
    """Whether ``before`` goes wrong before its last number or word, which may be half written."""
    whole = re.split(r"[0-9]+$|\S+$", before)[0]
    return not any(until_mistake(reference, whole) == 100.0 for reference in references) if whole.strip() else False


def next_follows(task: str, question: str, before: str, text: str) -> bool | None:
    """Whether the first line that begins behind ``before`` follows from the line before it; None where nobody can say."""
    number = before.count("\n") + bool(before.rpartition("\n")[2])
    lines = text.split("\n")
    if task not in FOLLOWS or number >= len(lines):
        return None
    return FOLLOWS[task](question, lines[number - 1] if number else "", number, lines[number])


def _arithmetic_follows(question: str, line_before: str, number: int, line: str) -> bool | None:
    changes = [
        int(amount) * (1 if word in ("gets", "finds", "buys") else -1) for word, amount in CHANGE.findall(question)
    ]
    stands = ARITHMETIC.fullmatch(line_before)
    if number >= len(changes) or (number and not stands):
        return None
    total = int(stands[3]) if stands else int(re.findall(r"\d+", question)[0])
    found = ARITHMETIC.fullmatch(line)
    return bool(found) and [int(found[1]), int(found[3])] == [total, total + changes[number]]


def _order_follows(question: str, line_before: str, number: int, line: str) -> bool | None:
    start, _, said = question.partition(": ")
    moves = said.split("; ")[:-1]
    stands = MOVE.fullmatch(line_before)
    if number >= len(moves) or (number and not stands):
        return None
    row = stands[2] if stands else re.findall(r"\d+", start)[-1]
    found = MOVE.fullmatch(line)
    return len(row) == DIGITS and bool(found) and (found[1], found[2]) == (moves[number], moved(row, moves[number]))


FOLLOWS = {"arithmetic": _arithmetic_follows, "order": _order_follows}


def plot(rows: Sequence[Row]) -> Figure:
    """Right answers, and next lines that follow, by the tokens that the writer had; a panel for each task."""
    tasks = list(dict.fromkeys(row.cell["task"] for row in rows))
    figure = Figure(figsize=(4 * len(tasks), 6), layout="constrained")
    axes = figure.subplots(2, len(tasks), squeeze=False)
    for number, score in enumerate(("right", "next right")):
        for task, axis in zip(tasks, axes[number], strict=True):
            for writer in dict.fromkeys(row.contender for row in rows):
                own = [r for r in rows if (r.cell["task"], r.contender) == (task, writer) and score in r.numbers]
                axis.plot([r.cell["tokens"] for r in own], [r.number(score) for r in own], marker="o", label=writer)
            axis.set(title=task, xlabel="tokens by the writer", ylabel=f"{score}, %", ylim=(0, 102))
    axes[0][0].legend(fontsize=7)
    return figure


if __name__ == "__main__":
    sys.exit(main())
