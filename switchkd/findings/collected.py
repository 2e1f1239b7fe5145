"""What the runs of a study came to, as plain data in one small file: every score of every held-out row, and the way there.

From ``scores.json.xz`` a study can be judged, compared and drawn on another machine, without its runs. It holds of each run that
is done its settings, the conditions it ran under, what it cost, the values of each evaluation row by row, the scores along the
way, and the metrics of its steps. Numbers have six significant digits. Of a long run the metrics are means over stretches of
steps.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from switchkd.base.errors import ConfigError, DataError
from switchkd.base.plain import check_type, json_object, shown
from switchkd.base.storage import write_output
from switchkd.evaluation.results import EVALUATION, Evaluation
from switchkd.evaluation.statistics import Values
from switchkd.reports.compare import Result, load_result, result_of
from switchkd.reports.curves import cost
from switchkd.reports.record import checksums, read_origin, read_steps
from switchkd.reports.steps import ELAPSED, SCORE, Steps
from switchkd.runs.continuation import CONDITIONS
from switchkd.studies.plan import Cell, Plan, Size, joined
from switchkd.studies.study import trained

FORMAT = 1
DIGITS = 6
LINES = 100  # of step metrics, at most, that are kept of a run
MOST_BYTES = 2**30  # of an unpacked file
_PLACE = ("step", "num_tokens", ELAPSED)
_KEPT = ("loss", "switch/")  # how the metrics begin that are kept of the steps
# A run's own folder is no property of it.
_DROPPED = ("output_dir",)


class _Evaluated(TypedDict):
    measured: int
    results: dict[str, Any]


class _Run(TypedDict):
    name: str
    method: str
    group: str
    seed: int
    settings: dict[str, Any]
    origin: dict[str, Any]
    cost: dict[str, float | None]
    evaluations: dict[str, _Evaluated]
    steps_a_line: int
    steps: dict[str, list[float | None]]
    along: dict[str, list[float | None]]


class _Record(TypedDict):
    """The file: what the plan says of the runs, the claims that the study began with, and the runs.

    ``settings`` are those that all runs have, ``measured`` what evaluations depend on, which runs name by its place.
    """

    format: int
    plan: dict[str, Any]
    claims: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    measured: list[dict[str, Any]]
    runs: list[_Run]


@dataclass(frozen=True)
class Run:
    """One run of a study that is done.

    ``results`` are by task, "" for the run's own evaluation. ``steps`` hold the metrics of its steps and the scores along the way;
    ``ELAPSED`` in them are the seconds of training until then. ``cost`` is that of ``reports.curves``, and ``conditions`` are those
    that the run wrote down, one for each time that it went on.
    """

    name: str
    method: str
    group: str
    seed: int
    results: dict[str, Result]
    steps: Steps
    cost: dict[str, float]
    conditions: list[dict[str, Any]]


@dataclass(frozen=True)
class Collected:
    """The runs of a study that are done. ``record`` is what its file holds, so that both say the same to the last digit."""

    record: _Record

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The runs, in the order of the grid; raises DataError for one that is not what this version writes."""
        return tuple(_run(each, self.record) for each in self.record["runs"])

    @property
    def claims(self) -> dict[str, dict[str, Any]]:
        """The plan's claims as they were when the study began, as plain values by name."""
        return self.record["claims"]

    def of(self, group: str, method: str = "") -> list[Run]:
        """The runs of a group, or of one method in it."""
        return [run for run in self.runs if run.group == group and method in ("", run.method)]


# --- from the folder of a study -----------------------------------------------------------------------------------


