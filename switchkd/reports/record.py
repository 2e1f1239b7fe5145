"""A run directory as it lies on disk, whatever its state: finished, still running, stopped early, or empty."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from switchkd.base.errors import CheckpointError, ConfigError, DataError, ModelError
from switchkd.base.manifest import STAMP
from switchkd.base.plain import (
    Lines,
    TokenId,
    check_type,
    damaged_at,
    first,
    iter_lines,
    json_object,
    read_lines,
    read_yaml,
    related,
)
from switchkd.base.settings import from_dict, to_dict
from switchkd.crossing.bridge import Side
from switchkd.decoding.rollouts import RolloutRecord
from switchkd.evaluation.results import Evaluation, read_results
from switchkd.forward.ends import Ends
from switchkd.models.saved_student import SCORED, STUDENT, SavedStudent, scored_another
from switchkd.reports.steps import Steps
from switchkd.training.checkpoint import checkpoints, step_of
from switchkd.training.records import CONFIG, METRICS, ORIGIN, ROLLOUTS, SAMPLES, Count, StepRecord
from switchkd.training.settings import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Rule(TypedDict):
    name: str


class _Settings(TypedDict):
    """What is read of a run's settings; the rest of them is only shown."""

    method: str
    policy: _Rule
    objective: _Rule
    mix: _Rule
    teacher_model_name_or_path: str
    student_model_name_or_path: str
    teachers: dict[str, str]
    train_file: str | list[str]
    seed: int
    max_steps: int


class StepLine(StepRecord):
    """What every line of metrics.jsonl has; its other metrics are numbers too, or null."""

    num_tokens: Count
    seconds: float


class TextLine(RolloutRecord):
    """A line of rollouts.jsonl."""

    step: Count


class SampleLine(TextLine):
    """A line of samples.jsonl. Where the teacher has another tokenizer, what both models say is known at tokens that both have."""

    reference: str | None
    scores: dict[str, float]
    jsd: list[float | None]
    log_probs: tuple[list[float | None], list[float | None]]
    top: tuple[list[list[tuple[TokenId, float]]], list[list[tuple[TokenId, float]]]]


@related(SampleLine)
def _sample_by_token(record: Mapping[str, Any]) -> str:
    count = len(record["completion_ids"])
    lists = {"jsd": [record["jsd"]], "log_probs": record["log_probs"], "top": record["top"]}
    # A teacher with a tokenizer of its own says something of the tokens that match its own alone.
    across = "teacher_completion_ids" in record
    known = record["top"][:1] if across else record["top"]
    return first(
        {
            **{
                f"{name} has not an entry for each of {count} tokens": any(len(own) != count for own in both)
                for name, both in lists.items()
            },
            "a jsd is not in 0..1 bits": not all(0 <= value <= 1 for value in record["jsd"] if value is not None),
            "a token of top has no likely ones": not all(best for both in known for best in both),
            "jsd or log_probs has a null": not across
            and any(value is None for own in [record["jsd"], *record["log_probs"]] for value in own),
        }
    )


