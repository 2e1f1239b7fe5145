"""A comparison as people read it: tables, a page of Markdown, JSON and a plot."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from switchkd.base.storage import write_output
from switchkd.base.terminal import console, decimals, number, percent
from switchkd.evaluation.results import FORMAT
from switchkd.evaluation.scores import SCORES
from switchkd.evaluation.statistics import FEW_EXAMPLES, RESAMPLES, Estimate, lower_is_better
from switchkd.reports.compare import FEW_RUNS, Comparison, Difference, Method, Row
from switchkd.reports.panels import BLUE, GREY, VERMILLION, axis_label, quantity
from switchkd.reports.steps import SCORE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from switchkd.evaluation.results import Evaluation


LINES = {"teacher": (VERMILLION, "--"), "student before": (GREY, ":")}
FEW, CONSTANT = "†", "‡"  # mark a score over few examples, and one that is the same on all


class Sheet(NamedTuple):
    """A table of text."""

    title: str
    header: list[str]
    rows: list[list[str]]


def sheets(comparison: Comparison) -> list[Sheet]:
    """A table for each score, and one of all pairs in the first."""
    tables = [_score_sheet(comparison, name, rows) for name, rows in comparison.scores.items()]
    return [tables[0], _pair_sheet(comparison), *tables[1:]] if comparison.pairs else tables


def _score_sheet(comparison: Comparison, name: str, rows: Sequence[Row]) -> Sheet:
    header = ["model", "runs", "mean ± std [95 % interval]", "n", f"difference to {comparison.baseline}", "verdict"]
    return Sheet(f"{name} ({direction(name)})", header, [_cells(row, comparison.baseline) for row in rows])


def _cells(row: Row, baseline: str) -> list[str]:
    scored = row.estimate
    runs = "" if row.method.reference else str(len(row.method.models))
    cells = [row.method.label, runs, estimate_text(scored, none=" [-]", mark=""), f"{scored.examples}{_mark(row)}"]
    if row.difference is None:
        return [*cells, "", "baseline" if row.method.label == baseline else ""]
    gap = row.difference.estimate
    return [*cells, difference_text(gap), row.difference.verdict + _few(gap)]


def _pair_sheet(comparison: Comparison) -> Sheet:
    labels = list(dict.fromkeys(label for pair in comparison.pairs for label in pair))
    rows = [[a, *("" if a == b else _pair(comparison.pairs[a, b]) for b in labels)] for a in labels]
    title = f"{comparison.main_score}, row less column; no word where the two are not distinguishable"
    return Sheet(title, ["", *labels], rows)


def _pair(difference: Difference) -> str:
    word = "" if difference.verdict == "not distinguishable" else f" {difference.verdict}"
    return signed(difference.estimate.mean) + word + _few(difference.estimate)


def signed(value: float, places: int | None = None) -> str:
    """A difference with its sign, to so many decimal ``places`` if given; 0 has no sign."""
    sign = "+" if value > 0 else "−" if value < 0 else ""
    return sign + number(abs(value), decimals=places)


def difference_text(gap: Estimate, none: str = " [-]") -> str:
    """A difference with its sign and its 95 % interval, or ``none`` where there is none."""
    places = decimals((gap.mean, gap.low, gap.high))
    if gap.low is None or gap.high is None:
        return signed(gap.mean, places) + none
    return f"{signed(gap.mean, places)} [{signed(gap.low, places)}, {signed(gap.high, places)}]"


# What scores are in words; of those that are missing `evaluation.scores` says it.
WORDS = {
    "forward_kl": "how far the model's probabilities for the next token lie from the teacher's, on the reference answers "
    "(Kullback-Leibler divergence; 0: they are the same)",
    "own_forward_kl": "the same on the answers that the model wrote itself",
    "perplexity": "how surprised the model is by the reference answers: among so many equally likely tokens it seems to choose",
    "length": "how long the answers are",
    "eos": "answers that came to their end before the limit",
    "rouge_l": "ROUGE-L: how much of the reference answer's wording stands in the answer, in the same order",
    "strict": "right answers: the number behind #### is the reference's",
    "flexible": "right answers: the last number is the reference's",
    "accuracy": "right answers, as GSM-Plus's authors extract them",
    "math_equal": "right answers: the result equals the reference's, also if it is written otherwise",
    "exact_match": "answers that are the reference's, but for case and punctuation",
}


def score_words(name: str) -> str:
    """What a score is, in words for a person who meets it for the first time."""
    base, _, band = name.partition("@")
    words = WORDS.get(base) or SCORES.get(base, base)
    return words + (f", at tokens {band} of the answer" if band else "")


def direction(name: str) -> str:
    """Which end of a score is the better one, in words."""
    return {True: "lower is better", False: "higher is better", None: "neither end is better"}[lower_is_better(name)]


def _mark(row: Row) -> str:
    low, high = row.estimate.low, row.estimate.high
    constant = low is not None and high is not None and math.isclose(low, high, rel_tol=1e-9)
    return _few(row.estimate) + (CONSTANT if constant else "")


def _few(estimate: Estimate) -> str:
    return FEW if estimate.few else ""


def notes(comparison: Comparison) -> list[str]:
    """What a reader has to know of the figures, as sentences."""
    rows = [row for table in comparison.scores.values() for row in table]
    runs = {len(row.method.models) for row in rows if not row.method.reference}
    lines = [
        f"Intervals are 95 %: percentiles of {RESAMPLES} bootstrap resamples of the examples. Differences are paired, example by "
        "example. Verdicts are per pair and not corrected for many comparisons: of twenty pairs without a difference, one is "
        "expected to look different.",
    ]
    if any(row.estimate.std is not None for row in rows):
        lines.append(
            "± is the standard deviation over training runs where a method has several, else over sampling seeds."
        )
    if 1 in runs:
        lines.append(
            "Where a method has one run, its interval says nothing of other training seeds, and the verdict is about this student, "
            "not about the method."
        )
    if any(1 < count < FEW_RUNS for count in runs):
        lines.append(
            f"Where a method has several runs, they are resampled too; with fewer than {FEW_RUNS} the interval is a rough "
            "estimate, and wide."
        )
    if any(FEW in _mark(row) for row in rows):
        lines.append(f"{FEW} fewer than {FEW_EXAMPLES} examples: the interval is unreliable.")
    if any(CONSTANT in _mark(row) for row in rows):
        lines.append(
            f"{CONSTANT} all examples have one value, so that resampling shows no spread and the interval has no width; a rate "
            "seen 0 times in n examples may still be up to 3/n."
        )
    return lines


def heading(comparison: Comparison) -> list[str]:
    """What was compared, in lines: task, data and settings."""
    task, data = comparison.task, comparison.data
    settings = ", ".join(f"{name} {value}" for name, value in comparison.settings.items())
    return [
        f"{task['name']} (version {task['version']}): {len(data['ids'])} examples of {data['file']}, sha256 {data['sha256'][:12]}",
        f"settings: {settings}",
    ]


def rich_table(sheet: Sheet) -> Table:
    """A sheet for the terminal."""
    table = Table(title=sheet.title, title_justify="left")
    for place, name in enumerate(sheet.header):
        table.add_column(name, overflow="fold", justify="left" if place == 0 else "right")
    for row in sheet.rows:
        table.add_row(*row)
    return table


def markdown(comparison: Comparison, picture: str = "compare.svg") -> str:
    """The comparison as a page, which shows the ``picture``."""
    task, *settings = heading(comparison)
    parts = [f"# Comparison on {task}", *settings, f"![The methods, best first]({picture})"]
    for title, header, rows in sheets(comparison):
        parts += [f"## {title}", markdown_table(header, rows)]
    return "\n\n".join([*parts, *notes(comparison)]) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown, the first ``left`` columns of text, the others of numbers."""
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Every figure of the comparison, unrounded, and where it is from."""
    return {
        "format": FORMAT,
        "task": comparison.task,
        "data": {
            "file": comparison.data["file"],
            "sha256": comparison.data["sha256"],
            "examples": len(comparison.data["ids"]),
        },
        "settings": comparison.settings,
        "baseline": comparison.baseline,
        "scores": {
            name: {"lower_is_better": lower_is_better(name), "rows": [_row_json(row) for row in rows]}
            for name, rows in comparison.scores.items()
        },
        "pairs": [
            {"score": comparison.main_score, "of": a, "less": b, **_difference_json(difference)}
            for (a, b), difference in comparison.pairs.items()
        ],
        "notes": notes(comparison),
    }


def _row_json(row: Row) -> dict[str, Any]:
    method: Method = row.method
    return {
        "label": method.label,
        "files": list(method.paths),
        "seeds": [] if method.reference else list(method.models),
        **row.estimate.to_json(),
        "few_examples": row.estimate.few,
        "difference": row.difference and _difference_json(row.difference),
    }


def _difference_json(difference: Difference) -> dict[str, Any]:
    return {**difference.estimate.to_json(), "verdict": difference.verdict}


def plot(comparison: Comparison) -> Figure:
    """The methods' first score with intervals, best on top; teacher and untrained student as lines."""
    from matplotlib.figure import Figure

    name, rows = comparison.main_score, comparison.scores[comparison.main_score]
    methods = [row for row in rows if not row.method.reference and math.isfinite(row.estimate.mean)]
    methods.sort(key=lambda row: row.estimate.mean, reverse=bool(lower_is_better(name)))
    figure = Figure(figsize=(6.4, 1.4 + 0.36 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(methods):
        scored = row.estimate
        few = scored.few
        if scored.low is not None and scored.high is not None:
            axes.hlines(place, scored.low, scored.high, color=BLUE, linewidth=2)
        axes.plot(scored.mean, place, "o", color=BLUE, markerfacecolor="white" if few else BLUE, markersize=7, zorder=3)
    for row in rows:
        role = next((role for role in LINES if row.method.label.startswith(role)), None)
        if row.method.reference and role and math.isfinite(row.estimate.mean):
            colour, style = LINES[role]
            axes.axvline(
                row.estimate.mean, color=colour, linestyle=style, linewidth=1.5, label=row.method.label, zorder=1
            )
    axes.set_yticks(range(len(methods)), [_tick(row) for row in methods])
    axes.set_ylim(-0.6, len(methods) - 0.4)
    marks = {mark for row in methods for mark in _mark(row)}
    explained = {
        FEW: f"{FEW} hollow: fewer than {FEW_EXAMPLES} examples",
        CONSTANT: f"{CONSTANT} all examples have one value",
    }
    what = ", ".join([axis_label(*quantity(SCORE + name)).replace("\n", " "), direction(name)])
    axes.set_xlabel("\n".join([what, *(explained[mark] for mark in sorted(marks))]))
    counts = sorted({row.estimate.examples for row in methods})
    shown = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "0"
    axes.set_title(
        f"{comparison.task['name']}: mean and 95 % bootstrap interval, {shown} examples", loc="left", fontsize=10
    )
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    return figure


def _tick(row: Row) -> str:
    runs = len(row.method.models)
    return row.method.label + (f" ({runs} runs)" if runs > 1 else "") + _mark(row)


def show(comparison: Comparison) -> None:
    """Print the comparison: what was compared, the tables, and what one has to know of them."""
    for line in heading(comparison):
        console.print(line, soft_wrap=True)
    for sheet in sheets(comparison):
        console.print(rich_table(sheet))
    for line in notes(comparison):
        console.print(line)


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write compare.md, compare.json, compare.svg and compare.png into ``folder``; returns their paths."""
    page, record = folder / "compare.md", folder / "compare.json"
    pictures = save_figure(plot(comparison), folder / "compare")
    write_output(page, markdown(comparison))
    write_output(record, json.dumps(to_json(comparison), indent=1, allow_nan=False) + "\n")
    return [page, record, *pictures]


def save_figure(figure: Figure, target: Path) -> list[Path]:
    """Write a figure as ``target``.svg and .png; equal figures give equal files."""
    import matplotlib

    pictures = [target.with_name(f"{target.name}.{form}") for form in ("svg", "png")]
    with matplotlib.rc_context({"svg.hashsalt": "switchkd", "svg.fonttype": "none"}):
        for picture in pictures:
            form = picture.suffix.removeprefix(".")
            drawn = io.BytesIO()
            figure.savefig(drawn, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
            write_output(picture, drawn.getvalue())
    return pictures


# --- scores and steps in a terminal -------------------------------------------------------------------------------


def step_line(metrics: dict[str, Any]) -> str:
    """One training step in a line: loss, tokens per second and, where text was generated, who spoke."""
    parts = [f"loss {number(metrics['loss'], 4)}", f"{number(metrics['tokens_per_second'], 2)} tokens/s"]
    if "switch/teacher_share" in metrics:
        parts.append(f"teacher {percent(metrics['switch/teacher_share'])}")
        if metrics["switch/divergence_mean"] is not None:
            parts.append(f"divergence {number(metrics['switch/divergence_mean'], 2)}")
    else:
        parts.append(metrics["source"])
    return " · ".join(parts)


def scores_line(metrics: dict[str, Any], primary: str) -> str:
    """The main scores of a step after which the student was evaluated; "" for another."""
    names = [name for name in (primary, "forward_kl", "perplexity") if metrics.get(f"eval/{name}") is not None]
    return " · ".join(f"{name} {number(metrics[f'eval/{name}'])}" for name in names)


def print_results(results: Mapping[str, Evaluation], settings: Mapping[str, Any]) -> None:
    """Scores of some models side by side, by group where there are groups, and every setting that they depend on."""
    console.print(score_table(results))
    some = next(iter(results.values()))
    if some.by_group:
        columns = {name: result.by_group for name, result in results.items()}
        console.print(_score_columns(f"{some.primary} by group", columns, list(some.by_group)))
    for name, result in results.items():
        for band, found in result.length_correlation.items():
            console.print(
                f"{name}: Spearman correlation of ROUGE-L with the divergence on its own text, {band} tokens: "
                f"{number(found['spearman'])} (over {found['completions']} completions)", soft_wrap=True,
            )  # fmt: skip
    given = "; ".join(f"{name} {value}" for name, value in settings.items())
    console.print(f"settings: {given}", style="dim", soft_wrap=True)


def score_table(results: Mapping[str, Evaluation]) -> Table:
    """Every score, a row each, of some models, a column each: mean, deviation over seeds, 95 % interval."""
    some = next(iter(results.values()))
    names = [some.primary, *(name for name in some.scores if name != some.primary)]
    examples = some.scores[some.primary].values.shape[1]
    return _score_columns(
        f"{examples} held-out examples", {name: result.summary for name, result in results.items()}, names
    )


def _score_columns(title: str, columns: Mapping[str, Mapping[str, Estimate]], rows: Sequence[str]) -> Table:
    """Estimates as a table. Those over few examples carry a mark, which a caption explains."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("score", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    shown = [found[row] for row in rows for found in columns.values()]
    for row in rows:
        table.add_row(row, *(estimate_text(found[row]) for found in columns.values()))
    if any(estimate.few for estimate in shown):
        table.caption = f"{FEW} over fewer than {FEW_EXAMPLES} examples"
    return table


def estimate_text(estimate: Estimate, none: str = "", mark: str = FEW) -> str:
    """Mean ± deviation over seeds where there are several, ``mark`` if over few examples, and the 95 % interval or ``none``."""
    mean, low, high = estimate.mean, estimate.low, estimate.high
    places = decimals((mean, low, high))
    deviation = "" if estimate.std is None else f" ± {number(estimate.std)}"
    interval = none
    if low is not None and high is not None:
        interval = f" [{number(low, decimals=places)}, {number(high, decimals=places)}]"
    return f"{number(mean, decimals=places)}{deviation}{mark if estimate.few else ''}{interval}"
