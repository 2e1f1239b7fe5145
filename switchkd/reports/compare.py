"""Methods side by side: what ``switchkd evaluate`` wrote of their students, compared example by example.

A method is the runs whose settings differ in the training seed alone. Everything else that a score depends on has to be the
same in all files, or nothing is compared.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar

from switchkd.base.errors import ConfigError, DataError, nearest
from switchkd.base.plain import check_type, json_object, shown
from switchkd.data.settings import DATE
from switchkd.evaluation.results import EVALUATION, FORMAT, Evaluation, results_of
from switchkd.evaluation.statistics import Bootstrap, Estimate, Values, bootstrap, lower_is_better, verdict
from switchkd.models.saved_student import SCORED, scored_another
from switchkd.reports.record import nearest_beside, read_settings
from switchkd.reports.steps import TEACHER, is_to_teacher, unlike
from switchkd.training.records import CONFIG
from switchkd.training.settings import FREE_ON_RESUME

REFERENCES = ("teacher", "student before")
FEW_RUNS = 5  # with fewer, the spread between runs is hardly known


@dataclass(frozen=True)
class Result:
    """One evaluation file; ``config`` are the settings of the run beside it, None for a file on its own."""

    path: Path
    task: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    models: dict[str, Evaluation]
    config: dict[str, Any] | None

    @property
    def student(self) -> Evaluation:
        return next(self.models[name] for name in SCORED if name in self.models)


@dataclass(frozen=True)
class Method:
    """A row of every table: the models of one method by training seed, or one model to compare with."""

    label: str
    models: dict[int, Evaluation]
    paths: tuple[str, ...] = ()

    @property
    def reference(self) -> bool:
        return not self.paths

    def score(self, name: str) -> dict[int, Values]:
        return {seed: model.scores[name] for seed, model in self.models.items()}

    def scores(self) -> list[str]:
        """Names that all of its models have."""
        first, *others = self.models.values()
        return [name for name in first.scores if all(name in other.scores for other in others)]


@dataclass(frozen=True)
class Difference:
    """One method's score less another's, and what it says."""

    estimate: Estimate
    verdict: str


@dataclass(frozen=True)
class Row:
    """A method's score, and its difference to the baseline: None for the baseline itself, or where that has no such score."""

    method: Method
    estimate: Estimate
    difference: Difference | None


@dataclass(frozen=True)
class Comparison:
    """Methods compared: a list of rows a score, and the differences of all pairs of methods in the first score."""

    task: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    baseline: str
    scores: dict[str, list[Row]]
    pairs: dict[tuple[str, str], Difference]

    @property
    def main_score(self) -> str:
        return next(iter(self.scores))


class _Task(TypedDict):
    name: str
    version: int
    primary: str


class _Data(TypedDict):
    file: str
    sha256: str
    ids: list[int]


class _Model(TypedDict):
    sha256: str


class _Scored(TypedDict):
    model: _Model


class _ScoreSettings(TypedDict, total=False):
    teacher_sha256: str
    template_date: str


class _Compared(TypedDict):
    """What an evaluation file must hold to be compared, beside what every reader of one needs."""

    task: _Task
    data: _Data
    settings: _ScoreSettings
    results: dict[str, _Scored]


class _Seeded(TypedDict):
    seed: int


def compare(
    paths: Sequence[str],
    task: str = "",
    scores: Sequence[str] = (),
    baseline: str = "",
    progress: Callable[[str], None] = lambda score: None,
) -> Comparison:
    """Compare the students that the run directories or evaluation files ``paths`` tell of.

    ``scores`` default to the task's primary one and every other that all have, but for those of single positions (``…@0-10``);
    ``baseline`` to the first method. Calls ``progress`` with a score's name, for every row when it is resampled.

    Raises:
        ConfigError: no such score or baseline, or a method's run given twice.
        DataError: a file is missing or damaged, or two files differ in what a score depends on.
    """
    return compare_results([load_result(path, task) for path in paths], scores, baseline, progress)


