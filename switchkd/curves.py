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
from switchkd.metrics import BANDS
from switchkd.plain import Lines
from switchkd.report import number, percent
from switchkd.rollouts import mean

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

SHARE, OWN = "%", "policy's own unit"
# What a metric is and its unit. Shares are from 0 to 1 and shown in percent.
QUANTITIES = {
    "loss": ("loss", "mean per response token"),
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
SHARED_LABELS = {SHARE: "percent", OWN: "divergence\n(policy's own unit)"}
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
    runs: Sequence[Metrics]
    name: str


@dataclass(frozen=True)
class Panel:
    """Lines over one axis, all in one unit; ``x`` is the metric that they are drawn by."""

    label: str
    lines: Sequence[Line]
    x: str = "step"


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
    """What a metric is, in words, and its unit; "" where it has none."""
    if name.startswith("eval/"):
        score = name.removeprefix("eval/")
        return score, SCORE_UNITS.get(score.split("@")[0], SHARE)
    return QUANTITIES.get(name, (name, ""))


def axis_label(name: str) -> str:
    """What a metric is, with its unit, in lines that fit beside a panel."""
    what, unit = quantity(name)
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
    if name.startswith("eval/") or len(steps) < 3 * SMOOTH:
        return steps, values
    kept, middle = np.isfinite(values), slice(SMOOTH // 2, len(steps) - SMOOTH // 2)
    sums, counts = (np.convolve(each, np.ones(SMOOTH), "valid") for each in (np.where(kept, values, 0.0), kept))
    return steps[middle], np.where(kept[middle], sums / np.maximum(counts, 1), math.nan)


def together(runs: Sequence[Metrics], name: str) -> tuple[Array, Array]:
    """Steps, and the values there ``[runs, steps]`` of runs that all have the metric.

    Evaluations are taken at the steps that all have. Runs read data and generate at different steps, so that other curves are
    read, once smoothed, at all steps of any, from where the last begins to where the first ends.
    """
    found = [smoothed(metrics, name) for metrics in runs]
    if not found:
        return np.empty(0), np.empty((0, 0))
    common = set.intersection if name.startswith("eval/") else set.union
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
    """The panels, row by row, in one figure with one legend, over which ``note`` stands."""
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
    legend(figure, note)
    return figure


def _draw_line(axes: Axes, line: Line, x: str, own: Mapping[str, Any]) -> None:
    """The mean of the line's runs with their range; of one run the values themselves, faint, if the line is smoothed."""
    runs = [metrics for metrics in line.runs if has(metrics, line.name)]
    steps, values = together(runs, line.name)
    if not len(steps):
        return
    centre = values.mean(0)
    picked = thinned(centre)
    alone = _alone(centre[picked]) | line.name.startswith("eval/")
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
    if any(quantity(line.name)[1] == SHARE and not line.name.startswith("eval/") for line in panel.lines):
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


def metric_panels(runs: Mapping[str, Sequence[Metrics]], names: Sequence[str], x: str = "step") -> list[Panel]:
    """A panel for each metric with a line for each method."""
    return [Panel(axis_label(name), [Line(label, own, name) for label, own in runs.items()], x) for name in names]


# --- a report's curves ----------------------------------------------------------------------------------------------


def run_curves(runs: Mapping[str, Metrics]) -> list[Curve]:
    """The curves of a report on runs by label, those for which there is data.

    Of one run, the metrics of one unit are lines of one panel; of several, each metric is a panel with a line a run.
    """
    seen = dict.fromkeys(name for metrics in runs.values() for m in metrics for name in m)
    first_of_unit = {quantity(name)[1]: name for name in reversed(seen) if name.startswith("eval/")}
    scores = [name for name in seen if name.startswith("eval/") and "@" not in name]
    if len(runs) > 1:  # the first of each unit: a panel for each would be many
        scores = [name for name in scores if name in first_of_unit.values()]
    specs = (CURVES[0], ("scores", "Scores of held-out examples", tuple(scores)), *CURVES[1:])
    made = [_curve(runs, *spec) for spec in specs]
    return [curve for curve in (*made, _time_curve(runs)) if curve]


def _curve(runs: Mapping[str, Metrics], name: str, title: str, metrics: Sequence[str]) -> Curve | None:
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
    return Curve(name, title, draw(panels, title), " ".join(told))


def _unit_panels(metrics: Metrics, names: Sequence[str]) -> list[Panel]:
    """A panel for each unit with a line for each metric; the axis alone names an only one."""
    by_unit: dict[str, list[str]] = {}
    for name in names:
        by_unit.setdefault(quantity(name)[1], []).append(name)
    return [
        Panel(
            axis_label(own[0]) if len(own) == 1 else SHARED_LABELS.get(unit, unit),
            [Line(quantity(name)[0] if len(names) > 1 else "", [metrics], name) for name in own],
        )
        for unit, own in by_unit.items()
    ]


def _told(metrics: Metrics, name: str) -> str:
    """How a metric moved, in words; from and to what in the mean, where the line is one."""
    what, unit = quantity(name)
    steps, values = series(metrics, name)
    gaps = [f"{step:.0f}" for step in steps[np.isnan(values)]]
    if len(gaps) == len(values):
        return f"{what} has no value"
    shown = smoothed(metrics, name)[1]
    kept = next(each[np.isfinite(each)] for each in (shown, values) if np.isfinite(each).any())
    share = unit == SHARE and not name.startswith("eval/")
    first, last = (percent(value) if share else number(value) for value in (kept[0], kept[-1]))
    way = "falls" if kept[-1] < kept[0] else "rises"
    words = f"{what} is {first}" if first == last else f"{what} {way} from {first} to {last}"
    if gaps:
        where = ", ".join(gaps[:5]) + (" …" if len(gaps) > 5 else "")
        words += f" ({len(gaps)} value{'s' * (len(gaps) > 1)} missing or not finite, at step {where})"
    return words


def _time_curve(runs: Mapping[str, Metrics]) -> Curve | None:
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
