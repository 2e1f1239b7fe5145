"""That a study can come to its end, asked before its first run: a mistake in the last one would else show after days."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from switchkd.base.errors import ConfigError, DataError, SwitchKDError, nearest
from switchkd.base.settings import to_dict
from switchkd.data.examples import Example, load_examples
from switchkd.data.files import rows_of
from switchkd.data.formats import Wanted
from switchkd.data.settings import DataConfig
from switchkd.data.tables import PREFIX
from switchkd.data.texts import TokenizedExample
from switchkd.evaluation.evaluate import score_names
from switchkd.evaluation.results import read_results
from switchkd.evaluation.settings import EvalConfig
from switchkd.evaluation.tasks import task_named
from switchkd.models.adapters import require
from switchkd.models.loading import check_source, default_device
from switchkd.models.settings import BASE, with_dtypes
from switchkd.reports.compare import training_settings
from switchkd.reports.steps import SCORE, is_to_teacher
from switchkd.runs.continuation import begun, check_run
from switchkd.runs.heldout import heldout_sources
from switchkd.runs.opening import needs_answers, splits
from switchkd.runs.tracking import check_trackers
from switchkd.studies.plan import (
    CELLS,
    JUDGEMENTS,
    LOGS,
    PAGE,
    REPORT,
    SCORES,
    STEP_METRICS,
    Cell,
    Claim,
    Plan,
    Scoring,
    Size,
    is_about,
    joined,
    results_of_group,
    scoring,
)
from switchkd.studies.study import trained
from switchkd.training.checkpoint import checkpoints
from switchkd.training.records import CONFIG
from switchkd.training.settings import TrainConfig

# What runs must share, so that their scores can be compared.
_ALIKE = [f.name for f in dataclasses.fields(EvalConfig) if f.name != "per_device_eval_batch_size"]
_ALIKE += [
    "eval_file",
    "template",
    "chat_template_kwargs",
    "max_prompt_length",
    "max_completion_length",
    "dtype",
    "teacher_dtype",
]


def check_study(plan: Plan, size: Size, grid: Sequence[Cell], output_dir: Path) -> None:
    """Raise the error that a run, an evaluation or the comparison would end with, as far as it shows without loading a model.

    Data on the hub is not looked at, and no network is asked.
    """
    for name in dict.fromkeys(cell.group for cell in grid):
        _check_group(plan, [cell for cell in grid if cell.group == name])
    inputs = _Inputs()
    for cell in grid:
        with _naming(cell.name):
            inputs.check(cell.config, plan.scores)
            for task in size.evaluations:
                inputs.check_scoring(scoring(cell.config, task, size))
    for name, claim in plan.claims.items():
        _check_claim(name, claim, size, grid, inputs)
    _check_folder(size, grid, output_dir)


def _check_claim(name: str, claim: Claim, size: Size, grid: Sequence[Cell], inputs: _Inputs) -> None:
    """Raise ConfigError for a claim about a score that the runs will not have, as far as that shows."""
    methods = {claim.better, *claim.than}
    for cell in (cell for cell in grid if cell.method in methods and is_about(claim, size)):
        score = claim.score.removeprefix(SCORE)
        if claim.along and (not claim.of_steps or score != claim.score) and not cell.config.eval_steps:
            raise ConfigError(f"claim {name} is measured along the way, and {cell.name} has no eval_steps; give them")
        config = scoring(cell.config, claim.task, size) if claim.task else cell.config
        known = inputs.check_scoring(config)
        if known and score and score not in (*known, *STEP_METRICS):
            raise ConfigError(
                f"claim {name}: the evaluation of {cell.name} gives no score {score!r}{nearest(score, known)}"
            )


@contextmanager
def _naming(cell: str) -> Iterator[None]:
    """What is wrong with a run is said with its name."""
    try:
        yield
    except SwitchKDError as error:
        raise type(error)(f"{cell} could not be run: {error}") from error


def _check_group(plan: Plan, cells: Sequence[Cell]) -> None:
    """Raise ConfigError for runs that could not be compared, or that are one run by two names."""
    chosen = [dataclasses.replace(cell, config=with_dtypes(cell.config, default_device())) for cell in cells]
    names = [*_ALIKE, *(["teacher_model_name_or_path"] if _to_teacher(plan.scores) else [])]
    names += ["train_file", "train_samples", "eval_split"] if splits(cells[0].config) else []
    first, known = chosen[0], dict[tuple[str, int], Cell]()
    for cell in chosen:
        for name in names:
            ours, theirs = (getattr(each.config, name) for each in (cell, first))
            if BASE not in (ours, theirs) and _place(ours) != _place(theirs):
                raise ConfigError(
                    f"{cell.name} and {first.name} could not be compared: {name} is {ours!r} and {theirs!r}; give all methods one"
                )
        same = known.setdefault((training_settings(to_dict(cell.config)), cell.config.seed), cell)
        if same is not cell:
            raise ConfigError(
                f"the methods {same.method!r} and {cell.method!r} of the plan have the same settings; leave one of them out"
            )


def _to_teacher(scores: Sequence[str]) -> bool:
    """Whether a divergence to the teacher is compared, as it is where no scores are named."""
    return not scores or any(map(is_to_teacher, scores))


def _place(value: object) -> object:
    """A file or folder by where it is, several by where each is; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(_place, value))
    return Path(value).resolve() if isinstance(value, str) and value and Path(value).exists() else value


