"""The papers' figures of trained runs: lambda, divergence, switches, scores by length, early progress, cost.

Runs that differ in their training seed alone are one method (``reports.compare``). A run that has not what a figure shows is left
out of it and named under it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from switchkd.base.errors import DataError
from switchkd.decoding.rollouts import mean
from switchkd.evaluation.results import LENGTH_BANDS
from switchkd.evaluation.statistics import FEW_EXAMPLES, Estimate, Values, estimate, score
from switchkd.models.saved_student import STUDENT
from switchkd.reports.compare import (
    Result,
    by_method,
    check_comparable,
    check_teachers,
    load_result,
    references,
    training_settings,
)
from switchkd.reports.curves import cost, metric_panels
from switchkd.reports.panels import (
    GREY,
    MARKERS,
    axis_label,
    draw,
    has,
    legend,
    look,
    panel_notes,
    plain,
    plain_axes,
    quantity,
)
from switchkd.reports.record import read_settings, read_steps
from switchkd.reports.steps import SCORE, Steps
from switchkd.reports.tables import direction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INTERVALS = f"Bars: 95 % bootstrap interval; hollow: fewer than {FEW_EXAMPLES} examples."


class _Rule(TypedDict):
    name: str


class _Settings(TypedDict):
    """What is read of a run's settings; the rest of them is only compared."""

    seed: int
    policy: _Rule
    objective: _Rule
    per_device_train_batch_size: int
    gradient_accumulation_steps: int


@dataclass(frozen=True)
class Run:
    """A run directory; ``result`` is its final evaluation, or says why there is none."""

    path: Path
    config: dict[str, Any]
    metrics: Steps
    result: Result | str


Methods = Mapping[str, Mapping[int, Run]]  # by label and training seed


def load_methods(paths: Sequence[str]) -> Methods:
    """Read run directories, also of runs that were stopped.

    Raises:
        DataError: there are none, or one is not a run directory. ConfigError: two are of one method and training seed.
    """
    if not paths:
        raise DataError("nothing to plot; give run directories: switchkd plot runs/a runs/b")
    return by_method([_load(Path(path)) for path in paths])


def _load(path: Path) -> Run:
    config = read_settings(path, _Settings)
    try:
        result = load_result(str(path))
        return Run(path, config, read_steps(path, config, result.task["primary"]), result)
    except DataError as error:
        why = str(error) if (path / STUDENT).is_dir() else "no final evaluation, the run has not ended"
        return Run(path, config, read_steps(path, config), why)


def fit(methods: Methods, problem: Callable[[Run], str]) -> tuple[Methods, str]:
    """The runs in which ``problem`` finds none, and a note that names the others with theirs.

    Raises:
        DataError: none is left.
    """
    problems: dict[str, list[str]] = {}
    kept: dict[str, dict[int, Run]] = {}
    for label, runs in methods.items():
        for seed, run in runs.items():
            if found := problem(run):
                problems.setdefault(found, []).append(run.path.name)
            else:
                kept.setdefault(label, {})[seed] = run
    told = "; ".join(f"{', '.join(names)} ({found})" for found, names in problems.items())
    if not kept:
        raise DataError(f"there is nothing to draw: {told}")
    return kept, f"Left out: {told}." if told else ""


# --- what runs have -------------------------------------------------------------------------------------------------


def _unscored(run: Run) -> str:
    return run.result if isinstance(run.result, str) else ""


def _ungenerated(run: Run) -> str:
    return "" if has(run.metrics, "switch/teacher_share") else "no text was generated"


def _no_lambda(run: Run) -> str:
    policy = run.config["policy"]
    if policy["name"] != "switch":
        return f"no lambda in the policy {policy['name']}"
    if policy["schedule"] != "exponential" or not policy["decay"]:
        return f"no lambda: the schedule is {policy['schedule']}, decay {policy['decay']:g}"
    return ""


def _metrics(methods: Methods) -> dict[str, list[Steps]]:
    return {label: [run.metrics for run in runs.values()] for label, runs in methods.items()}


@dataclass(frozen=True)
class FinalScores:
    """The main score of the runs' students, the only way to draw it: raises DataError for runs that cannot be compared."""

    methods: Methods

    def __post_init__(self) -> None:
        check_comparable(self.results)
        check_teachers(self.results, [self.name])

    @property
    def results(self) -> list[Result]:
        runs = (run for own in self.methods.values() for run in own.values())
        return [run.result for run in runs if isinstance(run.result, Result)]

    @property
    def name(self) -> str:
        return self.results[0].task["primary"]

    @property
    def axis(self) -> str:
        """What its axis is called."""
        return f"{axis_label(*quantity(SCORE + self.name))},\n{direction(self.name)}"

    def of(self, method: str) -> dict[int, Values]:
        """Those of a method, by training seed."""
        found = {seed: run.result for seed, run in self.methods[method].items()}
        return {seed: result.student.scores[self.name] for seed, result in found.items() if isinstance(result, Result)}