def compare_results(
    results: Sequence[Result],
    scores: Sequence[str] = (),
    baseline: str = "",
    progress: Callable[[str], None] = lambda score: None,
) -> Comparison:
    """``compare`` of results that are read already, from wherever they lie."""
    if not results:
        raise ConfigError("nothing to compare; give run directories: switchkd compare runs/a runs/b")
    check_comparable(results)
    methods = group(results)
    names = chosen_scores(results, methods, scores)
    check_teachers(results, names)
    rows = [*references(results), *methods]
    labels = [row.label for row in rows]
    if baseline and baseline not in labels:
        raise ConfigError(f"no baseline {baseline!r}{nearest(baseline, labels)}")
    baseline = baseline or methods[0].label
    samples: dict[str, dict[str, Bootstrap]] = {}
    for name, row in ((name, row) for name in names for row in rows if name in row.scores()):
        samples.setdefault(name, {})[row.label] = bootstrap(name, row.score(name))
        progress(name)
    tables = {
        name: [_row(name, row, samples[name], baseline) for row in rows if row.label in samples[name]] for name in names
    }
    pairs = {
        (a.label, b.label): _difference(names[0], samples[names[0]][a.label], samples[names[0]][b.label])
        for a, b in permutations(methods, 2)
    }
    first = results[0]
    days = " and ".join(sorted({result.settings[DATE] for result in results if DATE in result.settings}))
    settings = first.settings | ({DATE: days} if days else {})
    return Comparison(first.task, first.data, settings, baseline, tables, pairs)


def _row(name: str, method: Method, samples: Mapping[str, Bootstrap], baseline: str) -> Row:
    own, other = samples[method.label], samples.get(baseline)
    against = None if other is None or method.label == baseline else _difference(name, own, other)
    return Row(method, own.estimate(), against)


def _difference(name: str, a: Bootstrap, b: Bootstrap) -> Difference:
    estimate = (a - b).estimate()
    return Difference(estimate, verdict(estimate, lower_is_better(name)))


def load_result(path: str, task: str = "") -> Result:
    """Read the evaluation of a run directory (of ``task``, if named), or an evaluation file.

    Raises:
        DataError: there is none, it is of another task, or it is not what ``switchkd evaluate`` writes.
    """
    file = _evaluation_file(Path(path), task)
    try:
        record = json_object(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"no evaluation {file}{nearest_beside(file)}; make one with `switchkd evaluate RUN`") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if (form := record.get("format")) != FORMAT:
        raise DataError(
            f"{file} is of format {shown(form)}, not {FORMAT}; evaluate anew with `switchkd evaluate {path}`"
        )
    settings = read_settings(file.parent, _Seeded) if (file.parent / CONFIG).is_file() else None
    try:
        result = result_of(file, record, settings)
    except DataError as error:
        raise DataError(f"{file} is not what switchkd writes: {error}") from error
    models = {name: model.model for name, model in result.models.items()}
    if settings is not None and (wrong := scored_another(file.parent, models)):
        raise DataError(
            f"{file}: {wrong}; evaluate anew with `switchkd evaluate {file.parent} --task {result.task['name']}`"
        )
    if task and result.task["name"] != task:
        raise DataError(
            f"{file} is of the task {result.task['name']!r}, not {task!r}; make one with `switchkd evaluate {path} --task {task}`"
        )
    return result


def _evaluation_file(path: Path, task: str) -> Path:
    """The file that ``path`` is, or that lies in it: evaluation-TASK.json, or evaluation.json of the run's own task."""
    if not path.is_dir():
        return path
    own, named = path / EVALUATION, path / f"evaluation-{task}.json"
    if task and named.is_file():
        return named
    if own.is_file():
        return own
    others = sorted(file.stem.removeprefix("evaluation-") for file in path.glob("evaluation-*.json"))
    way_out = f"`switchkd evaluate {path}{f' --task {task}' if task else ''}`"
    hint = f", or compare one that there is: --task {' or '.join(others)}" if others else ""
    raise DataError(f"{path} holds no {(named if task else own).name}; make it with {way_out}{hint}")


def result_of(file: Path, record: dict[str, Any], config: dict[str, Any] | None) -> Result:
    """The result in a parsed evaluation file, of a run with the settings ``config``.

    Raises:
        DataError: it is no such file, or scores no student.
    """
    check_type(record, _Compared)
    models = results_of(record)
    if not any(name in models for name in SCORED):
        raise DataError(f"it has results of {', '.join(models) or 'nothing'}, and none of a student")
    task = {key: record["task"][key] for key in ("name", "version", "primary")}
    data = {key: record["data"][key] for key in ("file", "sha256", "ids")}
    return Result(file, task, data, dict(record["settings"]), models, config)


def check_comparable(results: Sequence[Result]) -> None:
    """Raise DataError, naming everything that differs, unless all results are of one task, data and settings."""
    first, *others = results
    for other in others:
        if differences := unlike(first.student.made_with, other.student.made_with):
            raise DataError(
                f"{other.path} cannot be compared with {first.path}: {'; '.join(differences)}. Evaluate both alike with "
                "`switchkd evaluate RUN`"
            )


