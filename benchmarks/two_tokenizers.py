"""A teacher and a student with different tokenizers: what writing in turns of words costs, and which loss brings them nearer.

The teacher is that of the pair `small`. The student is of the shape of that pair's, with a tokenizer of its own (up to 600 ids;
it keeps numbers together where the teacher cuts them into digits), first trained with cross-entropy on the same data; made once,
then cached.

`writing`: 8 rows of at most 128 tokens, by the student alone, SWITCH and AdaSwitch, with this student and with the one that has the
teacher's tokenizer, in turns in one run: tokens a second, forwards of each model per token, and per word where there are words.

`nearness`: the student is trained on the texts of the data under several losses, each with the same seeds, rows and steps.
`strict` compares the tokens that match one to one, `prefix` every student token, `sorted` probabilities by rank (ULD); `+ CE` adds
cross-entropy of the same texts. Told are, per loss, the divergence KL(p||q) to the teacher on the student's own sampled texts and
on held-out answers (both on the tokens that match), and the share of right sums; then the paired differences to `strict` over
seeds, with 95 % intervals by Student's t. With ``--repeats`` seeds.
"""

import json
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from matplotlib.figure import Figure
from scipy.stats import t as student_t
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.harness import Options, Row, accelerator, parse, print_table, publish, side_by_side, timed
from benchmarks.small_pair import _texts, skipped
from switchkd.base.storage import cache_folder
from switchkd.base.terminal import bar
from switchkd.data.settings import DataConfig
from switchkd.data.small_data import SMALL
from switchkd.data.texts import TokenizedExample
from switchkd.decoding.rollouts import Metrics, Rollouts
from switchkd.decoding.settings import DecodeSettings
from switchkd.evaluation.evaluate import evaluate
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.tasks import TASKS
from switchkd.methods.mixes import GroundTruth
from switchkd.methods.objective import CrossEntropy, Objective
from switchkd.methods.objectives import TVD, ForwardKL
from switchkd.methods.policies import AdaSwitch, Switch
from switchkd.methods.policy import Policy, StudentOnly
from switchkd.models.pair import Pair, load_pair
from switchkd.runs.opening import BadRows, prepared, read_examples
from switchkd.studies.small_pair import (
    CHAT_TEMPLATE,
    CONTEXT,
    END,
    MAX_COMPLETION,
    MAX_PROMPT,
    PAD,
    SCALES,
    SPECIAL_TOKENS,
    new_model,
)
from switchkd.training.checkpoint import save_model
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer
from switchkd.writing.examples import decode_examples

DATA = DataConfig(template="chat", max_prompt_length=MAX_PROMPT, max_completion_length=2 * MAX_COMPLETION)
POLICIES: dict[str, Policy] = {"student alone": StudentOnly(), "SWITCH": Switch(), "AdaSwitch": AdaSwitch()}


@dataclass(frozen=True)
class Loss:
    """A contender: how laws are compared, by what, and whether cross-entropy is added."""

    objective: Objective
    alignment: str = "strict"
    ce: float = 0.0


LOSSES = {
    "strict": Loss(ForwardKL()),
    "strict, TVD": Loss(TVD()),
    "prefix": Loss(ForwardKL(), "prefix"),
    "sorted (ULD)": Loss(TVD(), "sorted"),
    "strict + CE": Loss(ForwardKL(), "strict", 1.0),
    "sorted (ULD) + CE": Loss(TVD(), "sorted", 1.0),
    "CE": Loss(CrossEntropy()),
}
SCORES = ("own_forward_kl", "forward_kl", "strict")


@dataclass(frozen=True)
class TwoTokenizers(Options):
    """What can be told besides; ``repeats`` are runs of `writing`, and seeds of `nearness`."""

    part: Literal["all", "writing", "nearness"] = "all"
    """What is measured; one part writes two_tokenizers_PART.json."""
    first_steps: int = 400
    """Steps of cross-entropy by which the student is made."""
    steps: int = 100
    """Steps of `nearness`, of 16 rows."""
    heldout: int = 96
    """Held-out sums that are scored."""
    learning_rate: float = 1e-3
    """Of these steps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both parts, print the tables, write two_tokenizers.json and .png; says so where there is no small pair."""
    options = parse(argv, "two_tokenizers", __doc__, TwoTokenizers)
    if skipped(options):
        return 0
    if options.quick:
        options = replace(options, first_steps=2, steps=2, heldout=2)
    pair, same = pairs(options)
    rows: list[Row] = []
    settings: dict[str, Any] = {
        "bridge": pair.bridges[""].describe(),
        "losses": {k: repr(v) for k, v in LOSSES.items()},
    }
    if options.part != "nearness":
        rows += (writing := measure_writing(pair, same, options))
        print_table("writing", writing)
    if options.part != "writing":
        nearness, settings["scores"] = measure_nearness(pair, options)
        rows += nearness
        print_table(f"nearness after {options.steps} steps of 16 rows, {options.repeats} seeds", nearness)
    name = "two_tokenizers" if options.part == "all" else f"two_tokenizers_{options.part}"
    publish(name, options, settings, rows, plot(rows))
    return 0


