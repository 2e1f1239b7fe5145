"""``switchkd report``: runs as one HTML page that loads nothing from elsewhere.

Everything that is not ours enters the page escaped: by the template's autoescaping, and in the viewer's data, which is JSON
without a ``<``, as text. The page's security policy names the one script by its hash, so that no other could run.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import yaml

from switchkd.base.plain import Lines
from switchkd.base.terminal import number, percent
from switchkd.decoding.rollouts import mean
from switchkd.evaluation.results import Evaluation
from switchkd.evaluation.statistics import Estimate, difference, lower_is_better, verdict
from switchkd.reports.compare import MAY_DIFFER, TEACHER
from switchkd.reports.curves import PARTS, cost, run_curves
from switchkd.reports.record import RunRecord, labels
from switchkd.reports.steps import is_to_teacher, settings_text, shipped_rule
from switchkd.reports.tables import Sheet, estimate_text, signed
from switchkd.reports.viewer import payload

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FOR_TEXTS = 3_500_000  # bytes for the viewer; scores and curves take about a fifth of that
BEFORE, AFTER = "student before", "student after"


def page(paths: Sequence[Path], progress: Callable[[str], None] = lambda part: None) -> str:
    """The report of the run directories ``paths`` as HTML, whatever their state; tells ``progress`` of each part.

    Raises ConfigError for a folder that is no run, DataError for one with damaged records.
    """
    from jinja2 import Environment, StrictUndefined

    assets = files("switchkd") / "reports" / "assets"
    script = (assets / "report.js").read_text(encoding="utf-8")
    runs = []
    for path in paths:
        progress(f"read {path}")
        runs.append(RunRecord.read(path))
    names = labels(paths)
    texts = []
    for run, name in zip(runs, names, strict=True):
        progress(f"texts of {name}")
        texts.append(payload(run, name, FOR_TEXTS // len(runs)))
    progress("scores and curves")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        (assets / "report.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        title=f"switchkd report: {', '.join(names)}",
        version=version("switchkd"),
        style=(assets / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=_hash(script),
        runs=[_head(run, name, f"{name}: " if len(runs) > 1 else "") for run, name in zip(runs, names, strict=True)],
        summary=_summary(runs),
        scores=_score_sheets(runs, names),
        scores_note="Means with 95 % bootstrap intervals over the examples; † over few examples, where an interval is "
        "unreliable; - over none.",
        curves=_curves(runs, names),
        has_rollouts=any(each["prompts"] or each["texts"] for each in texts),
        data=_script_json([each for each in texts if each["prompts"] or each["texts"]]),
    )


def _hash(script: str) -> str:
    """As the security policy names an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _script_json(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _head(run: RunRecord, label: str, prefix: str) -> dict[str, Any]:
    bad = (f"{name} is not finite at {_steps(steps)}" for name, steps in run.not_finite.items())
    return {
        "label": label,
        "path": str(run.path),
        "state": run.state,
        "warnings": [*bad, *run.notes],
        "improved": improvements(run, prefix),
        "settings": yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True),
    }


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:5])) + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")
    return f"step{'s' if len(steps) > 1 else ''} {shown}"


# --- what improved, and what it cost --------------------------------------------------------------------------------


def improvements(run: RunRecord, label: str = "") -> list[str]:
    """What training did to the scores that were taken before and after, a sentence each, which begins with ``label``."""
    found = run.evaluations.get("evaluation", {})
    if BEFORE not in found or AFTER not in found:
        return []
    before, after = found[BEFORE], found[AFTER]
    sentences = []
    for name in dict.fromkeys([after.primary, "forward_kl"]):
        if name not in before.scores or name not in after.scores:
            continue
        gap = difference(name, after.scores[name], before.scores[name])
        interval = "" if gap.low is None or gap.high is None else f" [{signed(gap.low)}, {signed(gap.high)}]"
        old, new = (each.summary[name] for each in (before, after))
        sentences.append(
            f"{label}{name} {number(old.mean)} before, {number(new.mean)} after: {signed(gap.mean)}{interval}, "
            f"{verdict(gap, lower_is_better(name))}."
        )
    return sentences


