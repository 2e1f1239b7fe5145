"""``switchkd report``: runs as one HTML page that loads nothing from elsewhere. It begins with what training did, and ends with
the settings.

Everything that is not ours enters the page escaped: by the template's autoescaping, and in the viewer's data, which is JSON
without a ``<``, as text. The page's security policy names the one script by its hash, so that no other could run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from switchkd.base.errors import ModelError
from switchkd.base.plain import Lines
from switchkd.base.terminal import duration, number, percent
from switchkd.decoding.rollouts import mean
from switchkd.evaluation.results import Evaluation
from switchkd.evaluation.statistics import Estimate, difference, gap_closed, lower_is_better, verdict
from switchkd.reports.curves import PARTS, cost, run_curves, themed_svg
from switchkd.reports.panels import quantity
from switchkd.reports.record import RunRecord, labels
from switchkd.reports.steps import SCORE, TEACHER, is_to_teacher, rule_words, settings_text, shipped_rule, unlike
from switchkd.reports.tables import Sheet, difference_text, direction, estimate_text, score_words
from switchkd.reports.viewer import answers, payload

# Bytes for the viewer and the answers; scores and curves take about a fifth.
FOR_TEXTS, FOR_ANSWERS = 3_500_000, 600_000
MODELS = {"student before": "Student before training", "student after": "Student after training", "teacher": "Teacher"}
BEFORE, AFTER, JUDGE = MODELS
MISSING = "–"
WORDS = (
    "Here the two cut text into different tokens and take turns by words: a word ends where a token ends for both, one of them "
    "writes it whole, and the other reads it in its own tokens."
)


def page(paths: Sequence[Path], progress: Callable[[str], None] = lambda part: None) -> str:
    """The report of the run directories ``paths`` as HTML, whatever their state; tells ``progress`` of each part.

    Raises ConfigError for a folder that is no run, DataError for one with damaged records.
    """
    script = asset("report.js")
    runs = []
    for path in paths:
        progress(f"read {path}")
        runs.append(RunRecord.read(path))
    names = labels(paths)
    told, texts, found = [], [], {name: measures(run) for run, name in zip(runs, names, strict=True)}
    for run, name in zip(runs, names, strict=True):
        progress(f"texts of {name}")
        by = next((m.name for m in found[name] if m.closed is not None), "")
        told.append(answers(run.evaluations.get("evaluation", {}), name, list(MODELS), by, FOR_ANSWERS // len(runs)))
        texts.append(payload(run, name, FOR_TEXTS // len(runs)))
    progress("scores and curves")
    data = {
        "answers": [each for each in told if each["items"]],
        "texts": [each for each in texts if each["prompts"] or each["texts"]],
    }
    sheets = _score_sheets(runs, names)
    return rendered(
        "report.html.j2",
        title=f"switchkd report: {', '.join(names)}",
        script=script,
        script_hash=_hash(script),
        runs=[_head(run, name, found[name]) for run, name in zip(runs, names, strict=True)],
        model_names=MODELS,
        gains=_gains(runs, found) if len(runs) > 1 else [],
        costs=_side_by_side([dict(_cost(run)) for run in runs]),
        first=_first_answer(data["answers"]),
        summary=_side_by_side([_facts(run) for run in runs]),
        scores=sheets,
        score_words=_words(runs),
        curves=_curves(runs, names),
        has_answers=bool(data["answers"]),
        unit="word" if all(run.two_tokenizers for run in runs) else "token",
        has_texts=bool(data["texts"]),
        data=_script_json(data),
    )


def rendered(template: str, **values: Any) -> str:
    """A page from a template of ours, with the one style sheet. What is given enters it escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.from_string(asset(template))
    return page.render(version=version("switchkd"), style=asset("report.css"), **values)