# --- the pair -----------------------------------------------------------------------------------------------------


def pairs(options: TwoTokenizers) -> tuple[Pair, Pair]:
    """The teacher with a student that has another tokenizer, and with the one that has its own."""
    scale = "tiny" if options.quick else "full"
    folder = cache_folder() / f"benchmark-two-tokenizers-2-{scale}-{options.first_steps}"
    teacher = _tiny(folder.with_name(f"{folder.name}-teacher")) if options.quick else SMALL
    if not folder.is_dir():
        _make_student(folder, scale, options)
    return load_pair(teacher, str(folder), device=options.device), load_pair(teacher, teacher, device=options.device)


def _tiny(folder: Path) -> str:
    """A teacher for a quick run, of random weights."""
    from switchkd.studies.small_pair import train_tokenizer

    if not folder.is_dir():
        tokenizer = train_tokenizer(chain.from_iterable(_texts(index, "train") for index in range(40)))
        save_model(folder, new_model(SCALES["tiny"].teacher, tokenizer, 0, "teacher"), tokenizer)
    return str(folder)


def _make_student(folder: Path, scale: str, options: TwoTokenizers) -> None:
    tokenizer = other_tokenizer(40 if options.quick else 4000)
    model = new_model(SCALES[scale].students["little"], tokenizer, 1, "little").to(options.device)
    alone = Pair(model, model, tokenizer, len(tokenizer), (tokenizer.eos_token_id,), ())
    config = _config(options, Loss(CrossEntropy()), 0, steps=options.first_steps)
    trainer = Trainer(
        alone, examples(alone, 16 * (8 if options.quick else 500), "train"), config, accelerator(options.device)
    )
    with bar("make the student", options.first_steps) as progress:
        for _ in range(options.first_steps):
            trainer.train_step()
            progress.advance()
    save_model(folder, model, tokenizer)