def collect(
    plan: Plan, size: Size, grid: Sequence[Cell], output_dir: Path, claims: Mapping[str, Mapping[str, Any]]
) -> Collected:
    """Everything that a claim, a table or a figure needs of those runs of ``grid`` that are done.

    ``claims`` are the plan's as they were when the study began.

    Raises:
        DataError: a file of a run that is done is damaged.
    """
    done = [cell for cell in grid if _done(output_dir / cell.name, size)]
    found = [(cell, _read(output_dir / cell.name, size)) for cell in done]
    configs = [_settings(results[""]) for _, results in found]
    shared = {k: v for k, v in configs[0].items() if all(k in c and c[k] == v for c in configs)} if configs else {}
    measured: list[dict[str, Any]] = []
    runs = [_collected(cell, results, output_dir / cell.name, shared, measured) for cell, results in found]
    record = {
        "format": FORMAT,
        "plan": _of_plan(plan, size),
        "claims": {name: dict(claim) for name, claim in claims.items()},
        "settings": shared,
        "measured": measured,
        "runs": runs,
    }
    return Collected(json.loads(json.dumps(record)))


def _done(run: Path, size: Size) -> bool:
    return trained(run) and all((run / f"{joined('evaluation', task)}.json").is_file() for task in size.evaluations)


def _read(run: Path, size: Size) -> dict[str, Result]:
    return {task: load_result(str(run), task) for task in ("", *size.evaluations)}


def _settings(result: Result) -> dict[str, Any]:
    return {name: value for name, value in (result.config or {}).items() if name not in _DROPPED}


def _of_plan(plan: Plan, size: Size) -> dict[str, Any]:
    """What the runs of a plan are made of. The seeds may grow."""
    parts = {name: getattr(size, name) for name in ("settings", "pairs", "budgets", "evaluations")}
    return json.loads(json.dumps({"methods": plan.methods, **parts}, default=str))


def _collected(
    cell: Cell, results: Mapping[str, Result], run: Path, shared: Mapping[str, Any], measured: list[dict[str, Any]]
) -> dict[str, Any]:
    own = _settings(results[""])
    steps = read_steps(run, own)
    elapsed = np.cumsum([line["seconds"] for line in steps])
    lines = [{**line, ELAPSED: float(seconds)} for line, seconds in zip(steps, elapsed, strict=True)]
    a_line = math.ceil(len(lines) / LINES)
    return {
        "name": cell.name,
        "method": cell.method,
        "group": cell.group,
        "seed": cell.config.seed,
        "settings": {name: value for name, value in own.items() if name not in shared},
        "origin": read_origin(run),
        "cost": {name: _short(value) for name, value in cost(steps).items()},
        "evaluations": {task: _evaluation(result, measured) for task, result in results.items()},
        "steps_a_line": a_line,
        "steps": _columns(_stretch(lines[first : first + a_line]) for first in range(0, len(lines), a_line)),
        "along": _columns(_picked(line, SCORE) for line in lines if any(name.startswith(SCORE) for name in line)),
    }