def trained_student(run: Path) -> str:
    """The folder of the student that a run made. Raises ConfigError, with the way out, where there is none yet."""
    if (run / STUDENT).is_dir():
        return str(run / STUDENT)
    saved = [str(folder) for folder in checkpoints(run) if step_of(folder)]
    instead = f", or name a checkpoint's student instead: --student {saved[-1]}" if saved else ""
    raise ConfigError(f"{run} has no student yet; finish it with `switchkd train {run} --resume`{instead}")


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds. ``evaluations`` are by the name of their file, and in it by model.

    ``settings`` are plain values: reading imports no rule of the run's own. ``looks`` are the step and the tokens of every line of
    samples.jsonl, which may be too long to hold.
    ``notes`` say what is there and is not shown: a student that is damaged, and scores of one that the run's student is not.
    """

    path: Path
    settings: dict[str, Any]
    metrics: Steps
    looks: list[tuple[int, int]]
    evaluations: dict[str, dict[str, Evaluation]]
    student: SavedStudent | None = None
    notes: tuple[str, ...] = ()

    @staticmethod
    def read(path: Path) -> RunRecord:
        """Raises ConfigError if ``path`` is no run directory, DataError for a line or file in it that is damaged."""
        settings = read_settings(path, _Settings)
        found: dict[str, dict[str, Evaluation]] = {}
        student, damaged = None, ""
        try:
            student = SavedStudent.of(path)
        except CheckpointError as error:
            damaged = str(error)
        notes = [damaged] if damaged else []
        for file in sorted(path.glob("evaluation*.json")):
            results = read_results(file)
            if wrong := (damaged and "the student that it scores is damaged") or _of_another(path, results):
                notes.append(f"{file}: {wrong}; they are not shown")
                results = {name: result for name, result in results.items() if name not in SCORED}
            found |= {file.stem: results} if results else {}
        looks = [(line["step"], len(line["completion_ids"])) for line in iter_lines(path / SAMPLES, SampleLine)]
        scores = [result.primary for result in found.get("evaluation", {}).values()]
        metrics = read_steps(path, settings, *scores[:1])
        return RunRecord(path, settings, metrics, looks, found, student, tuple(notes))

    @cached_property
    def config(self) -> TrainConfig:
        """The settings as the run had them, with its rules, which are imported if they are from elsewhere."""
        return read_config(self.path)

    @cached_property
    def samples(self) -> Lines:
        """All of samples.jsonl."""
        return self.samples_at(range(len(self.looks)))

    def samples_at(self, places: Collection[int]) -> Lines:
        """The lines of samples.jsonl at these places in ``looks``."""
        return list(iter_lines(self.path / SAMPLES, SampleLine, places))

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: there is a student, and of the last step."""
        if self.student is None:  # a version without stamps wrote it, or there is none
            return (self.path / STUDENT).is_dir() and not (self.path / STUDENT / STAMP).exists()
        return not self.metrics or self.student.step == self.metrics[-1]["step"]

    @cached_property
    def state(self) -> str:
        """How far the run came, in a sentence."""
        if not self.metrics:
            return "No step was finished: there are settings and nothing else."
        last = self.metrics[-1]["step"]
        if self.finished:
            return f"Finished after {last} step{'s' * (last != 1)}{self._student_words}."
        most = self.settings["max_steps"]
        of = f" of {most}" if most >= 0 else ""
        saved = checkpoints(self.path)
        where = f"its newest checkpoint is that of step {step_of(saved[-1])}" if saved else "it has no checkpoint"
        return f"Not finished: it was stopped after step {last}{of}, or is still running; {where}."

    @property
    def _student_words(self) -> str:
        if self.student is None:
            return ""
        best = f" of step {self.student.weights_of_step}" if self.student.weights_of_step != self.student.step else ""
        return f"; the student{best} has the checksum {self.student.sha256[:12]}"

    @cached_property
    def not_finite(self) -> dict[str, list[int]]:
        """Metrics that were NaN or infinite, and at which steps."""
        found: dict[str, list[int]] = {}
        for line in self.metrics:
            for name, value in line.items():
                if isinstance(value, float) and not math.isfinite(value):
                    found.setdefault(name, []).append(line["step"])
        return found

    def rollouts(self, most: int) -> Lines:
        """At most so many of the generated texts, evenly spread over training."""
        return read_lines(self.path / ROLLOUTS, TextLine, most)

    def rollouts_of(self, steps: Collection[int], most: int) -> dict[int, Lines]:
        """The first generated texts of each of these steps, at most so many."""
        found: dict[int, Lines] = {step: [] for step in steps}
        for record in iter_lines(self.path / ROLLOUTS, TextLine):
            if len(own := found.get(record["step"], [])) < most and record["step"] in found:
                own.append(record)
        return found

    @cached_property
    def two_tokenizers(self) -> bool:
        """Whether a teacher has another tokenizer than the student, as steps or the first of the texts say."""
        if any("cross/coverage" in line for line in self.metrics):
            return True
        files = (self.path / name for name in (ROLLOUTS, SAMPLES))
        return any(b'"teacher_completion_ids"' in _first_line(file) for file in files if file.is_file())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer, the student's where there are two, from what it saved, else from the model that it began with;
        raises ModelError if none is on this machine."""
        from switchkd.models.loading import load_tokenizer, made_folder

        saved = [self.path / STUDENT, *checkpoints(self.path)]
        own = (str(folder) for folder in saved if (folder / "tokenizer.json").is_file())
        begun = self.settings["teacher_model_name_or_path"]
        if self.two_tokenizers:
            begun = made_folder(self.settings["student_model_name_or_path"], "student")
        return load_tokenizer(next(own, begun), on_disk=True)

    def sides(self, teacher: str) -> tuple[Side, Side]:
        """How the student and the teacher of that name, which has another tokenizer, spell text.

        Raises ModelError if the tokenizer of one is not on this machine.
        """
        from switchkd.models.loading import load_tokenizer, made_folder

        if teacher in self._sides:
            return self._sides[teacher]
        names = {"": self.settings["teacher_model_name_or_path"], **self.settings["teachers"]}
        if teacher not in names:
            raise ModelError(f"the settings name no teacher {teacher!r}")
        read = load_tokenizer(made_folder(names[teacher], "teacher"), on_disk=True)
        return self._sides.setdefault(teacher, sides_of(self.tokenizer(), read))

    @cached_property
    def _sides(self) -> dict[str, tuple[Side, Side]]:
        return {}


def _first_line(file: Path) -> bytes:
    with file.open("rb") as lines:
        return lines.readline()


def sides_of(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> tuple[Side, Side]:
    """How two tokenizers spell text, for readings that are only shown."""
    own, other = (
        Side(each, len(each), Ends(() if each.eos_token_id is None else (each.eos_token_id,)), role)
        for each, role in ((student, "student"), (teacher, "teacher"))
    )
    return own, other


def _of_another(run: Path, results: Mapping[str, Evaluation]) -> str:
    return scored_another(run, {name: result.model for name, result in results.items()})


def read_config(run: Path) -> TrainConfig:
    """The settings of a run directory; raises ConfigError if it is none, or they are not settings."""
    _require_config(run)
    return from_dict(TrainConfig, read_yaml(run / CONFIG), str(run / CONFIG))


def read_settings(run: Path, kind: type) -> dict[str, Any]:
    """The settings of a run as plain values, defaults for those that it is too old to have; ``kind`` says what is read of them.

    Nothing in them is imported. Raises ConfigError if it is no run directory, DataError for what are no settings.
    """
    _require_config(run)
    try:
        settings = to_dict(TrainConfig()) | read_yaml(run / CONFIG)
        check_type(settings, kind)
    except (ConfigError, DataError) as error:
        raise DataError(f"{run} is no run directory, its {CONFIG} is not what switchkd writes: {error}") from error
    return settings


def _require_config(run: Path) -> None:
    if not run.exists():
        raise ConfigError(f"there is no run {run}{nearest_beside(run)}")
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run} is not a run directory: it has no {CONFIG}")


def nearest_beside(path: Path) -> str:
    """The name in the folder of ``path`` that is most like its own, as the end of an error; "" where none is."""
    names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name[:100], names, n=1)
    return f"; did you mean {str(path.parent / close[0])!r}?" if close else ""


def read_steps(run: Path, settings: Mapping[str, Any], primary: str = "") -> Steps:
    """The step metrics of a run of these settings, with the checksums of what it is on; ``primary`` is its main score."""
    return Steps(read_metrics(run), settings, run.resolve().name, checksums(read_origin(run)), primary)


def read_origin(run: Path) -> dict[str, Any]:
    """What a run began with, and the conditions it ran under; {} where it did not write that down."""
    try:
        return json_object((run / ORIGIN).read_bytes()) if (run / ORIGIN).is_file() else {}
    except (OSError, DataError) as error:
        raise DataError(f"{run / ORIGIN} cannot be read: {error}") from error


def checksums(origin: Mapping[str, Any]) -> dict[str, str]:
    """The checksums of text and models that a run began with, by the setting that names them."""
    known = {name: each.get("sha256") for name, each in origin.items() if isinstance(each, dict)}
    return {name: sha256 for name, sha256 in known.items() if isinstance(sha256, str)}


def read_metrics(run: Path) -> Lines:
    """The step metrics of a run, up to a line that was cut short; none where it has not begun."""
    file = run / METRICS
    lines = read_lines(file, StepLine)
    for number, line in enumerate(lines, start=1):
        with damaged_at(file, number):
            check_type({name: value for name, value in line.items() if name != "source"}, dict[str, float | None])
            if number > 1 and not (before := lines[number - 2])["step"] < line["step"]:
                raise DataError(f"step {line['step']} is there twice")
            if number > 1 and before["num_tokens"] > line["num_tokens"]:
                raise DataError(f"num_tokens falls from {before['num_tokens']} to {line['num_tokens']}")
    return lines


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names that tell the runs apart: the last part of each path, or as many as that takes."""
    for parts in range(1, max(len(path.resolve().parts) for path in paths) + 1):
        names = ["/".join(path.resolve().parts[-parts:]) for path in paths]
        if len(set(names)) == len(paths):
            return names
    raise ConfigError(f"a run is given twice: {', '.join(map(str, paths))}")
