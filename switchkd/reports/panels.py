"""Panels of lines: what a metric is, in which unit, and how it is drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from switchkd.base.errors import DataError
from switchkd.base.plain import Lines
from switchkd.reports.steps import ELAPSED, SCORE, Steps, alike, differences

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Colours of Okabe and Ito (2008), told apart by colour-blind readers; line styles tell them apart in print.
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#767676"

# Steps that a curve of step metrics is averaged over; evaluations are drawn as they are.
SMOOTH = 9
POINTS = 400  # that a line has at most: more are not seen, and make a page heavy
# With those above, the ones of Okabe and Ito that can be read on white and on black; five colours and four styles
# make twenty looks.
COLOURS = (BLUE, VERMILLION, "#009E73", "#CC79A7", GREY)
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^v"


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


def unit_in(run: Steps, name: str) -> str:
    """The unit of a metric of this run."""
    unit = quantity(name)[1]
    return run.unit if unit == OWN else run.loss_unit if unit == LOSS else unit


def axis_label(what: str, unit: str) -> str:
    """What is drawn, with its unit, in lines that fit beside a panel."""
    kept_together = " (" + unit.replace(" ", "\xa0") + ")" if unit else ""
    return textwrap.fill(what + kept_together, 22, break_long_words=False).replace("\xa0", " ")


def smoothed(metrics: Steps, name: str) -> tuple[Array, Array]:
    """``series`` averaged over SMOOTH steps, gaps kept and left out of the means; evaluations and short runs as they are."""
    steps, values = series(metrics, name)
    if not _is_smoothed(metrics, name):
        return steps, values
    kept, middle = np.isfinite(values), slice(SMOOTH // 2, len(steps) - SMOOTH // 2)
    sums, counts = (np.convolve(each, np.ones(SMOOTH), "valid") for each in (np.where(kept, values, 0.0), kept))
    return steps[middle], np.where(kept[middle], sums / np.maximum(counts, 1), math.nan)


def _is_smoothed(metrics: Steps, name: str) -> bool:
    """Whether a line is of means: there are values enough for windows that hold more than one, and they are no means yet."""
    values = series(metrics, name)[1]
    return not name.startswith(SCORE) and metrics.steps_a_line == 1 and int(np.isfinite(values).sum()) >= 3 * SMOOTH


def together(runs: Sequence[Steps], name: str) -> tuple[Array, Array]:
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


def draw(panels: Sequence[Panel], title: str, columns: int = 1, note: str = "", width: float = 7) -> Figure:
    """The panels, row by row, in one figure with one legend; ``width`` is in inches.

    Over the legend stand their notes and ``note``, but where there is no title: a page has a caption for all of these.
    """
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(width, 1.1 + 2.1 * rows), layout="constrained")
    if title:
        figure.suptitle(plain(title), fontsize=11)
    labels = dict.fromkeys(line.label for panel in panels for line in panel.lines)
    looks = {label: look(place) for place, label in enumerate(labels)}  # the same in every panel
    grid = figure.subplots(rows, columns, squeeze=False, sharex="col", sharey="row")
    for axes, panel in zip(grid.flat, panels, strict=True):
        for line in panel.lines:
            _draw_line(axes, line, panel.x, looks[line.label])
        dress(axes, panel)
    for axes in grid.flat:
        axes.label_outer()
    legend(figure, " ".join(part for part in (panel_notes(panels), note) if part and title))
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


def dress(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_ylabel(plain(panel.label))
    axes.set_xlabel(quantity(panel.x)[0])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6 if panel.x == "step" else 4, integer=True))
    axes.xaxis.set_major_formatter("{x:,g}" if panel.x == ELAPSED else "{x:,.0f}")
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
        across = (
            figure.get_figwidth() * 4 / (max(map(len, found), default=0) / 3 + 4)
        )  # as many as stand beside each other
        columns = max(1, min(len(found), int(across), 3))
        figure.legend(
            found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9,
            handlelength=3, title=textwrap.fill(plain(note), int(14 * figure.get_figwidth())), title_fontsize=8,
        )  # fmt: skip


Metrics = Lines
Array = NDArray[np.float64]


# --- what a metric is, and its unit -------------------------------------------------------------------------------

SHARE = "%"

# In the place of a unit that depends on the run: that of its policy, and that of its objective.
OWN, LOSS = "policy's", "objective's"
BY_POSITION = "switch/divergence_"  # and a band of positions, such as 11-50
# What a metric is and its unit. Shares are from 0 to 1 and shown in percent.
QUANTITIES = {
    "loss": ("loss", LOSS),
    "lm_loss": ("language-modelling loss", "nats per token"),
    "switch/divergence_mean": ("mean divergence", OWN),
    "switch/threshold": ("threshold", OWN),
    "switch/teacher_share": ("tokens by the teacher", SHARE),
    "switch/switched_share": ("texts that the teacher had a part in", SHARE),
    "switch/first_switch": ("the teacher's first token", "tokens from the start"),
    "decode/agreement": ("agreement of the models", SHARE),
    "decode/block_length": ("tokens guessed ahead", "tokens"),
    "decode/kept_per_block": ("of these kept", "tokens"),
    "cross/coverage": ("tokens that are trained on", SHARE),
    "cross/student_mass": ("the student's probability of shared tokens", SHARE),
    "cross/teacher_mass": ("the teacher's probability of shared tokens", SHARE),
    "tokens_per_second": ("training speed", "tokens/s"),
    "decode/tokens_per_second": ("decoding speed", "tokens/s"),
    "memory_gib": ("memory", "GiB"),
    "step": ("training step", ""),
    "num_tokens": ("tokens learned from", ""),
    ELAPSED: ("seconds of training", ""),
}
SCORE_UNITS = {"forward_kl": "nats per token", "own_forward_kl": "nats per token", "perplexity": "", "length": "tokens"}


def quantity(name: str) -> tuple[str, str]:
    """What a metric is, in words, and its unit; "" where it has none, OWN or LOSS where it depends on the run."""
    if name.startswith(SCORE):
        score = name.removeprefix(SCORE)
        return score, SCORE_UNITS.get(score.split("@")[0], SHARE)
    if band := band_of(name):
        return f"divergence at positions {band}", OWN
    return QUANTITIES.get(name, (name, ""))


def band_of(name: str) -> str:
    """The band of positions that a metric is of, such as 11-50, under the name that the run gave it; "" for any other metric."""
    band = name.removeprefix(BY_POSITION)
    return band if band != name and band[:1].isdigit() else ""


def series(metrics: Metrics, name: str) -> tuple[Array, Array]:
    """The steps that have a metric, and its values; NaN where one is missing or not finite."""
    own = [m for m in metrics if name in m]
    values = np.array([math.nan if m[name] is None else m[name] for m in own], dtype=np.float64)
    return np.array([m["step"] for m in own], dtype=np.float64), np.where(np.isfinite(values), values, math.nan)


def has(metrics: Metrics, name: str) -> bool:
    """Whether there is a value to draw."""
    return bool(np.isfinite(series(metrics, name)[1]).any())


def panel_notes(panels: Sequence[Panel]) -> str:
    """What has to be known of lines: over how many steps they are averaged, what bands are, and why some stand apart."""
    lines = [line for panel in panels for line in panel.lines]
    drawn = [(line, run) for line in lines for run in line.runs if has(run, line.name)]
    means = {_is_smoothed(run, line.name) for line, run in drawn}
    which = "Lines" if means == {True} else f"Lines of {3 * SMOOTH} values and more"
    notes = [f"{which}: each point is the mean of the values of {SMOOTH} neighbouring steps."] if True in means else []
    stretches = {run.steps_a_line for line, run in drawn if not line.name.startswith(SCORE)} - {1}
    if stretches:
        notes.append(f"Each point is the mean of {' or '.join(map(str, sorted(stretches)))} steps.")
    if any(len(line.runs) == 1 and _is_smoothed(run, line.name) for line, run in drawn):
        notes.append("Faint: the values themselves.")
    if any(len(series(run, line.name)[0]) > POINTS for line, run in drawn):
        notes.append(
            f"Of more than {POINTS} points the lowest and the highest of each of {POINTS // 3} stretches are drawn."
        )
    if any(sum(has(run, line.name) for run in line.runs) > 1 for line in lines):
        notes.append("Lines: means over a method's runs; bands: their range.")
    by_metric: dict[tuple[str, str], list[dict[str, Sequence[Steps]]]] = {}
    for panel in panels:
        for name in dict.fromkeys(line.name for line in panel.lines):
            own = {line.label: line.runs for line in panel.lines if line.name == name}
            by_metric.setdefault((name, panel.x), []).append(own)
    apart: dict[str, dict[str, None]] = {}  # what is told apart, by the reason
    for (name, _), groups in by_metric.items():
        for other in groups[1:]:
            apart.setdefault(_apart(groups[0], other, name), {})[quantity(name)[0]] = None
    notes += [
        f"Not measured alike, so in panels of their own ({', '.join(names)}): {why}." for why, names in apart.items()
    ]
    return " ".join(notes)


def _apart(group: Mapping[str, Sequence[Steps]], other: Mapping[str, Sequence[Steps]], name: str) -> str:
    """Why a metric of two groups of runs cannot be compared."""
    (first, *_), (second, *_) = next(iter(group.values())), next(iter(other.values()))
    return f"in {second.name}, {'; '.join(differences(first, second, name))} as in {first.name}"