def asset(name: str) -> str:
    """The text of a file that pages are made from."""
    return (files("switchkd") / "reports" / "assets" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """As the security policy names an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _script_json(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _head(run: RunRecord, label: str, found: Sequence[Measure]) -> dict[str, Any]:
    bad = (f"{name} is not finite at {_steps(steps)}" for name, steps in run.not_finite.items())
    return {
        "label": label,
        "path": str(run.path),
        "state": run.state,
        "warnings": [*bad, *run.notes],
        "measures": found,
        "rule": " ".join(part for part in (rule_words(run.settings), WORDS if run.two_tokenizers else "") if part),
        "settings": yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True),
    }


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:5])) + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")
    return f"step{'s' if len(steps) > 1 else ''} {shown}"


# --- what training did, and what it cost ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A score before and after training, and the teacher's: what each is ("" where it was not taken), and what it says."""

    name: str
    what: str
    unit: str
    values: dict[str, str]
    sentence: str
    closed: float | None

    @property
    def width(self) -> float:
        """The share of the gap that is closed, in percent, as wide as a bar may be."""
        return 100 * min(max(self.closed or 0.0, 0.0), 1.0)


def measures(run: RunRecord) -> list[Measure]:
    """What training did to the main score; to another one where the main score cannot tell the models apart; and to the
    divergence from the teacher. None of a run that was not scored before and after."""
    found = run.evaluations.get("evaluation", {})
    if BEFORE not in found or AFTER not in found:
        return []
    after = found[AFTER]
    others = [n for n in after.scores if "@" not in n and n != "perplexity" and lower_is_better(n) is False]
    main = _measure(after.primary, found)
    second = [] if main.closed is not None else [_measure(name, found) for name in others if name != after.primary]
    told_apart = [measure for measure in second if measure.closed is not None][:1]
    to_teacher = [_measure("forward_kl", found)] if "forward_kl" in found[BEFORE].scores and JUDGE in found else []
    return [main, *told_apart, *(m for m in to_teacher if m.name != main.name)]


def _measure(name: str, found: Mapping[str, Evaluation]) -> Measure:
    own = {model: found[model] for model in MODELS if model in found and name in found[model].scores}
    values = {model: estimate_text(own[model].summary[name]) if model in own else "" for model in MODELS}
    scores = {model: result.scores[name] for model, result in own.items()}
    what, unit = score_words(name), quantity(SCORE + name)[1]
    if not {BEFORE, AFTER} <= own.keys():
        return Measure(name, what, unit, values, "It was not taken before and after.", None)
    if len({float(value) for each in scores.values() for value in each.values.flat}) == 1:
        alone = {model: number(own[model].summary[name].mean) if model in own else "" for model in MODELS}
        return Measure(
            name, what, unit, alone, "It is the same on every question for every model: here it says nothing.", None
        )
    change = difference(name, scores[AFTER], scores[BEFORE])
    told = verdict(change, lower_is_better(name))
    words = {
        "better": "The student became better",
        "worse": "The student became worse",
        "not distinguishable": "No change can be told from chance",
    }.get(told, f"The score became {told}")
    sentence = f"{words}: {difference_text(change, '')}. "
    share = gap_closed(name, scores[BEFORE], scores[AFTER], scores[JUDGE]) if JUDGE in own else None
    if share is not None:
        low, high = (MISSING if end is None else percent(end) for end in (share.low, share.high))
        sentence += f"{percent(share.mean)} of the gap to the teacher is closed (95 % interval: {low} to {high})."
    elif JUDGE in own:
        sentence += (
            "By this score the teacher is not measurably better than the untrained student: there is no gap to close."
        )
    return Measure(name, what, unit, values, sentence, None if share is None else share.mean)


def _gains(runs: Sequence[RunRecord], found: Mapping[str, Sequence[Measure]]) -> list[dict[str, Any]]:
    """What training did, a table a score with a row a run; runs that ``switchkd compare`` would refuse have tables of their own."""
    tables: list[dict[str, Any]] = []
    own = {name: {m.name: m for m in each} for name, each in found.items()}
    after = {n: run.evaluations.get("evaluation", {}).get(AFTER) for n, run in zip(found, runs, strict=True)}
    for measure in dict.fromkeys(m.name for each in found.values() for m in each):
        columns = {name: result for name, result in after.items() if measure in own[name] and result is not None}
        for group, why in _alike(columns, is_to_teacher(measure)):
            rows = [
                [n, *(v or MISSING for v in m.values.values()), MISSING if m.closed is None else percent(m.closed)]
                for n, m in ((name, own[name][measure]) for name in group)
            ]
            tables.append({"title": measure + why, "what": score_words(measure), "rows": rows})
    return tables


def _cost(run: RunRecord) -> list[tuple[str, str]]:
    """What a run took: a name and a value each."""
    metrics = run.metrics
    if not metrics:
        return []
    taken = cost(metrics)
    spent = {part: sum(line.get(f"seconds/{part}", 0.0) for line in metrics) for part in PARTS}
    shares = {PARTS[part][0]: s / taken["seconds"] for part, s in spent.items() if taken["seconds"]}
    split = ", ".join(f"{part} {percent(share)}" for part, share in shares.items() if share >= 0.005)
    sources = Counter(line.get("source", "") for line in metrics)
    forwards = mean(_numbers(metrics, "decode/teacher_forwards_per_token"))
    memory = max(_numbers(metrics, "memory_gib"), default=math.nan)
    share = taken["teacher share"]
    wrote = "" if math.isnan(share) else f"student {percent(1 - share)}, teacher {percent(share)}"
    if wrote and sources["examples"]:
        wrote += f" (in {len(metrics) - sources['examples']} of {len(metrics)} steps; the others read the data)"
    facts = {
        "training steps": f"{taken['steps']:.0f}",
        "tokens learned from": f"{taken['tokens']:,.0f}",
        "time, without evaluation": f"{duration(taken['seconds'])} ({split})" if split else duration(taken["seconds"]),
        "who wrote the text made in training": wrote,
        "passes through the teacher per token made": "" if math.isnan(forwards) else number(forwards),
        "most memory": "" if math.isnan(memory) else f"{number(memory)} GiB",
    }
    return [(name, value) for name, value in facts.items() if value]


def _numbers(metrics: Lines, name: str) -> list[float]:
    return [line[name] for line in metrics if line.get(name) is not None]


def _first_answer(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The answer that stands in the page before any script runs; {} where there is none."""
    return told[0]["items"][told[0]["first"]] | {"notes": told[0]["notes"]} if told else {}


def _side_by_side(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Rows with a name and a cell for each run. Those in which every cell is empty are left out."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name, "") for column in columns]) for name in names]
    return [(name, cells) for name, cells in rows if any(cells)]


def _facts(run: RunRecord) -> dict[str, str]:
    settings, mix = run.settings, shipped_rule(run.settings, "mix")
    return {
        "method": settings["method"],
        "who writes": settings_text(settings, "policy")
        if mix is None or mix.generates
        else "nobody: it reads the data",
        "what is lowered": settings_text(settings, "objective"),
        "on which text": settings_text(settings, "mix"),
        "two tokenizers": _crossing(run),
        "teacher": ", ".join([settings["teacher_model_name_or_path"], *settings["teachers"].values()]),
        "student": settings["student_model_name_or_path"],
        "training data": _listed(settings["train_file"]),
        "seed": str(settings["seed"]),
    }


def _crossing(run: RunRecord) -> str:
    """What the two tokenizers have in common and how much of the text is trained on; "" where there is one."""
    if not run.two_tokenizers:
        return ""
    trained = mean(_numbers(run.metrics, "cross/coverage"))
    told = [] if math.isnan(trained) else [f"{percent(trained)} of the text's tokens are trained on"]
    with suppress(ModelError):  # a tokenizer is not on this machine
        own, others = ({*side.spelling.bytes_of} - {b""} for side in run.sides(""))
        sizes = f"of the student's {len(own):,} tokens and the teacher's {len(others):,}"
        told = [f"{sizes}, {len(own & others):,} spell the same", *told]
    return "; ".join(told)


def _listed(names: str | Sequence[str]) -> str:
    return names if isinstance(names, str) else ", ".join(names)


# --- scores ---------------------------------------------------------------------------------------------------------


def _score_sheets(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Sheet]:
    """A table for each evaluation file that the runs have, and one by group where its examples have groups.

    What ``switchkd compare`` would refuse has tables of its own, whose titles name what differs.
    """
    sheets = []
    for file in dict.fromkeys(file for run in runs for file in run.evaluations):
        for columns, why in _alike(_columns(file, runs, names)):
            first = next(iter(columns.values()))
            title = (file.removeprefix("evaluation").removeprefix("-") or "At the end of the run") + why
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


def _alike(columns: Mapping[str, Evaluation], by_teacher: bool = False) -> list[tuple[dict[str, Evaluation], str]]:
    """The columns that may stand side by side, and of each group but the first why it stands apart; ``by_teacher``: also if they
    were compared with different teachers."""
    groups: list[tuple[dict[str, Any], dict[str, Evaluation], str]] = []
    for name, result in columns.items():
        made = dict(result.made_with) | ({"teacher": result.made_with.get(TEACHER)} if by_teacher else {})
        same = next((columns for known, columns, _ in groups if not unlike(known, made)), None)
        if same is None:
            why = f" (not comparable with the table above: {'; '.join(unlike(groups[0][0], made))})" if groups else ""
            groups.append((made, same := {}, why))
        same[name] = result
    return [(columns, why) for _, columns, why in groups]


def _columns(file: str, runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, Evaluation]:
    several = len(runs) > 1
    return {
        f"{name}: {model}" if several else model: result
        for run, name in zip(runs, names, strict=True)
        for model, result in run.evaluations.get(file, {}).items()
    }


def _sheet(title: str, columns: Mapping[str, Evaluation], rows: Mapping[str, Mapping[str, Estimate]]) -> Sheet:
    cells = [
        [row, *(estimate_text(own[model]) if model in own else MISSING for model in columns)]
        for row, own in rows.items()
    ]
    return Sheet(title, ["score", *columns], cells)


def _words(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """What each score of the tables is, in words."""
    found = (result for run in runs for results in run.evaluations.values() for result in results.values())
    names = dict.fromkeys(name.split("@")[0] for result in found for name in result.scores)
    return [(name, f"{score_words(name)}; {direction(name)}") for name in names]


def _curves(runs: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, str]]:
    """The curves of training of those runs that have any."""
    metrics = {name: run.metrics for run, name in zip(runs, names, strict=True) if run.metrics}
    return [
        {"title": curve.title, "summary": curve.summary, "svg": themed_svg(curve.figure, curve.summary)}
        for curve in run_curves(metrics)
    ]
