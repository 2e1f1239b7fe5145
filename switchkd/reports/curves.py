"""Curves over training: what ``metrics.jsonl`` says, as lines, for a report of runs and for figures of methods.

A value that is missing or not finite is a gap in its line, and a point alone is a marker. A step that has not the metric at all
(it read data and generated nothing) is passed over.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from switchkd.base.terminal import decimals, duration, number, percent
from switchkd.decoding.rollouts import mean
from switchkd.reports.panels import (
    BY_POSITION,
    COLOURS,
    OWN,
    SHARE,
    Array,
    Line,
    Metrics,
    Panel,
    axis_label,
    band_of,
    draw,
    dress,
    has,
    legend,
    panel_notes,
    quantity,
    series,
    smoothed,
    unit_in,
)
from switchkd.reports.steps import SCORE, Steps, alike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


STAIRS = 60
WIDTH = 5  # inches of a curve in a page: the words in it can be read on a phone

# What an axis of several such metrics is called.
SHARED_LABELS = {SHARE: "percent", OWN: "divergence"}
# The curves of a report: name, title, metrics. (BY_POSITION stands for all bands that a run wrote.)
CURVES = (
    ("loss", "Loss", ("loss", "lm_loss")),
    (
        "divergence",
        "How far student and teacher disagree, by the place in the text",
        (BY_POSITION, "switch/threshold"),
    ),
    ("teacher_share", "Who wrote", ("switch/teacher_share", "switch/switched_share")),
    ("first_switch", "Where the teacher first took over", ("switch/first_switch",)),
    (
        "crossing",
        "What the two tokenizers share",
        ("cross/coverage", "cross/student_mass", "cross/teacher_mass"),
    ),
    (
        "agreement",
        "How often the two models agree, and how many tokens can so be guessed ahead",
        ("decode/agreement", "decode/block_length", "decode/kept_per_block"),
    ),
    ("speed", "Speed", ("tokens_per_second", "decode/tokens_per_second")),
    ("memory", "Memory", ("memory_gib",)),
)
# What has to be known of a metric by a person who meets it for the first time.
WORDS = {
    "cross/coverage": "Teacher and student cut text into different tokens, so that the two can be compared, and the student "
    "trained, at some of the student's tokens only: the first line is their share.",
    "cross/student_mass": "There they are compared on the tokens that both have. The probability of these should be near 100%: "
    "what is missing from it is not compared.",
}
# What a step's time is spent on, in words, and how strong each is drawn, so that they differ in grey too.
PARTS = {"generate": ("writing text", 0.95), "teacher": ("reading by the teacher", 0.7), "update": ("updating", 0.45)}


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


# --- values ---------------------------------------------------------------------------------------------------------


def metric_panels(runs: Mapping[str, Sequence[Steps]], names: Sequence[str], x: str = "step") -> list[Panel]:
    """A panel for each metric with a line for each method, or several where it is not measured alike in all runs."""
    panels = []
    for name in names:
        for group in alike(runs, name) or [{}]:
            unit = next((unit_in(run, name) for own in group.values() for run in own), "")
            lines = [Line(label, own, name) for label, own in group.items()]
            panels.append(Panel(axis_label(quantity(name)[0], unit), lines, x))
    return panels


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
    # Of several runs each metric is a panel: one for each band of positions would be many.
    bands = [name for name in seen if band_of(name)] if len(runs) == 1 else ["switch/divergence_mean"]
    specs = (CURVES[0], ("scores", "Scores of held-out examples", tuple(scores)), *CURVES[1:])
    made = [
        _curve(runs, place, title, [each for name in names for each in (bands if name == BY_POSITION else [name])])
        for place, title, names in specs
    ]
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
    return Curve(
        name,
        title,
        draw(panels, "", width=WIDTH),
        " ".join(part for part in (*told, *(WORDS.get(metric) for metric in drawn), notes) if part),
    )


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


def _told(metrics: Steps, name: str) -> str:
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
    places = decimals((kept[0], kept[-1]))
    first, last = (percent(v) if share else number(v, decimals=places) for v in (kept[0], kept[-1]))
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
    figure = Figure(figsize=(WIDTH, 1.1 + 2.1 * len(timed)), layout="constrained")
    told = []
    for axes, (label, metrics) in zip(figure.subplots(len(timed), squeeze=False).flat, timed.items(), strict=True):
        sums = _stack(axes, metrics)
        dress(axes, Panel(axis_label(f"{label}: time" if len(runs) > 1 else "time", "s"), ()))
        shares = ", ".join(
            f"{percent(share)} {part}" for (part, _), share in zip(PARTS.values(), sums / sums.sum(), strict=True)
        )
        told.append((f"{label}: " if len(runs) > 1 else "") + f"of {duration(sums.sum())}, {shares}.")
    told += [f"{label}: time has no value." for label in runs if label not in timed]
    grouped = max(len(group) for own in timed.values() for group in _groups(_timed(own)))
    note = f"Each bar is the mean of up to {grouped} steps." if grouped > 1 else ""
    legend(figure, note)
    return Curve("time", title, figure, " ".join([*told, *([note] if note else [])]))


def _timed(metrics: Metrics) -> Metrics:
    return [m for m in metrics if all(f"seconds/{part}" in m for part in PARTS)]


def _groups(own: Metrics) -> list[NDArray[np.intp]]:
    """The places of steps that are drawn as one bar."""
    return np.array_split(np.arange(len(own)), min(len(own), STAIRS))


def _stack(axes: Axes, metrics: Metrics) -> Array:
    """Draw each part on those below it, a stair a step or, of many steps, their mean; returns the seconds of each part."""
    own = _timed(metrics)
    parts = np.stack([series(own, f"seconds/{part}")[1] for part in PARTS])
    groups = _groups(own)
    edges = [own[group[0]]["step"] - 0.5 for group in groups] + [own[-1]["step"] + 0.5]
    below = np.zeros(len(groups))
    for colour, (part, alpha), values in zip(COLOURS, PARTS.values(), parts, strict=False):
        top = below + np.array([values[group].mean() for group in groups])
        axes.stairs(top, edges, baseline=below, fill=True, label=part, color=colour, alpha=alpha, linewidth=0)
        below = top
    return np.nansum(parts, axis=1)


# --- a figure inside the page -------------------------------------------------------------------------------------


def themed_svg(figure: Figure, summary: str) -> str:
    """The figure as SVG for an HTML page, light or dark, as wide as there is room, with ``summary`` as its title.

    Black becomes the colour of the page's text, white is left out. Ids carry a checksum, so that figures of one page do not meet.
    """
    import matplotlib

    drawn = io.StringIO()
    settings = {"svg.hashsalt": "switchkd", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    with matplotlib.rc_context(settings):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    prefix = f"f{hashlib.sha256((text + summary).encode()).hexdigest()[:10]}-"
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # the style sheet would reach the whole page
                parent.remove(child)
    for element in root.iter():
        _theme(element, prefix, used)
    title = ElementTree.Element("title")
    title.text = summary
    root.insert(0, title)
    box = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": root.attrib["viewBox"], "width": "100%"}
    root.attrib = {**box, "role": "img", "aria-label": summary, "fill": "currentColor", "stroke-linejoin": "round"}
    return ElementTree.tostring(root, encoding="unicode")


def _theme(element: ElementTree.Element, prefix: str, used: set[str]) -> None:
    """Take namespaces, white space, ids that nobody names, needless digits and fixed black and white from an element."""
    element.tag, element.tail = element.tag.split("}")[-1], None
    element.text = element.text if (element.text or "").strip() else None
    themed = {}
    for name, value in ((name.split("}")[-1], value) for name, value in element.attrib.items()):
        if name == "id":
            if value not in used:
                continue
            value = prefix + value
        elif name == "d":
            value = re.sub(r"(\.\d\d)\d+", r"\1", value).replace(" \n", " ")
        elif name in ("href", "clip-path"):
            value = value.replace("#", f"#{prefix}")
        elif name == "style":
            value = value.replace("#000000", "currentColor").replace("#ffffff", "none")
        themed[name] = value
    element.attrib = themed
