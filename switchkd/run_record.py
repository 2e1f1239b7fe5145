"""A run directory as it lies on disk, whatever its state: finished, still running, stopped early, or empty."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from switchkd.checkpoint import checkpoints, step_of
from switchkd.config import TrainConfig, from_dict
from switchkd.errors import ConfigError
from switchkd.plain import Lines, TokenId, check_type, damaged_at, iter_lines, json_object, read_lines, read_yaml
from switchkd.results import Evaluation, read_results
from switchkd.rollouts import RolloutRecord
from switchkd.storage import sync, written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "config.yaml"
METRICS, ROLLOUTS, SAMPLES = RECORDS = ("metrics.jsonl", "rollouts.jsonl", "samples.jsonl")


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


def trained_student(run: Path) -> str:
    """The folder of the student that a run made. Raises ConfigError, with the way out, where there is none yet."""
    if (run / "student").is_dir():
        return str(run / "student")
    saved = [str(folder) for folder in checkpoints(run) if step_of(folder)]
    instead = f", or name a checkpoint's student instead: --student {saved[-1]}" if saved else ""
    raise ConfigError(f"{run} has no student yet; finish it with `switchkd train {run} --resume`{instead}")


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds. ``evaluations`` are by the name of their file, and in it by model."""

    path: Path
    config: TrainConfig
    metrics: Lines
    samples: Lines
    evaluations: dict[str, dict[str, Evaluation]]

    @staticmethod
    def read(path: Path) -> RunRecord:
        """Raises ConfigError if ``path`` is no run directory, DataError for a line or file in it that is damaged."""
        config = read_config(path)
        found = {each.stem: read_results(each) for each in sorted(path.glob("evaluation*.json"))}
        return RunRecord(path, config, read_metrics(path), read_lines(path / SAMPLES, SampleLine), found)

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
        of = f" of {self.config.max_steps}" if self.config.max_steps >= 0 else ""
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
        """The run's tokenizer, from what it saved, else from its teacher; raises ModelError if neither can be had."""
        from switchkd.models import load_tokenizer

        saved = [self.path / "student", *checkpoints(self.path)]
        for folder in saved:
            if (folder / "tokenizer.json").is_file():
                return load_tokenizer(str(folder))
        return load_tokenizer(self.config.teacher_model_name_or_path)


def read_config(run: Path) -> TrainConfig:
    """The settings of a run directory; raises ConfigError if it is none, or they are not settings."""
    file = run / CONFIG
    if not file.is_file():
        raise ConfigError(f"{run} is not a run directory: it has no {CONFIG}")
    return from_dict(TrainConfig, read_yaml(file), str(file))


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
