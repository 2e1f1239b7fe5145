"""Curves over training: what ``metrics.jsonl`` says, as lines, for a report of runs and for figures of methods.

A value that is missing or not finite is a gap in its line, and a point alone is a marker. A step that has not the metric at all
(it read data and generated nothing) is passed over.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from switchkd.compare_report import BLUE, GREY, VERMILLION
from switchkd.errors import DataError
from switchkd.metrics import BANDS
from switchkd.plain import Lines
from switchkd.report import number, percent
from switchkd.rollouts import mean
from switchkd.steps import SCORE, Steps, alike, differences

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Lines
Array = NDArray[np.float64]

# Steps that a curve of step metrics is averaged over; evaluations are drawn as they are.
SMOOTH = 9
POINTS = 400  # that a line has at most: more are not seen, and make a page heavy
STAIRS = 60
# With compare_report's, those of Okabe and Ito that can be read on white and on black; five colours and four styles
# make twenty looks.
COLOURS = (BLUE, VERMILLION, "#009E73", "#CC79A7", GREY)
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^v"

SHARE = "%"
# In the place of a unit that depends on the run: that of its policy, and that of its objective.
OWN, LOSS = "policy's", "objective's"
# What a metric is and its unit. Shares are from 0 to 1 and shown in percent.
QUANTITIES = {
    "loss": ("loss", LOSS),
    "lm_loss": ("language-modelling loss", "nats per token"),
    "switch/divergence_mean": ("mean divergence", OWN),
    **{
        f"switch/divergence_{start}+": (
            f"divergence at positions {f'from {start}' if math.isinf(end) else f'{start} to {end - 1}'}",
            OWN,
        )
        for start, end in BANDS
    },
    "switch/threshold": ("threshold", OWN),
    "switch/teacher_share": ("teacher's share of tokens", SHARE),
    "switch/switched_share": ("responses with a switch", SHARE),
    "switch/first_switch": ("first switch", "token position"),
    "decode/agreement": ("agreement", SHARE),
    "decode/block_length": ("block length", "tokens"),
    "decode/kept_per_block": ("kept of a block", "tokens"),
    "tokens_per_second": ("training speed", "tokens/s"),
    "decode/tokens_per_second": ("decoding speed", "tokens/s"),
    "memory_gib": ("memory", "GiB"),
    "step": ("optimizer step", ""),
    "num_tokens": ("response tokens trained on", ""),
}
SCORE_UNITS = {"forward_kl": "nats per token", "own_forward_kl": "nats per token", "perplexity": "", "length": "tokens"}
# What an axis of several such metrics is called.
SHARED_LABELS = {SHARE: "percent", OWN: "divergence"}
# The curves of a report: name, title, metrics.
CURVES = (
    ("loss", "Loss", ("loss", "lm_loss")),
    (
        "divergence",
        "Divergence of student and teacher, by position in the response",
        (*(f"switch/divergence_{start}+" for start, _ in BANDS), "switch/threshold"),
    ),
    ("teacher_share", "Who wrote", ("switch/teacher_share", "switch/switched_share")),
    ("first_switch", "Where the teacher first took over", ("switch/first_switch",)),
    (
        "agreement",
        "How often the two models agree, and the blocks that are verified",
        ("decode/agreement", "decode/block_length", "decode/kept_per_block"),
    ),
    ("speed", "Speed", ("tokens_per_second", "decode/tokens_per_second")),
    ("memory", "Memory", ("memory_gib",)),
)
# What a step's time is spent on, and how strong each is drawn, so that they differ in grey too.
PARTS = {"generate": 0.95, "teacher": 0.7, "update": 0.45}


@dataclass(frozen=True)
class Line:
    """A metric of some runs: their mean, and the range that they span. Lines of one ``label`` look alike."""

    label: str
    runs: Sequence[Steps]
    name: str


@dataclass(frozen=True)
class Panel:
    """Lines over one axis, all in one unit; ``x`` is the metric that they are drawn by.

    Raises DataError for lines of a metric that is not measured alike in their runs: there is no panel of those.
    """

    label: str
    lines: Sequence[Line]
    x: str = "step"

    def __post_init__(self) -> None:
        for name in dict.fromkeys(line.name for line in self.lines):
            first, *others = alike({line.label: line.runs for line in self.lines if line.name == name}, name) or [{}]
            if others:
                raise DataError(f"{name} cannot stand on one axis: {_apart(first, others[0], name)}")


@dataclass(frozen=True)
class Curve:
    """A figure of a report, and what it shows in words, for those who cannot see it."""

    name: str
    title: str
    figure: Figure
    summary: str


def cost(metrics: Metrics) -> dict[str, float]:
    """What a run took: optimizer steps, response tokens trained on, seconds without evaluation, and the shares of the tokens
    written by the teacher and of the responses it had a part in, over the steps that generated text."""
    return {
        "steps": len(metrics),
        "tokens": metrics[-1]["num_tokens"],
        "seconds": sum(m["seconds"] for m in metrics),
        "teacher share": mean(m["switch/teacher_share"] for m in metrics if "switch/teacher_share" in m),
        "switched responses": mean(m["switch/switched_share"] for m in metrics if "switch/switched_share" in m),
    }


def quantity(name: str) -> tuple[str, str]:
    """What a metric is, in words, and its unit; "" where it has none, OWN or LOSS where it depends on the run."""
    if name.startswith(SCORE):
        score = name.removeprefix(SCORE)
        return score, SCORE_UNITS.get(score.split("@")[0], SHARE)
    return QUANTITIES.get(name, (name, ""))


def unit_in(run: Steps, name: str) -> str:
    """The unit of a metric of this run."""
    unit = quantity(name)[1]
    return run.unit if unit == OWN else run.loss_unit if unit == LOSS else unit


def axis_label(what: str, unit: str) -> str:
    """What is drawn, with its unit, in lines that fit beside a panel."""
    kept_together = " (" + unit.replace(" ", "\xa0") + ")" if unit else ""
    return textwrap.fill(what + kept_together, 22, break_long_words=False).replace("\xa0", " ")


# --- values ---------------------------------------------------------------------------------------------------------


def series(metrics: Metrics, name: str) -> tuple[Array, Array]:
    """The steps that have a metric, and its values; NaN where one is missing or not finite."""
    own = [m for m in metrics if name in m]
    values = np.array([math.nan if m[name] is None else m[name] for m in own], dtype=np.float64)
    return np.array([m["step"] for m in own], dtype=np.float64), np.where(np.isfinite(values), values, math.nan)


def has(metrics: Metrics, name: str) -> bool:
    """Whether there is a value to draw."""
    return bool(np.isfinite(series(metrics, name)[1]).any())


def smoothed(metrics: Metrics, name: str) -> tuple[Array, Array]:
    """``series`` averaged over SMOOTH steps, gaps kept and left out of the means; evaluations and short runs as they are."""
    steps, values = series(metrics, name)
    if not _is_smoothed(metrics, name):
        return steps, values
    kept, middle = np.isfinite(values), slice(SMOOTH // 2, len(steps) - SMOOTH // 2)
    sums, counts = (np.convolve(each, np.ones(SMOOTH), "valid") for each in (np.where(kept, values, 0.0), kept))
    return steps[middle], np.where(kept[middle], sums / np.maximum(counts, 1), math.nan)


def _is_smoothed(metrics: Metrics, name: str) -> bool:
    return not name.startswith(SCORE) and sum(name in line for line in metrics) >= 3 * SMOOTH


def together(runs: Sequence[Metrics], name: str) -> tuple[Array, Array]:
    """Steps, and the values there ``[runs, steps]`` of runs that all have the metric.

    Evaluations are taken at the steps that all have. Runs read data and generate at different steps, so that other curves are
    read, once smoothed, at all steps of any, from where the last begins to where the first ends.
    """
    found = [smoothed(metrics, name) for metrics in runs]
    if not found:
        return np.empty(0), np.empty((0, 0))
    common = set.intersection if name.startswith(SCORE) else set.union
    first, last = max(steps[0] for steps, _ in found), min(steps[-1] for steps, _ in found)
    at = np.array([step for step in sorted(common(*(set(steps) for steps, _ in found))) if first <= step <= last])
    return at, np.stack([np.interp(at, *own) for own in found])


def thinned(values: Array) -> NDArray[np.intp]:
    """Which of many points to draw: of each of as many bins the lowest, the highest and a gap, so that nothing seen is lost."""
    if len(values) <= POINTS:
        return np.arange(len(values))
    kept: set[int] = set()
    for places in np.array_split(np.arange(len(values)), POINTS // 3):
        own, gaps = values[places], places[np.isnan(values[places])]
        kept |= set(gaps[:1].tolist())
        if len(gaps) < len(places):
            kept |= {int(places[np.nanargmin(own)]), int(places[np.nanargmax(own)])}
    return np.array(sorted(kept))


# --- drawing --------------------------------------------------------------------------------------------------------


def look(place: int) -> dict[str, Any]:
    """Colour and line style of a figure's line of that number."""
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": STYLES[place % len(STYLES)]}


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: no formula between dollars, and not left out for a leading underscore."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def draw(panels: Sequence[Panel], title: str, columns: int = 1, note: str = "") -> Figure:
    """The panels, row by row, in one figure with one legend, over which their notes and ``note`` stand."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(7, 1.1 + 2.1 * rows), layout="constrained")
    figure.suptitle(plain(title), fontsize=11)
    labels = dict.fromkeys(line.label for panel in panels for line in panel.lines)
    looks = {label: look(place) for place, label in enumerate(labels)}  # the same in every panel
    grid = figure.subplots(rows, columns, squeeze=False, sharex="col", sharey="row")
    for axes, panel in zip(grid.flat, panels, strict=True):
        for line in panel.lines:
            _draw_line(axes, line, panel.x, looks[line.label])
        _dress(axes, panel)
    for axes in grid.flat:
        axes.label_outer()
    legend(figure, " ".join(part for part in (panel_notes(panels), note) if part))
    return figure


def _draw_line(axes: Axes, line: Line, x: str, own: Mapping[str, Any]) -> None:
    """The mean of the line's runs with their range; of one run the values themselves, faint, if the line is smoothed."""
    runs = [metrics for metrics in line.runs if has(metrics, line.name)]
    steps, values = together(runs, line.name)
    if not len(steps):
        return
    centre = values.mean(0)
    picked = thinned(centre)
    alone = _alone(centre[picked]) | line.name.startswith(SCORE)
    marker = "o" if alone.any() else ""
    by = _by(runs, x, steps)
    axes.plot(by[picked], centre[picked], label=plain(line.label), marker=marker, ms=3, markevery=alone, **own)
    if len(runs) > 1:
        low, high = values.min(0)[picked], values.max(0)[picked]
        axes.fill_between(by[picked], low, high, color=own["color"], alpha=0.15, linewidth=0)
        return
    steps, raw = series(runs[0], line.name)
    if len(raw) > len(centre):
        picked = thinned(raw)
        axes.plot(_by(runs, x, steps)[picked], raw[picked], color=own["color"], alpha=0.45, linewidth=0.7, zorder=1)