def check_teachers(results: Sequence[Result], scores: Sequence[str]) -> None:
    """Raise DataError if a divergence is to be compared that was taken to different teachers."""
    teachers = {result.settings.get(TEACHER): result.path for result in results}
    to_teacher = [name for name in scores if is_to_teacher(name)]
    if to_teacher and len(teachers) > 1:
        which = "; ".join(f"{path}: {str(sha256)[:12]}" for sha256, path in teachers.items())
        raise DataError(
            f"{', '.join(to_teacher)} can only be compared with one teacher for all ({which}); leave it out: --score with others"
        )


def group(results: Sequence[Result]) -> list[Method]:
    """The results by method: runs whose settings differ in the training seed, and in what moves no decision, are one."""
    return [
        Method(label, {seed: r.student for seed, r in runs.items()}, tuple(str(r.path) for r in runs.values()))
        for label, runs in by_method(results).items()
    ]


class Trained(Protocol):
    """What a method is known by: where it lies, and the settings it was trained with, if they are known."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any] | None: ...


AnyTrained = TypeVar("AnyTrained", bound=Trained)


def by_method(found: Sequence[AnyTrained]) -> dict[str, dict[int, AnyTrained]]:
    """What was found, by the label of its method and by training seed.

    Raises:
        ConfigError: two are of one method and training seed.
    """
    methods: dict[str, dict[int, AnyTrained]] = {}
    for one in found:
        runs = methods.setdefault(_method(one), {})
        seed = (one.config or {}).get("seed", 0)
        if seed in runs:
            raise ConfigError(
                f"{runs[seed].path} and {one.path} are of one method and training seed ({seed}); give one of them"
            )
        runs[seed] = one
    labels = _labels([next(iter(runs.values())).path for runs in methods.values()])
    return dict(zip(labels, methods.values(), strict=True))


def _method(one: Trained) -> str:
    """What a run's method is, as text. A file without a run is a method of its own."""
    return str(one.path.resolve()) if one.config is None else training_settings(one.config)


def training_settings(config: Mapping[str, Any]) -> str:
    """The settings of a run that move its training, but for the seed and the day, as text."""
    free = FREE_ON_RESUME | {"seed", DATE}
    # Settings of evaluation train nothing, but the adaptive mix may look at eval_file, and eval_split is not trained on.
    moving = {
        k: v
        for k, v in config.items()
        if k not in free and (k in ("eval_file", "eval_split") or not k.startswith("eval_"))
    }
    return json.dumps(moving, sort_keys=True, default=str)


def _labels(paths: Sequence[Path]) -> list[str]:
    """Names of what lies in ``paths``: the run's folder without ``-seedN``, or a file's own name; the path where two are alike."""
    names = (_name(path.resolve()) for path in paths)
    short = [re.sub(r"[-_]seed[-_]?\d+$", "", name) for name in names]
    taken = Counter([*short, *REFERENCES])
    return [name if taken[name] == 1 else str(path) for name, path in zip(short, paths, strict=True)]


def _name(path: Path) -> str:
    if path.is_dir():
        return path.name
    return path.parent.name if path.stem.startswith("evaluation") else path.stem


def references(results: Sequence[Result]) -> list[Method]:
    """Teacher and untrained student, each distinct one once, as rows to compare with."""
    rows = []
    for role in REFERENCES:
        distinct = {r.models[role].model["sha256"]: r for r in reversed(results) if role in r.models}
        names = _labels([r.path for r in distinct.values()])
        labels = [role] if len(distinct) == 1 else [f"{role} of {name}" for name in names]
        rows += [Method(label, {0: r.models[role]}) for label, r in zip(labels, distinct.values(), strict=True)]
    return rows


def chosen_scores(results: Sequence[Result], methods: Sequence[Method], asked: Sequence[str]) -> list[str]:
    """The scores to compare, the one for plot and pairs first: those ``asked`` for, else the primary and all others in common."""
    first, *others = (method.scores() for method in methods)
    common = [name for name in first if all(name in other for other in others)]
    if unknown := [name for name in asked if name not in common]:
        raise ConfigError(f"no score {unknown[0]!r} that all results have{nearest(unknown[0], common)}")
    primary = results[0].task["primary"]
    return list(dict.fromkeys(asked)) or [primary, *(name for name in common if name != primary and "@" not in name)]