class _Inputs:
    """What runs read, each input looked at once."""

    def __init__(self) -> None:
        self.models: set[str] = set()
        self.examples: dict[object, Example | None] = {}

    def check(self, config: TrainConfig, scores: Sequence[str]) -> None:
        """Raise the error that a training run, or the choice of its ``scores``, would end with."""
        for name in {config.teacher_model_name_or_path, config.student_model_name_or_path, *config.teachers.values()}:
            if name not in self.models:
                check_source(name)
                self.models.add(name)
        for package in ["peft"] * config.use_peft + ["bitsandbytes"] * config.load_in_4bit:
            require(package)
        check_trackers(config.report_to)
        self._first(config.train_file, config, needs_answers(config), config.teacher_field, tuple(config.teachers))
        if config.mix.validation_steps and config.validation_file:
            self._first(config.validation_file, config)
        if not any(source.startswith(PREFIX) for source in config.lm_file):
            next(rows_of(config.lm_file), None)  # which raises for a file that is not there
        known = self.check_scoring(config)
        for name in filter(None, [config.metric_for_best_model, *scores]):
            if known and name not in known:
                raise ConfigError(f"its evaluation gives no score {name!r}{nearest(name, known)}")

    def check_scoring(self, config: TrainConfig | Scoring) -> list[str]:
        """The names of an evaluation's scores, none where its data is on the hub; raises the error that it would end with."""
        if not config.eval_samples:
            raise ConfigError("a study compares scores, and eval_samples is 0; give -1 for all held-out examples")
        if not (sources := heldout_sources(config)):
            raise ConfigError("a study compares scores, and nothing is held out; give eval_file, or eval_split above 0")
        if not (first := self._first(sources, config, answers=False)):
            return []
        example = TokenizedExample(first.id, [], [], [], first.references, False, first.source, group=first.group)
        names = score_names(task_named(config.task, first.format), [example])
        return [*names, *(["own_forward_kl"] if config.eval_own_text else [])]

    def _first(
        self,
        sources: Sequence[str],
        config: DataConfig,
        answers: bool = True,
        teacher_field: str = "",
        teachers: tuple[str, ...] = (),
    ) -> Example | None:
        """The first example of data files; None for data on the hub, which would take a network and time."""
        key = sources, config.skip_bad, answers, teacher_field, teachers
        if any(source.startswith(PREFIX) for source in sources):
            return None
        if key not in self.examples:
            found = load_examples(
                sources, 1, config.skip_bad, wanted=Wanted(answers), teacher_field=teacher_field, teachers=teachers
            )
            self.examples[key] = found[0]
        return self.examples[key]


# --- the folder ---------------------------------------------------------------------------------------------------


def check_place(size: Size, grid: Sequence[Cell], output_dir: Path) -> None:
    """Raise ConfigError for a folder in which something that no study wrote has the place of what this one will write."""
    if (output_dir / CELLS).is_dir() or (output_dir / SCORES).is_file():
        return
    results = (joined(kind, cell.group, task) for cell in grid for kind, task in results_of_group(size))
    names = {f"{name}{ending}" for name in results for ending in ("", ".svg", ".png")}
    names |= {REPORT, SCORES, JUDGEMENTS, PAGE, CELLS, LOGS}
    if taken := sorted(name for name in names if (output_dir / name).exists()):
        raise ConfigError(
            f"{output_dir} is no study's folder, and holds {taken[0]}, which this one would replace; name another --output-dir"
        )


def _check_folder(size: Size, grid: Sequence[Cell], output_dir: Path) -> None:
    check_place(size, grid, output_dir)
    for cell in grid:
        _check_run(output_dir / cell.name, cell, size)


def _check_run(run: Path, cell: Cell, size: Size) -> None:
    """Raise the error that the study would end with if it went on with what lies in a run's folder."""
    if (run.exists() or run.is_symlink()) and not run.is_dir():
        raise ConfigError(f"{run} is no folder, and a run of the study has its place there; move it away")
    for task in ("", *size.evaluations):
        file = run / f"{joined('evaluation', task)}.json"
        try:
            if file.is_file():
                read_results(file)
        except DataError as error:
            raise DataError(
                f"{file} cannot be read as an evaluation: {error.__cause__ or error}. Nothing is deleted; move it away, and the "
                "same command makes it again from the student or the last checkpoint"
            ) from error
    if begun(run):
        if not (run / CONFIG).is_file() or not (checkpoints(run) or trained(run)):
            there = sorted(path.name for path in run.iterdir())
            raise ConfigError(
                f"{run} has the name of a run of the study, and is none that could go on: it holds {', '.join(there[:5])}. "
                "Nothing is deleted; move it away, or name another --output-dir"
            )
        if not (run.parent / CELLS / f"{cell.name}.yaml").is_file():  # another hand trained it
            check_run(run, dataclasses.replace(cell.config, resume=True))