def _evaluation(result: Result, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The values of an evaluation; what they depend on goes into ``measured``, if it is not there yet."""
    groups = list(result.student.groups)
    on = {"task": result.task, "data": result.data | {"groups": groups}, "settings": result.settings}
    if on not in measured:
        measured.append(on)
    return {
        "measured": measured.index(on),
        "results": {name: _model(model) for name, model in result.models.items()},
    }


def _model(model: Evaluation) -> dict[str, Any]:
    return {"model": dict(model.model), "scores": {name: _values(values) for name, values in model.scores.items()}}


def _values(values: Values) -> dict[str, Any]:
    weights = np.asarray(values.weights)
    return {
        "values": [[_short(value) for value in row] for row in values.values.tolist()],
        "weights": None if (weights == 1).all() else [_short(weight) for weight in weights.tolist()],
    }


def _stretch(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Some neighbouring steps as one line: the place of the last, and the mean of each metric over those that have it."""
    kept = dict.fromkeys(name for line in lines for name in line if name.startswith(_KEPT))
    means = {}
    for name in kept:
        values = [line[name] for line in lines if line.get(name) is not None]
        means[name] = sum(values) / len(values) if values else None
    return _picked(lines[-1]) | means


def _picked(line: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {name: value for name, value in line.items() if name in _PLACE or (prefix and name.startswith(prefix))}


def _columns(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """The lines as columns; null where a line has not the metric."""
    kept = list(lines)
    names = dict.fromkeys(name for line in kept for name in line)
    return {name: [_short(line.get(name)) for line in kept] for name in names}


def _short(value: float | None) -> float | None:
    """To six significant digits, a whole number as such; null for what is not finite, which JSON does not have."""
    if value is None or not math.isfinite(value):
        return None
    if isinstance(value, int):
        return value
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded


# --- the file -----------------------------------------------------------------------------------------------------


def write_collected(collected: Collected, file: Path) -> None:
    """Write the file, whole or not at all; equal runs give equal bytes."""
    text = json.dumps(collected.record, separators=(",", ":"), allow_nan=False)
    write_output(file, lzma.compress(text.encode(), preset=9))


def read_collected(file: Path, plan: Plan, size: Size) -> Collected:
    """The runs in a file that ``write_collected`` wrote of this plan and size.

    Raises:
        DataError: there is no such file, or it is damaged or another one.
        ConfigError: the plan says otherwise what the runs are.
    """
    try:
        with lzma.open(file) as packed:
            text = packed.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise DataError(f"it holds more than {MOST_BYTES:,} bytes")
        record: Any = json_object(text)
        if (form := record.get("format")) != FORMAT:
            raise DataError(f"it is of format {shown(form)}, not {FORMAT}")
        check_type(record, _Record)
        collected = Collected(record)
        _ = collected.runs
    except (OSError, EOFError, lzma.LZMAError, DataError) as error:
        raise DataError(f"{file} cannot be read as the scores of a study: {error}") from error
    _check_plan(record["plan"], _of_plan(plan, size), file)
    return collected


def _check_plan(theirs: Mapping[str, Any], ours: Mapping[str, Any], file: Path) -> None:
    """Raise ConfigError where runs of one name would not be the same run."""
    for part, now in ours.items():
        before = theirs.get(part, {})
        for name in {**before, **now} if part == "settings" else [name for name in before if name in now]:
            if before.get(name) != now.get(name):
                raise ConfigError(
                    f"{file} has the runs of another plan or size: {part} {name} is {shown(before.get(name))} there, and "
                    f"{shown(now.get(name))} in this plan"
                )


def _run(own: _Run, record: _Record) -> Run:
    settings = record["settings"] | own["settings"]
    results = {}
    for task, evaluated in own["evaluations"].items():
        if not 0 <= evaluated["measured"] < len(record["measured"]):
            raise DataError(f"{own['name']} names what is not measured: {evaluated['measured']}")
        on = record["measured"][evaluated["measured"]] | {"results": evaluated["results"]}
        file = Path(own["name"]) / (f"{joined('evaluation', task)}.json" if task else EVALUATION)
        results[task] = result_of(file, on, settings)
    if "" not in results:
        raise DataError(f"{own['name']} has no evaluation of its own")
    lines: dict[float, dict[str, Any]] = {}
    for columns in (own["steps"], own["along"]):
        for line in _lines(own["name"], columns):
            lines.setdefault(line["step"], {}).update(line)
    ordered = [lines[step] for step in sorted(lines)]
    primary, known = results[""].student.primary, checksums(own["origin"])
    steps = Steps(ordered, settings, own["name"], known, primary, own["steps_a_line"])
    costs = {name: math.nan if value is None else value for name, value in own["cost"].items()}
    conditions = own["origin"].get(CONDITIONS, [])
    check_type(conditions, list[dict[str, Any]], f"conditions of {own['name']}")
    return Run(own["name"], own["method"], own["group"], own["seed"], results, steps, costs, conditions)


def _lines(name: str, columns: Mapping[str, Sequence[float | None]]) -> list[dict[str, Any]]:
    if columns and (len(set(map(len, columns.values()))) > 1 or not set(_PLACE) <= columns.keys()):
        raise DataError(f"the metrics of {name} are not columns of one length with {', '.join(_PLACE)}")
    rows = zip(*columns.values(), strict=True)
    return [{key: value for key, value in zip(columns, row, strict=True) if value is not None} for row in rows]
