"""How often the teacher takes over, by task and by student: AdaSwitch's one switch, and SWITCH's share of the tokens.

Held-out prompts of the small pair, the recipes' own rules, temperature 1; nothing is trained. ``handed over`` is the share of
texts in which the teacher wrote at least one token, ``first token`` the mean place at which it first did, and ``teacher's tokens``
its share of all tokens.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from benchmarks.harness import Options, Row, parse, print_table, publish
from benchmarks.premise import BATCH, ROWS, quick, whole
from benchmarks.small_pair import skipped
from switchkd.base.terminal import bar
from switchkd.data.small_data import TASKS
from switchkd.data.texts import TokenizedExample
from switchkd.decoding.decode import decode
from switchkd.methods.policy import TEACHER, Policy
from switchkd.models.pair import Pair
from switchkd.studies.small_pair import MAX_COMPLETION
from switchkd.training.settings import load_recipe

RULES = {"AdaSwitch": "adaswitch", "SWITCH": "switch"}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every task, student and rule; says so and ends where there is no small pair."""
    options = parse(argv, "handover", __doc__)
    if skipped(options):
        return 0
    rows = [row for task in TASKS for row in measure(task, options)]
    print_table("how often the teacher takes over", rows)
    publish("handover", options, {"rows": ROWS, "temperature": 1.0}, rows, plot(rows))
    return 0


def measure(task: str, options: Options) -> Iterator[Row]:
    """A row for each student and rule."""
    pair, examples, writers, _ = quick(options) if options.quick else whole(task, options)
    students = {name: model for name, model in writers.items() if name != "teacher"}
    with bar(f"hand-overs: {task}", len(students) * len(RULES)) as progress:
        for name, student in students.items():
            for rule, recipe in RULES.items():
                numbers = _written(replace(pair, student=student), examples, load_recipe(recipe).policy)
                yield Row({"task": task, "student": name}, rule, [], numbers)
                progress.advance(1, f"{name} {rule}")


def _written(pair: Pair, examples: Sequence[TokenizedExample], policy: Policy) -> dict[str, float]:
    texts = decode(
        pair.student, pair.teacher, [list(e.prompt_ids) for e in examples], policy, MAX_COMPLETION, batch_size=BATCH,
        eos_token_ids=pair.eos_token_ids, vocab_size=pair.vocab_size,
    )  # fmt: skip
    firsts = [text.speakers.index(TEACHER) for text in texts if TEACHER in text.speakers]
    tokens = [speaker == TEACHER for text in texts for speaker in text.speakers]
    first = {"first token": sum(firsts) / len(firsts)} if firsts else {}
    share = 100 * sum(tokens) / max(len(tokens), 1)
    return {"handed over, %": 100 * len(firsts) / len(texts), "teacher's tokens, %": share, **first}


def plot(rows: Sequence[Row]) -> Figure:
    """The teacher's share of texts and tokens, a panel for each rule, a line for each task."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axis, (rule, number) in zip(
        figure.subplots(1, 2), {"AdaSwitch": "handed over, %", "SWITCH": "teacher's tokens, %"}.items(), strict=True
    ):
        for task in dict.fromkeys(row.cell["task"] for row in rows):
            own = [row for row in rows if (row.cell["task"], row.contender) == (task, rule)]
            axis.plot([row.cell["student"] for row in own], [row.number(number) for row in own], marker="o", label=task)
        axis.set(title=rule, ylabel=number, ylim=(0, 102))
        axis.tick_params(axis="x", rotation=30)
        axis.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    sys.exit(main())