# --- pieces of figures ----------------------------------------------------------------------------------------------


def _columns(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 2.8 * count, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = list(figure.subplots(1, count, squeeze=False).flat)
    for axes in panels:
        plain_axes(axes)
    return figure, panels


def _mark(place: int) -> dict[str, Any]:
    """Colour and marker of the points of a figure's method of that number."""
    return {"color": look(place)["color"], "marker": MARKERS[place % len(MARKERS)], "ls": ""}


def _point(axes: Axes, x: float, found: Estimate, mark: Mapping[str, Any], label: str | None = None) -> None:
    """A score with its interval; hollow if it is over few examples."""
    if found.low is not None and found.high is not None:
        axes.vlines(x, found.low, found.high, color=mark["color"], linewidth=1.5)
    face = "white" if found.few else mark["color"]
    axes.plot([x], [found.mean], mfc=face, ms=7, zorder=3, label=label and plain(label), **mark)


def _notes(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _if_several(methods: Methods, words: str) -> str:
    """A note on the runs of a method, if one has several."""
    return words if any(len(runs) > 1 for runs in methods.values()) else ""


# --- the figures: each with its notes -------------------------------------------------------------------------------


def by_lambda(methods: Methods) -> tuple[Figure, str]:
    """SWITCH's ablation: the decay length of the threshold against the teacher's share of the tokens, and against the score.

    A large point is the mean of a method, a small one each of its runs. Methods that differ in the decay alone are joined.
    """
    methods, left_out = fit(methods, lambda run: _no_lambda(run) or _ungenerated(run) or _unscored(run))
    final = FinalScores(methods)
    figure, (shares, scores) = _columns(2, "Decay of the threshold: who writes, and the score")
    families = _families(methods)
    for place, family in enumerate(families):
        mark, label = _mark(place), plain(", ".join(family.values()))
        means: list[tuple[float, float]] = []
        for length, method in family.items():
            own = [100 * cost(run.metrics)["teacher share"] for run in methods[method].values()]
            values = final.of(method)
            found = estimate(final.name, values)
            shares.plot([length], [mean(own)], ms=7, label=None if means else label, **mark)
            _point(scores, length, found, mark)
            _dots(shares, length, own, mark["color"])
            _dots(scores, length, [score(final.name, each) for each in values.values()], mark["color"])
            means.append((mean(own), found.mean))
        for axes, heights in zip((shares, scores), zip(*means, strict=True), strict=True):
            axes.plot(list(family), heights, color=mark["color"], ls=look(place)["linestyle"], lw=1, zorder=1)
    lengths = sorted({length for family in families for length in family})
    for axes, axis in ((shares, "teacher's share of tokens (%)"), (scores, final.axis)):
        axes.set_xticks(lengths, [f"{length:.3g}" for length in lengths])
        axes.set_xlabel("decay length 1/λ (tokens)")
        axes.set_ylabel(axis)
    notes = _notes(INTERVALS, _if_several(methods, "Small points: single runs."), left_out)
    legend(figure, notes)
    return figure, notes


def _families(methods: Methods) -> list[dict[float, str]]:
    """Methods that differ in the decay alone: label by decay length in tokens, shortest first."""
    families: dict[str, dict[float, str]] = {}
    for label, runs in methods.items():
        config = next(iter(runs.values())).config
        others = training_settings(config | {"policy": config["policy"] | {"decay": None}})
        families.setdefault(others, {})[1 / config["policy"]["decay"]] = label
    return [dict(sorted(family.items())) for family in families.values()]


def _dots(axes: Axes, x: float, values: Sequence[float], colour: str) -> None:
    """A small point for each of several runs."""
    if len(values) > 1:
        axes.plot([x] * len(values), values, "o", color=colour, mfc="none", ms=4, alpha=0.7)


def divergence(methods: Methods) -> tuple[Figure, str]:
    """The mean divergence that the policy saw, over training."""
    name = "switch/divergence_mean"
    methods, left_out = fit(methods, lambda run: "" if has(run.metrics, name) else "its policy measured no divergence")
    return _over_training(methods, [name], "Divergence of student and teacher over training", left_out)


def switch_rate(methods: Methods) -> tuple[Figure, str]:
    """Responses in which the teacher took over, and the tokens that it wrote, over training."""
    methods, left_out = fit(methods, _ungenerated)
    return _over_training(
        methods, ["switch/switched_share", "switch/teacher_share"], "Switches over training", left_out
    )


def _over_training(methods: Methods, names: Sequence[str], title: str, left_out: str) -> tuple[Figure, str]:
    panels = metric_panels(_metrics(methods), names)
    return draw(panels, title, note=left_out), _notes(panel_notes(panels), left_out)


def progress(methods: Methods) -> tuple[Figure, str]:
    """Evaluations in the run, by steps and by tokens: the main score, and the divergence to the teacher on the references."""
    runs = [run for own in methods.values() for run in own.values()]
    main = {SCORE + run.metrics.primary for run in runs}
    names = [n for n in dict.fromkeys([*sorted(main), "eval/forward_kl"]) if any(has(run.metrics, n) for run in runs)]
    methods, left_out = fit(
        methods, lambda run: "" if any(has(run.metrics, name) for name in names) else "not evaluated in the run"
    )
    by = [metric_panels(_metrics(methods), names, x) for x in ("step", "num_tokens")]
    panels = [panel for row in zip(*by, strict=True) for panel in row]
    return draw(panels, "Early progress", 2, left_out), _notes(panel_notes(panels), left_out)


def by_length(methods: Methods) -> tuple[Figure, str]:
    """The main score by the length of the reference, in the bands of SWITCH's length study.

    A reference is as long for every method, so that a band holds the same examples; completions are not.
    """
    methods, left_out = fit(methods, _unscored)
    final = FinalScores(methods)
    name, results = final.name, final.results
    # A divergence weighs an example by the tokens of its reference.
    lengths = np.asarray(results[0].student.scores["forward_kl"].weights)
    bands = {band: (low <= lengths) & (lengths <= high) for band, (low, high) in LENGTH_BANDS.items()}
    bands = {band: inside for band, inside in bands.items() if inside.any()}
    models = [(label, final.of(label), _mark(place)) for place, label in enumerate(methods)]
    for place, reference in enumerate(references(results)):
        models.append(
            (reference.label, reference.score(name), _mark(place) | {"color": GREY, "marker": "*PX"[place % 3]})
        )
    figure, [axes] = _columns(1, "Score by length of the reference")
    figure.set_size_inches(7, 4)
    for place, (label, values, mark) in enumerate(models):
        for at, inside in enumerate(bands.values()):
            found = estimate(name, {seed: own.only(inside) for seed, own in values.items()})
            _point(axes, at + 0.8 * ((place + 0.5) / len(models) - 0.5), found, mark, None if at else label)
    axes.set_xticks(range(len(bands)), [f"{band}\n({inside.sum()} examples)" for band, inside in bands.items()])
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("length of the reference (tokens)")
    axes.set_ylabel(final.axis)
    notes = _notes(INTERVALS, left_out)
    legend(figure, notes)
    return figure, notes


def by_cost(methods: Methods) -> tuple[Figure, str]:
    """The final main score against tokens trained on, seconds of training, and the teacher's forwards to write text."""
    from matplotlib.ticker import MaxNLocator

    methods, left_out = fit(methods, lambda run: _unscored(run) or ("" if run.metrics else "no steps"))
    final = FinalScores(methods)
    figure, panels = _columns(3, "Final score against cost")
    taken: dict[str, Callable[[Run], float]] = {
        "response tokens trained on": lambda run: cost(run.metrics)["tokens"],
        "training time (s)": lambda run: cost(run.metrics)["seconds"],
        "teacher forwards\nto write text (rows)": _teacher_forwards,
    }
    for axes in panels[1:]:
        axes.sharey(panels[0])
    unknown = []
    for place, (label, runs) in enumerate(methods.items()):
        found = estimate(final.name, final.of(label))
        for axes, axis in zip(panels, taken, strict=True):
            x = mean(taken[axis](run) for run in runs.values())
            if np.isfinite(x):
                _point(axes, x, found, _mark(place), label)
            else:
                unknown.append(label)
    for axes, axis in zip(panels, taken, strict=True):
        most = max(axes.dataLim.x1, 0.0) or 1.0
        axes.set_xlim(-0.05 * most, 1.1 * most)  # from 0, so that costs which hardly differ look so
        axes.set_xlabel(axis)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    panels[0].set_ylabel(final.axis)
    wrote = f"Without teacher forwards, as no text was generated: {', '.join(unknown)}." if unknown else ""
    notes = _notes(INTERVALS, wrote, left_out)
    legend(figure, notes)
    return figure, notes


def _teacher_forwards(run: Run) -> float:
    """Rows in the teacher's forwards while it wrote and verified text, of the main process; NaN where none was generated."""
    rows = run.config["per_device_train_batch_size"] * run.config["gradient_accumulation_steps"]
    per_token = "decode/teacher_forwards_per_token"
    steps = [m for m in run.metrics if m.get(per_token) is not None]
    return sum(m[per_token] * m["completions/mean_length"] * rows for m in steps) if steps else math.nan


FIGURES: dict[str, Callable[[Methods], tuple[Figure, str]]] = {
    "lambda": by_lambda,
    "divergence": divergence,
    "switch_rate": switch_rate,
    "length": by_length,
    "progress": progress,
    "cost": by_cost,
}