def _summary(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Rows of the summary: a name and a cell for each run. Rows in which every cell is empty are left out."""
    columns = [_facts(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name, "") for column in columns]) for name in names]
    return [(name, cells) for name, cells in rows if any(cells)]


def _facts(run: RunRecord) -> dict[str, str]:
    settings, mix = run.settings, shipped_rule(run.settings, "mix")
    return {
        "method": settings["method"],
        "who writes": settings_text(settings, "policy") if mix is None or mix.generates else "",
        "what is trained": settings_text(settings, "objective"),
        "on which text": settings_text(settings, "mix"),
        "teacher": ", ".join([settings["teacher_model_name_or_path"], *settings["teachers"].values()]),
        "student": settings["student_model_name_or_path"],
        "trained on": ", ".join([read] if isinstance(read := settings["train_file"], str) else read),
        "seed": str(settings["seed"]),
        **_cost(run.metrics),
    }


def _cost(metrics: Lines) -> dict[str, str]:
    if not metrics:
        return {}
    taken = cost(metrics)
    spent = {part: sum(line.get(f"seconds/{part}", 0.0) for line in metrics) for part in PARTS}
    split = (
        ", ".join(f"{part} {percent(s / taken['seconds'])}" for part, s in spent.items()) if taken["seconds"] else ""
    )
    forwards = mean(_numbers(metrics, "decode/teacher_forwards_per_token"))
    memory = max(_numbers(metrics, "memory_gib"), default=math.nan)
    share = taken["teacher share"]
    return {
        "steps": f"{taken['steps']}",
        "response tokens trained on": f"{taken['tokens']:,}",
        "time without evaluation": f"{_time(taken['seconds'])} ({split})",
        "teacher's share of the generated tokens": "" if math.isnan(share) else percent(share),
        "teacher forwards per generated token": "" if math.isnan(forwards) else number(forwards),
        "most memory": "" if math.isnan(memory) else f"{number(memory)} GiB",
    }


def _numbers(metrics: Lines, name: str) -> list[float]:
    return [line[name] for line in metrics if line.get(name) is not None]


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


# --- scores ---------------------------------------------------------------------------------------------------------


def _score_sheets(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Sheet]:
    """A table for each evaluation file that the runs have, and one by group where its examples have groups."""
    sheets = []
    for file in dict.fromkeys(file for run in runs for file in run.evaluations):
        for columns in _alike(_columns(file, runs, names)):
            first = next(iter(columns.values()))
            title = file.removeprefix("evaluation").removeprefix("-") or "In the run"
            sheets.append(_sheet(title, columns, _score_rows(columns)))
            if first.by_group:
                rows = {
                    g: {name: r.by_group[g] for name, r in columns.items() if g in r.by_group} for g in first.by_group
                }
                sheets.append(_sheet(f"{title}: {first.primary} by group", columns, rows))
    return sheets


def _score_rows(columns: Mapping[str, Evaluation]) -> dict[str, dict[str, Estimate]]:
    """The scores by name, each by column; divergences to several teachers have a row for each of these."""
    rows: dict[str, dict[str, Estimate]] = {}
    several = len({result.made_with.get(TEACHER) for result in columns.values()}) > 1
    names = dict.fromkeys(name for result in columns.values() for name in result.scores)
    for name, (column, result) in product(names, columns.items()):
        if name in result.scores:
            apart = f" (teacher {str(result.made_with.get(TEACHER))[:8]})" if several and is_to_teacher(name) else ""
            rows.setdefault(name + apart, {})[column] = result.summary[name]
    return rows


def _alike(columns: Mapping[str, Evaluation]) -> list[dict[str, Evaluation]]:
    """The columns that may stand side by side: of one task, data and settings, but for those that may differ."""
    groups: dict[str, dict[str, Evaluation]] = {}
    for name, result in columns.items():
        made_with = {key: value for key, value in result.made_with.items() if key not in MAY_DIFFER}
        groups.setdefault(json.dumps(made_with, sort_keys=True), {})[name] = result
    return list(groups.values())


def _columns(file: str, runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, Evaluation]:
    several = len(runs) > 1
    return {
        f"{name}: {model}" if several else model: result
        for run, name in zip(runs, names, strict=True)
        for model, result in run.evaluations.get(file, {}).items()
    }


def _sheet(title: str, columns: Mapping[str, Evaluation], rows: Mapping[str, Mapping[str, Estimate]]) -> Sheet:
    cells = [
        [row, *(estimate_text(own[model]) if model in own else "–" for model in columns)] for row, own in rows.items()
    ]
    return Sheet(title, ["score", *columns], cells)


def _curves(runs: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, str]]:
    """The curves of training of those runs that have any."""
    metrics = {name: run.metrics for run, name in zip(runs, names, strict=True) if run.metrics}
    return [
        {"title": curve.title, "summary": curve.summary, "svg": themed_svg(curve.figure, curve.summary)}
        for curve in run_curves(metrics)
    ]


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
