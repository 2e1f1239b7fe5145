"""A run as Python sees it: its directory, and what lies there."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.api.show import Shown, scores_html, texts_html
from switchkd.base.errors import ModelError
from switchkd.base.plain import Lines
from switchkd.base.storage import write_file
from switchkd.decoding.rollouts import Rollout
from switchkd.evaluation.results import EVALUATION
from switchkd.models.loading import load_model, silent_libraries
from switchkd.models.members import folder_dtype
from switchkd.reports.record import RunRecord, trained_student

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from switchkd.evaluation.results import Evaluation


@dataclass(frozen=True)
class Run:
    """A run by its directory, which `distil` made or the command `train`; in a notebook it shows its scores and some texts.

    Raises ConfigError if ``path`` is no run directory, DataError for a file in it that is damaged, both when they are first read.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @cached_property
    def record(self) -> RunRecord:
        """All that the directory holds, checked."""
        return RunRecord.read(self.path)

    @cached_property
    def student(self) -> PreTrainedModel:
        """The trained student, loaded from ``student/`` in the dtype that it was saved in; an adapter sits on its base."""
        folder = trained_student(self.path)
        with silent_libraries():
            return load_model(folder, folder_dtype(folder))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of teacher and student."""
        return self.record.tokenizer()

    @property
    def metrics(self) -> Lines:
        """The lines of ``metrics.jsonl``: a dictionary for every step, such as ``{"step": 1, "loss": 0.7, …}``."""
        return list(self.record.metrics)

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """The scores of "teacher", "student before" and "student after", each with its values for every example."""
        return self.record.evaluations.get(Path(EVALUATION).stem, {})

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Their means: ``run.scores["student after"]["rouge_l"]``."""
        return {name: result.means() for name, result in self.evaluations.items()}

    def rollouts(self, most: int = 8) -> Shown:
        """At most so many of the texts that were generated in training, evenly spread over it. In a notebook they show who wrote
        which token; as a sequence they are `Rollout` objects."""
        texts = tuple(map(Rollout.from_json, self.record.rollouts(most)))
        teachers = {text.teacher for text in texts if text.teacher_completion_ids is not None}
        sides = {}
        for teacher in sorted(teachers):
            with suppress(
                ModelError
            ):  # a tokenizer that is not on this machine: texts then stand by the student's tokens
                sides[teacher] = self.record.sides(teacher)
        return Shown(texts, self.tokenizer, sides)

    def report(self, file: str | Path | None = None) -> Path:
        """Write the report, one HTML page that needs no network, and return its path; default ``report.html`` in the run."""
        from switchkd.reports.page import page

        place = Path(file) if file else self.path / "report.html"
        write_file(place, page([self.path]))
        return place

    def _repr_html_(self) -> str:
        parts: list[Any] = [f"<p><b>{escape(str(self.path))}</b>: {escape(self.record.state)}</p>"]
        parts += [scores_html(self.scores)] if self.scores else []
        texts = self.rollouts(3)
        parts += [texts_html(texts, self.tokenizer, texts.sides)] if len(texts) else []
        return "".join(parts)
