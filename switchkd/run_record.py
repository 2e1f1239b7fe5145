"""A run directory as it lies on disk, whatever its state: finished, still running, stopped early, or empty."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from switchkd.checkpoint import checkpoints, step_of
from switchkd.config import TrainConfig, from_dict, to_dict
from switchkd.errors import ConfigError, DataError
from switchkd.plain import Lines, TokenId, check_type, damaged_at, iter_lines, json_object, read_lines, read_yaml
from switchkd.results import Evaluation, read_results
from switchkd.rollouts import RolloutRecord
from switchkd.steps import Steps
from switchkd.storage import sync, written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG, ORIGIN = "config.yaml", "origin.json"
METRICS, ROLLOUTS, SAMPLES = RECORDS = ("metrics.jsonl", "rollouts.jsonl", "samples.jsonl")


class _Checksum(TypedDict):
    sha256: str


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
    train_file: str
    seed: int
    max_steps: int


class _Step(TypedDict):
    """What every line of every record has."""

    step: int


class StepLine(_Step):
    """What every line of metrics.jsonl has; its other metrics are numbers too, or null."""

    num_tokens: int
    seconds: float


class TextLine(RolloutRecord):
    """A line of rollouts.jsonl."""

    step: int


class SampleLine(TextLine):
    """A line of samples.jsonl."""

    reference: str | None
    scores: dict[str, float]
    jsd: list[float]
    log_probs: tuple[list[float], list[float]]
    top: tuple[list[list[tuple[TokenId, float]]], list[list[tuple[TokenId, float]]]]


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds. ``evaluations`` are by the name of their file, and in it by model.

    ``settings`` are plain values: reading imports no rule of the run's own. ``looks`` are the step and the tokens of every line of
    samples.jsonl, which may be too long to hold.
    """

    path: Path
    settings: dict[str, Any]
    metrics: Steps
    looks: list[tuple[int, int]]
    evaluations: dict[str, dict[str, Evaluation]]

    @staticmethod
    def read(path: Path) -> RunRecord:
        """Raises ConfigError if ``path`` is no run directory, DataError for a line or file in it that is damaged."""
        settings = read_settings(path, _Settings)
        found = {each.stem: read_results(each) for each in sorted(path.glob("evaluation*.json"))}
        looks = [(line["step"], len(line["completion_ids"])) for line in iter_lines(path / SAMPLES, SampleLine)]
        scores = [result.primary for result in found.get("evaluation", {}).values()]
        return RunRecord(path, settings, read_steps(path, settings, *scores[:1]), looks, found)

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
        """Whether the run came to its end: the student is the last thing that it writes."""
        return (self.path / "student").is_dir()

    @cached_property
    def state(self) -> str:
        """How far the run came, in a sentence."""
        if not self.metrics:
            return "No step was finished: there are settings and nothing else."
        last = self.metrics[-1]["step"]
        if self.finished:
            return f"Finished after {last} steps."
        most = self.settings["max_steps"]
        of = f" of {most}" if most >= 0 else ""
        saved = checkpoints(self.path)
        where = f"its newest checkpoint is that of step {step_of(saved[-1])}" if saved else "it has no checkpoint"
        return f"Not finished: it was stopped after step {last}{of}, or is still running; {where}."

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

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer, from what it saved, else from its teacher; raises ModelError if neither is on this machine."""
        from switchkd.models import load_tokenizer

        saved = [self.path / "student", *checkpoints(self.path)]
        own = (str(folder) for folder in saved if (folder / "tokenizer.json").is_file())
        return load_tokenizer(next(own, self.settings["teacher_model_name_or_path"]), on_disk=True)


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
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run} is not a run directory: it has no {CONFIG}")


def read_steps(run: Path, settings: Mapping[str, Any], primary: str = "") -> Steps:
    """The step metrics of a run of these settings, with the checksums of what it is on; ``primary`` is its main score."""
    return Steps(read_metrics(run), settings, run.resolve().name, _checksums(run), primary)


def _checksums(run: Path) -> dict[str, str]:
    """What origin.json says of text and models; {} where there is none."""
    try:
        found = json_object((run / ORIGIN).read_bytes()) if (run / ORIGIN).is_file() else {}
        check_type(found, dict[str, _Checksum])
    except (OSError, DataError) as error:
        raise DataError(f"{run / ORIGIN} cannot be read: {error}") from error
    return {name: each["sha256"] for name, each in found.items()}


def read_metrics(run: Path) -> Lines:
    """The step metrics of a run, up to a line that was cut short; none where it has not begun."""
    file = run / METRICS
    lines = read_lines(file, StepLine)
    for number, line in enumerate(lines, start=1):
        with damaged_at(file, number):
            check_type({name: value for name, value in line.items() if name != "source"}, dict[str, float | None])
    return lines


def keep_until(file: Path, step: int) -> None:
    """Cut off the lines of steps after ``step``, and a last line that was cut short; raises DataError for one that is damaged."""
    if not file.is_file():
        return
    end = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            with damaged_at(file, number):
                record = json_object(line)
                check_type(record, _Step)
            if record["step"] > step:
                break
            end += len(line)
    with written(file):
        os.truncate(file, end)


def sync_records(run: Path) -> None:
    """Push the records to the disk, before a checkpoint says that they reach so far."""
    for name in RECORDS:
        if (run / name).is_file():
            with written(run / name):
                sync(run / name)


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names that tell the runs apart: the last part of each path, or as many as that takes."""
    for parts in range(1, max(len(path.resolve().parts) for path in paths) + 1):
        names = ["/".join(path.resolve().parts[-parts:]) for path in paths]
        if len(set(names)) == len(paths):
            return names
    raise ConfigError(f"a run is given twice: {', '.join(map(str, paths))}")
