"""Training and evaluation on the small pair, where every operator is small: tokens a second, and the counts that explain them.

A training step: everything from the prompts to the updated weights (`Trainer.train_step`) with the recipes SWITCH, AdaSwitch and
on-policy, each step's text being generated; at most 128 tokens a row, end tokens end it, as in a study. The learning rate is 0,
which costs what any other costs. Tokens are those that the loss was computed on. All rows are decoded together.

An evaluation: `evaluate` of as many held-out rows as are decoded together, 16 at least, sampled at temperature 1 with five seeds:
completions, their scores, and what both models say of the references. Tokens are those of the completions.

Beside them stand the counts of one run of each (`benchmarks.counts`), taken apart from the timing; ops and calls are per token
of the whole step or evaluation, rounds and waits are of its decoding. Those of an evaluation have no rounds.
"""

import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from benchmarks.counts import Run, count
from benchmarks.harness import (
    Options,
    Row,
    accelerator,
    describe,
    parse,
    print_table,
    publish,
    side_by_side,
    timed,
)
from benchmarks.small_pair import skipped, small_examples, small_pair
from switchkd.data.texts import TokenizedExample
from switchkd.evaluation.evaluate import evaluate
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.tasks import TASKS
from switchkd.methods.mixes import Generated
from switchkd.models.pair import Pair
from switchkd.training.settings import TrainConfig, load_recipe
from switchkd.training.trainer import Trainer

RECIPES = {"on-policy": "on_policy", "SWITCH": "switch", "AdaSwitch": "adaswitch"}
STEP, EVALUATION = "step", "evaluation"
SEEDS = (10, 20, 30, 40, 50)
COUNTS = ("ops/token", "calls/token", "own calls/token", "rounds", "waits/round")
# Does its work once; returns seconds, and numbers beside them.
Work = Callable[[], tuple[float, dict[str, float]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every cell, print the table, write small.json and small.png; says so and ends where there is no small pair."""
    options = parse(argv, "small", __doc__)
    if skipped(options):
        return 0
    name, pair = small_pair(options)
    sizes, new_tokens, least = ((2,), 4, 2) if options.quick else ((8, 64, 256), 128, 16)
    train = small_examples(options, pair, max(sizes), part="train")
    held_out = small_examples(options, pair, max(*sizes, least))
    rows = [
        row
        for size in sizes
        for row in measure(pair, train[:size], held_out[: max(size, least)], new_tokens, size, options)
    ]
    print_table(f"pair: {name}, at most {new_tokens} new tokens a row", rows)
    settings = {"pair": name, "new_tokens": new_tokens, "seeds": SEEDS, **describe(pair, held_out[:4])}
    publish("small", options, settings, rows, plot(rows))
    return 0


def measure(
    pair: Pair,
    train: list[TokenizedExample],
    held_out: list[TokenizedExample],
    new_tokens: int,
    size: int,
    options: Options,
) -> list[Row]:
    """Rows of one number of rows together: all steps and the evaluation, in turns, then their counts."""
    trainers = {
        name: partial(new_trainer, pair, train, recipe, new_tokens, options.device) for name, recipe in RECIPES.items()
    }
    works = {(STEP, name): step_of(new()) for name, new in trainers.items()}
    works[EVALUATION, "evaluate"] = evaluation(pair, held_out, new_tokens, size)
    spans: dict[tuple[str, str], list[tuple[float, dict[str, float]]]] = {key: [] for key in works}

    def run(key: tuple[str, str]) -> None:
        spans[key].append(works[key]())

    side_by_side({" ".join(key): partial(run, key) for key in works}, options.repeats, f"{size} rows")
    runs = {(STEP, name): partial(counted_step, new) for name, new in trainers.items()}
    runs[EVALUATION, "evaluate"] = partial(counted_evaluation, pair, held_out, new_tokens, size)
    rows = []
    for (work, name), measured in spans.items():
        later = measured[1:]  # the first is the warm-up
        row = Row({"work": work, "rows": size}, name, [seconds for seconds, _ in later])
        row.numbers.update({number: [beside[number] for _, beside in later] for number in later[0][1]})
        counts = count(runs[work, name])[0]
        row.numbers.update({number: counts[number] for number in COUNTS if number in counts})
        rows.append(row)
    return rows


def new_trainer(pair: Pair, examples: list[TokenizedExample], recipe: str, new_tokens: int, device: str) -> Trainer:
    """A trainer at its first step, with a copy of the student."""
    config: TrainConfig = replace(
        load_recipe(recipe),
        mix=Generated(1.0),
        max_new_tokens=new_tokens,
        per_device_train_batch_size=len(examples),
        generation_batch_size=len(examples),
        learning_rate=0.0,
        max_steps=1000,
    )
    return Trainer(replace(pair, student=deepcopy(pair.student)), examples, config, accelerator(device))


def step_of(trainer: Trainer) -> Work:
    """The next step of a trainer."""

    def work() -> tuple[float, dict[str, float]]:
        metrics: dict[str, Any] = {}
        before = trainer.num_tokens
        seconds = timed(lambda: metrics.update(trainer.train_step()[0]))
        tokens = trainer.num_tokens - before
        return seconds, {"tokens/s": tokens / seconds, "generate s": metrics["seconds/generate"]}

    return work


def evaluation(pair: Pair, examples: list[TokenizedExample], new_tokens: int, batch: int) -> Work:
    """An evaluation of the student with five seeds."""

    def work() -> tuple[float, dict[str, float]]:
        tokens: list[int] = []
        seconds = timed(lambda: tokens.append(evaluated_tokens(pair, examples, new_tokens, batch)))
        return seconds, {"tokens/s": tokens[0] / seconds}

    return work


def evaluated_tokens(pair: Pair, examples: list[TokenizedExample], new_tokens: int, batch: int) -> int:
    """Tokens of the completions of an evaluation."""
    settings = EvalSettings(new_tokens, 1.0, SEEDS, batch_size=batch)
    result = evaluate(pair, pair.student, examples, TASKS["references"], settings)
    return sum(text.tokens for text in result.completions)


def counted_step(new: Callable[[], Trainer]) -> Run:
    """The first step of a new trainer, for ``count``."""
    trainer = new()

    def run(round_ended: Callable[..., None]) -> int:
        trainer.train_step(round_ended)
        return trainer.num_tokens

    return run


def counted_evaluation(pair: Pair, examples: list[TokenizedExample], new_tokens: int, batch: int) -> Run:
    """An evaluation, for ``count``."""
    return lambda _: evaluated_tokens(pair, examples, new_tokens, batch)


def plot(rows: list[Row]) -> Figure:
    """Tokens a second by rows, a panel for steps and one for evaluations."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axis, work in zip(figure.subplots(1, 2), (STEP, EVALUATION), strict=True):
        for name in dict.fromkeys(row.contender for row in rows if row.cell["work"] == work):
            shown = [row for row in rows if (row.cell["work"], row.contender) == (work, name)]
            axis.plot(
                [row.cell["rows"] for row in shown], [row.number("tokens/s") for row in shown], marker="o", label=name
            )
        axis.set(title=work, xlabel="rows together", ylabel="tokens/s", ylim=(0, None))
        axis.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    sys.exit(main())
