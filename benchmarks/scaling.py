"""How decoding scales: tokens per second against batch, new tokens and block, and forwards against decay and distance.

One thing is varied at a time around batch 8, 64 new tokens, the engine's own block and the policies' defaults, on the demo pair
after ``DISTILLED_STEPS`` steps of supervised distillation. Distance is the number of these steps: the longer a student was
distilled, the nearer it is to the teacher. Every row writes its whole budget. Forwards are counted, times measured; the
speed-up is that over the first value of a sweep in time, so with more tokens it is below 1.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import (
    DISTILLED_STEPS,
    Options,
    Row,
    Workload,
    decode_cost,
    describe,
    distilled_pair,
    forwards,
    parse,
    print_table,
    publish,
    question_examples,
    random_examples,
    random_pair,
    side_by_side,
)
from switchkd.decoding.rollouts import DecodeCost
from switchkd.methods.policies import AdaSwitch, Switch
from switchkd.methods.policy import Policy

POLICIES: dict[str, Policy] = {"SWITCH": Switch(), "AdaSwitch": AdaSwitch()}
DISTANCES = (0, DISTILLED_STEPS)
# Sweep: (values, values of --quick). The last two move the forwards, whose times say nothing new.
SWEEPS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "batch": ((1, 4, 8, 16, 32), (1, 2)),
    "new tokens": ((32, 64, 128), (2, 4)),
    "block": ((1, 2, 4, 8, "auto"), (1, 2, "auto")),
    "decay": ((0.02, 0.1, 0.5), (0.0, 0.1)),
    "distilled steps": (DISTANCES, (DISTILLED_STEPS,)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every sweep, print the tables, write scaling.json and scaling.png."""
    options = parse(argv, "scaling", __doc__)
    pairs = load(options)
    base = {"batch": 2, "new tokens": 4} if options.quick else {"batch": 8, "new tokens": 64}
    rows: list[Row] = []
    for sweep, values in SWEEPS.items():
        found = measure(sweep, values[options.quick], base, pairs, options.repeats)
        print_table(sweep, found)
        rows += found
    described = {steps: describe(*workload) for steps, workload in pairs.items()}
    publish("scaling", options, {**base, "distilled_steps": DISTILLED_STEPS, "pairs": described}, rows, plot(rows))
    return 0


def load(options: Options) -> dict[int, Workload]:
    """Pairs and examples by the number of steps that the student was distilled for."""
    if options.quick:
        pair = random_pair(options.device, quick=True)
        return {DISTILLED_STEPS: (pair, random_examples(pair, 2))}
    pairs = {steps: distilled_pair(steps, options.device) for steps in DISTANCES}
    return {steps: (pair, question_examples(pair, 32)) for steps, pair in pairs.items()}


def measure(
    sweep: str, values: Sequence[Any], base: dict[str, Any], pairs: dict[int, Workload], repeats: int
) -> list[Row]:
    """Rows of one sweep, all its values and policies in one alternation."""
    policies = ["SWITCH"] if sweep == "decay" else list(POLICIES)
    grid = {f"{policy}, {sweep} {value}": (policy, value) for policy in policies for value in values}
    costs: dict[str, DecodeCost] = {}

    def run(name: str, policy: str, value: Any, **change: Any) -> None:
        costs[name] = decode_with(pairs, policy, {**base, sweep: value, **change})

    full, warm_up = (
        {name: partial(run, name, *setting, **change) for name, setting in grid.items()}
        for change in ({}, {"new tokens": 4})
    )
    seconds = side_by_side(full, repeats, sweep, warm_up)
    rows = []
    for name, (policy, value) in grid.items():
        row, cost = Row({"sweep": sweep, "policy": policy}, str(value), seconds[name]), costs[name]
        row.numbers["tokens/s"] = cost.kept_tokens / row.median
        row.numbers.update({**forwards(cost), "teacher share": cost.summary()["teacher_share"]})
        rows.append(row)
    return rows


def decode_with(pairs: dict[int, Workload], policy: str, setting: dict[str, Any]) -> DecodeCost:
    """Decode once with what ``setting`` says, by the names of the sweeps."""
    pair, examples = pairs[setting.get("distilled steps", DISTILLED_STEPS)]
    prompts = [example.prompt_ids for example in examples[: setting["batch"]]]
    rule = Switch(decay=setting["decay"]) if "decay" in setting else POLICIES[policy]
    return decode_cost(pair, prompts, setting["new tokens"], rule, block_size=setting.get("block", "auto"))


def plot(rows: list[Row]) -> Figure:
    """A panel for each sweep: tokens per second for the first three, forwards per kept token for the others."""
    figure = Figure(figsize=(4 * len(SWEEPS), 3.6), layout="constrained")
    for axis, sweep in zip(figure.subplots(1, len(SWEEPS)), SWEEPS, strict=True):
        for policy in POLICIES:
            shown = [row for row in rows if row.cell == {"sweep": sweep, "policy": policy}]
            if sweep in ("decay", "distilled steps"):
                _forwards(axis, policy, shown)
            elif shown:
                axis.plot([r.contender for r in shown], [r.number("tokens/s") for r in shown], "o-", label=policy)
                axis.set(ylabel="tokens/s")
        axis.set(xlabel=sweep, ylim=(0, None))
        axis.legend(fontsize=7)
    return figure


def _forwards(axis: Axes, policy: str, rows: list[Row]) -> None:
    for who, style in {"student": "o--", "teacher": "o-"}.items():
        if rows:
            values = [row.number(f"{who} fwd/token") for row in rows]
            axis.plot([row.contender for row in rows], values, style, label=f"{policy}: {who}")
    axis.set(ylabel="forwards per kept token")


if __name__ == "__main__":
    sys.exit(main())