def _by(runs: Sequence[Metrics], x: str, steps: Array) -> Array:
    """Where steps lie on the axis of the metric ``x``: at its mean over the runs."""
    return np.mean([np.interp(steps, *series(metrics, x)) for metrics in runs], axis=0)


def _alone(values: Array) -> NDArray[np.bool_]:
    """Which values have a gap or an end on both sides, so that no line goes through them."""
    there = np.isfinite(np.concatenate([[math.nan], values, [math.nan]]))
    return there[1:-1] & ~there[:-2] & ~there[2:]


def _dress(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_ylabel(plain(panel.label))
    axes.set_xlabel(quantity(panel.x)[0])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6 if panel.x == "step" else 4, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    # Scores are percentages as they are, shares from 0 to 1.
    if any(quantity(line.name)[1] == SHARE and not line.name.startswith(SCORE) for line in panel.lines):
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
        low, high = axes.get_ylim()
        axes.set_ylim(bottom=max(low, -0.03 * high))
    plain_axes(axes)


def plain_axes(axes: Axes) -> None:
    """A grid that does not shout, and no frame."""
    axes.grid(color="black", alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, note: str = "") -> None:
    """Under the figure a note, and one legend for all labels in it."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found or note:
        columns = max(1, min(len(found), 3 if max(map(len, found), default=0) < 30 else 2))
        figure.legend(
            found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9,
            handlelength=3, title=textwrap.fill(plain(note), 100), title_fontsize=8,
        )  # fmt: skip


def metric_panels(runs: Mapping[str, Sequence[Steps]], names: Sequence[str], x: str = "step") -> list[Panel]:
    """A panel for each metric with a line for each method, or several where it is not measured alike in all runs."""
    panels = []
    for name in names:
        for group in alike(runs, name) or [{}]:
            unit = next((unit_in(run, name) for own in group.values() for run in own), "")
            lines = [Line(label, own, name) for label, own in group.items()]
            panels.append(Panel(axis_label(quantity(name)[0], unit), lines, x))
    return panels


def panel_notes(panels: Sequence[Panel]) -> str:
    """What has to be known of lines: over how many steps they are averaged, what bands are, and why some stand apart."""
    lines = [line for panel in panels for line in panel.lines]
    means = {_is_smoothed(run, line.name) for line in lines for run in line.runs if has(run, line.name)}
    which = "Lines" if means == {True} else f"Lines of {3 * SMOOTH} steps and more"
    notes = [f"{which}: means of {SMOOTH} steps."] if True in means else []
    if any(len(line.runs) > 1 for line in lines):
        notes.append("Bands: range of a method's runs.")
    by_metric: dict[tuple[str, str], list[dict[str, Sequence[Steps]]]] = {}
    for panel in panels:
        for name in dict.fromkeys(line.name for line in panel.lines):
            own = {line.label: line.runs for line in panel.lines if line.name == name}
            by_metric.setdefault((name, panel.x), []).append(own)
    apart = {(name, _apart(groups[0], other, name)) for (name, _), groups in by_metric.items() for other in groups[1:]}
    notes += [
        f"{quantity(name)[0]} has panels of its own where it is not measured alike: {why}."
        for name, why in sorted(apart)
    ]
    return " ".join(notes)


def _apart(group: Mapping[str, Sequence[Steps]], other: Mapping[str, Sequence[Steps]], name: str) -> str:
    """Why a metric of two groups of runs cannot be compared."""
    (first, *_), (second, *_) = next(iter(group.values())), next(iter(other.values()))
    return f"in {second.name}, {'; '.join(differences(first, second, name))} as in {first.name}"


# --- a report's curves ----------------------------------------------------------------------------------------------


def run_curves(runs: Mapping[str, Steps]) -> list[Curve]:
    """The curves of a report on runs by label, those for which there is data.

    Of one run, the metrics of one unit are lines of one panel; of several, each metric is a panel with a line a run.
    """
    seen = dict.fromkeys(name for metrics in runs.values() for m in metrics for name in m)
    main = dict.fromkeys(SCORE + metrics.primary for metrics in runs.values())
    scores = [name for name in (main | seen) if name in seen and name.startswith(SCORE) and "@" not in name]
    if len(runs) > 1:  # the main one, and the first of each other unit: a panel for each would be many
        first_of_unit = {quantity(name)[1]: name for name in reversed(scores)}
        scores = [name for name in scores if name in first_of_unit.values()]
    specs = (CURVES[0], ("scores", "Scores of held-out examples", tuple(scores)), *CURVES[1:])
    made = [_curve(runs, *spec) for spec in specs]
    return [curve for curve in (*made, _time_curve(runs)) if curve]


def _curve(runs: Mapping[str, Steps], name: str, title: str, metrics: Sequence[str]) -> Curve | None:
    drawn = [metric for metric in metrics if any(has(own, metric) for own in runs.values())]
    if not drawn:
        return None
    if len(runs) == 1:
        panels = _unit_panels(next(iter(runs.values())), drawn)
    else:
        panels = metric_panels({label: [own] for label, own in runs.items()}, drawn)
    told = [
        (f"{label}: " if len(runs) > 1 else "")
        + f"{', '.join(_told(own, metric) for metric in drawn)} over {len(own)} step{'s' * (len(own) != 1)}."
        for label, own in runs.items()
    ]
    notes = panel_notes(panels)
    return Curve(name, title, draw(panels, title), " ".join([*told, *([notes] if notes else [])]))


def _unit_panels(metrics: Steps, names: Sequence[str]) -> list[Panel]:
    """A panel for each unit with a line for each metric; the axis alone names an only one."""
    by_unit: dict[str, list[str]] = {}
    for name in names:
        unit = quantity(name)[1]
        by_unit.setdefault(unit or name, []).append(name)  # what has no unit shares no axis
    return [
        Panel(
            _shared_label(unit, metrics, own),
            [Line(quantity(name)[0] if len(names) > 1 else "", [metrics], name) for name in own],
        )
        for unit, own in by_unit.items()
    ]


def _shared_label(unit: str, run: Steps, names: Sequence[str]) -> str:
    """The label of an axis on which metrics of one unit stand."""
    if len(names) == 1:
        return axis_label(quantity(names[0])[0], unit_in(run, names[0]))
    return axis_label(SHARED_LABELS[unit], run.unit if unit == OWN else "") if unit in SHARED_LABELS else unit


def _told(metrics: Metrics, name: str) -> str:
    """How a metric moved, in words; from and to what in the mean, where the line is one."""
    what, unit = quantity(name)
    steps, values = series(metrics, name)
    broken = {line["step"] for line in metrics if line.get(name) is not None and not math.isfinite(line[name])}
    gaps = set(steps[np.isnan(values)].tolist()) - broken
    if np.isnan(values).all():
        return f"{what} is never finite" if broken else f"{what} has no value"
    shown = smoothed(metrics, name)[1]
    kept = next(each[np.isfinite(each)] for each in (shown, values) if np.isfinite(each).any())
    share = unit == SHARE and not name.startswith(SCORE)
    first, last = (percent(value) if share else number(value) for value in (kept[0], kept[-1]))
    way = "falls" if kept[-1] < kept[0] else "rises"
    words = f"{what} is {first}" if first == last else f"{what} {way} from {first} to {last}"
    for why, which in (("no value", gaps), ("not finite", broken)):
        if which:
            where = ", ".join(f"{step:.0f}" for step in sorted(which)[:5]) + (" …" if len(which) > 5 else "")
            words += f" ({why} at step{'s' * (len(which) > 1)} {where})"
    return words


def _time_curve(runs: Mapping[str, Steps]) -> Curve | None:
    """Seconds of a step by what they are spent on, stacked, in a panel for each run."""
    from matplotlib.figure import Figure

    timed = {label: own for label, own in runs.items() if all(has(own, f"seconds/{part}") for part in PARTS)}
    if not timed:
        return None
    title = "Time of a step"
    figure = Figure(figsize=(7, 1.1 + 2.1 * len(timed)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    told = []
    for axes, (label, metrics) in zip(figure.subplots(len(timed), squeeze=False).flat, timed.items(), strict=True):
        sums = _stack(axes, metrics)
        _dress(axes, Panel(f"{label} (s)" if len(runs) > 1 else "time (s)", ()))
        shares = ", ".join(f"{percent(share)} {part}" for part, share in zip(PARTS, sums / sums.sum(), strict=True))
        told.append((f"{label}: " if len(runs) > 1 else "") + f"of {number(sums.sum())} seconds, {shares}.")
    told += [f"{label}: time has no value." for label in runs if label not in timed]
    legend(figure)
    return Curve("time", title, figure, " ".join(told))


def _stack(axes: Axes, metrics: Metrics) -> Array:
    """Draw each part on those below it, a stair a step or, of many steps, their mean; returns the seconds of each part."""
    own = [m for m in metrics if all(f"seconds/{part}" in m for part in PARTS)]
    parts = np.stack([series(own, f"seconds/{part}")[1] for part in PARTS])
    groups = np.array_split(np.arange(len(own)), min(len(own), STAIRS))
    edges = [own[group[0]]["step"] - 0.5 for group in groups] + [own[-1]["step"] + 0.5]
    below = np.zeros(len(groups))
    for colour, (part, alpha), values in zip(COLOURS, PARTS.items(), parts, strict=False):
        top = below + np.array([values[group].mean() for group in groups])
        axes.stairs(top, edges, baseline=below, fill=True, label=part, color=colour, alpha=alpha, linewidth=0)
        below = top
    return np.nansum(parts, axis=1)