def other_tokenizer(rows: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE of at most 600 ids that keeps numbers together, with the template of the pair."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    bpe.train_from_iterator(chain.from_iterable(_texts(index, "train") for index in range(rows)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=END, chat_template=CHAT_TEMPLATE, model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def examples(pair: Pair, count: int, part: str) -> list[TokenizedExample]:
    """Rows of both tasks in turn to train on, of sums alone where they are held out."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file, lines = Path(folder) / "rows.jsonl", []
        for index in range(count):
            question, answer, note, output = _texts(index, part)
            if part == "heldout":
                lines.append({"question": question, "answer": answer})
            else:
                lines.append(
                    [{"prompt": question, "completion": answer}, {"prompt": note, "completion": output}][index % 2]
                )
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        bad = BadRows([str(file)])
        found = read_examples(DATA, [str(file)], None, bad, answers=True)
        return prepared(DATA, pair, found, bad, quiet=True, training=True)


def _config(options: TwoTokenizers, loss: Loss, seed: int, steps: int) -> TrainConfig:
    return TrainConfig(
        policy=StudentOnly(), mix=GroundTruth(), objective=loss.objective, alignment=loss.alignment, lm_weight=loss.ce or 1.0,  # type: ignore[arg-type]
        max_steps=steps, per_device_train_batch_size=16, learning_rate=options.learning_rate, lr_scheduler_type="constant",
        warmup_steps=max(steps // 20, 1), seed=seed, quiet=True,
    )  # fmt: skip


# --- writing ------------------------------------------------------------------------------------------------------


def measure_writing(pair: Pair, same: Pair, options: TwoTokenizers) -> list[Row]:
    """Each policy with two tokenizers beside one."""
    rows, budget, count = [], 8 if options.quick else MAX_COMPLETION, 2 if options.quick else 8
    for name, policy in POLICIES.items():
        made: dict[str, Rollouts] = {}

        def write(which: str, policy: Policy = policy, made: dict[str, Rollouts] = made) -> None:
            chosen = {"one tokenizer": same, "two tokenizers": pair}[which]
            prompts = examples(chosen, count, "train")
            how = DecodeSettings(policy, budget, seed=1)
            made[which] = decode_examples(chosen, prompts, how, range(count))

        contenders = {which: (lambda which=which: write(which)) for which in ("one tokenizer", "two tokenizers")}
        seconds = side_by_side(contenders, options.repeats, name)
        for which in contenders:
            cost = made[which].cost
            numbers: dict[str, Any] = {
                "tokens": cost.kept_tokens,
                "tokens/s": cost.kept_tokens / cost.seconds,
                "student forwards/token": cost.student_forwards / cost.kept_tokens,
                "teacher forwards/token": cost.teacher_forwards / cost.kept_tokens,
                "teacher's share": cost.teacher_tokens / cost.kept_tokens,
            }
            if cost.words:
                numbers |= {
                    "words": cost.words,
                    "student forwards/word": cost.student_forwards / cost.words,
                    "teacher forwards/word": cost.teacher_forwards / cost.words,
                }
            rows.append(Row({"policy": name}, which, seconds[which], numbers))
    return rows


# --- nearness -----------------------------------------------------------------------------------------------------


def measure_nearness(pair: Pair, options: TwoTokenizers) -> tuple[list[Row], dict[str, dict[str, list[float]]]]:
    """Every loss with every seed; the scores of all runs."""
    start = deepcopy(pair.student.state_dict())
    train = examples(pair, 16 * (8 if options.quick else 500), "train")
    held_out = examples(pair, options.heldout, "heldout")
    scores: dict[str, dict[str, list[float]]] = {name: {score: [] for score in SCORES} for name in ("before", *LOSSES)}
    coverage: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in scores}
    with bar("train", len(LOSSES) * options.repeats) as progress:
        seconds["before"].append(timed(lambda: _score(pair, held_out, scores["before"])))
        for seed in range(options.repeats):
            for name, loss in LOSSES.items():
                pair.student.load_state_dict(start)
                config = _config(options, loss, seed, options.steps)
                own = Trainer(pair, train, config, accelerator(options.device), corpus=train if loss.ce else ())
                lines: list[Metrics] = []
                seconds[name].append(timed(partial(_train, own, options.steps, lines)))
                coverage[name] = lines[-1].get("cross/coverage", 1.0)
                _score(pair, held_out, scores[name])
                progress.advance(1, f"{name}, seed {seed}: {scores[name]['own_forward_kl'][-1]:.4f}")
    pair.student.load_state_dict(start)
    rows = []
    for name, found in scores.items():
        numbers: dict[str, Any] = {score: mean(values) for score, values in found.items()}
        if name not in ("before", "strict"):
            for score in SCORES:
                pairs = [a - b for a, b in zip(found[score], scores["strict"][score], strict=True)]
                half = (
                    student_t.ppf(0.975, len(pairs) - 1) * stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
                )
                numbers |= {f"{score}, less that of strict": mean(pairs), f"± {score}": half}
        rows.append(Row({"part": "nearness"}, name, seconds[name], numbers | {"coverage": coverage.get(name, 1.0)}))
    return rows, scores


def _train(trainer: Trainer, steps: int, lines: list[Metrics]) -> None:
    for _ in range(steps):
        lines.append(trainer.train_step()[0])


def _score(pair: Pair, held_out: list[TokenizedExample], into: dict[str, list[float]]) -> None:
    settings = EvalSettings(MAX_COMPLETION, temperature=1.0, seeds=(10,), own_text=True)
    result = evaluate(pair, pair.student, held_out, TASKS["gsm8k"], settings).means()
    for score, values in into.items():
        values.append(result[score])


def plot(rows: Sequence[Row]) -> Figure:
    """The divergence of each loss's students on their own texts."""
    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    trained = [row for row in rows if "own_forward_kl" in row.numbers]
    axes.barh([row.contender for row in trained], [row.numbers["own_forward_kl"] for row in trained])
    axes.invert_yaxis()
    axes.set_xlabel("KL(p‖q) on the student's own texts, nats a token")
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    sys.exit(main())
