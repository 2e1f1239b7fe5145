"""The student that a run ended with, as it lies on the disk, and whether what is said of a student is said of that one.

student.json, in the run's ``student/``, says of which step it is; its manifest has the checksums of all of its files. Scores name
both, so that those of a student that is gone, or was replaced, are never shown as another's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from switchkd.base.errors import CheckpointError, ModelError
from switchkd.base.manifest import MANIFEST, STAMP, file_sha256, read_manifest, read_record, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


STUDENT = "student"
SCORED = ("student after", "student")  # a run's student in its own evaluation, and in one that was made later
_NUMBERED = re.compile(r"(checkpoint|best)-\d+")


class Stamp(TypedDict):
    """What student.json holds: the steps that the run had had, and the step that the weights are of, perhaps an earlier one."""

    step: int
    weights_of_step: int


@dataclass(frozen=True)
class SavedStudent:
    """A student on the disk; ``sha256`` is the checksum of its manifest, and with that of every file."""

    folder: Path
    step: int
    weights_of_step: int
    sha256: str

    @staticmethod
    def of(run: Path) -> SavedStudent | None:
        """The student of a run directory; None where there is none, or one of a version that did not stamp it.

        Raises CheckpointError for one that is not whole, as far as names and sizes tell.
        """
        folder = run / STUDENT
        if not (folder / STAMP).is_file():
            return None
        stamp, manifest = read_record(folder / STAMP, Stamp), read_manifest(folder)
        for name, entry in manifest.items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != entry["size"]:
                raise CheckpointError(f"{file} is damaged: it is missing, or not as it was written; {way_out(run)}")
        sha256 = file_sha256(folder / MANIFEST)
        return SavedStudent(folder, stamp["step"], stamp["weights_of_step"], sha256)

    def mark(self) -> dict[str, str]:
        """What scores say of the student that they are of."""
        return {"student_sha256": self.sha256, "step": str(self.step)}


# Of a generation config: what matters to sampling alone, and to beams alone.
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_OF_BEAMS = ("early_stopping", "length_penalty")


def settle_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Make a model's generation config one that can be saved, and that ``generate`` obeys as before; returns what there is to say.

    transformers reads a config that names a temperature and does not sample, with a warning, and writes none. What has no effect is
    taken out of it. Where it names no token to pad with, the tokenizer's own is taken. Raises ModelError for what it cannot be.
    """
    config = model.generation_config
    idle: tuple[str, ...] = () if config.do_sample else _OF_SAMPLING
    idle += _OF_BEAMS if (config.num_beams or 1) == 1 else ()
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = tokenizer.pad_token_id
    try:
        config.validate(strict=True)
        return ()
    except ValueError:
        known = {name: value for name in idle if (value := getattr(config, name, None)) is not None}
    for name in known:
        setattr(config, name, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ModelError(f"the student's generation_config.json could not be saved: {error}; correct it") from error
    said = ", ".join(f"{name} {value}" for name, value in known.items())
    return (
        f"note: the student's generation_config.json names {said}, and switches off what that is for (do_sample, num_beams): it "
        "has no effect, cannot be saved, and is left out. Set do_sample to true there if texts are to be sampled",
    )


def way_out(run: Path) -> str:
    return f"write it again with `switchkd train {run} --resume`"


def scored_another(run: Path, models: Mapping[str, Mapping[str, str]]) -> str:
    """Why scores of these ``models``, by name, are not of the run's student; "" if they are, or if that cannot be told.

    It cannot where the student was taken out, or where a version without stamps wrote both. Raises CheckpointError as
    ``SavedStudent.of``.
    """
    student, folder = SavedStudent.of(run), run / STUDENT
    for model in (models[name] for name in SCORED if name in models):
        step, sha256 = model.get("step", "unknown"), model.get("student_sha256")
        if student is None and sha256 and folder.is_dir():
            return f"its scores are of the student of step {step}, and {folder} does not say of which step it is"
        if student is not None and sha256 != student.sha256:
            return f"its scores are of the student of step {step}, and {folder} is another one, of step {student.step}"
    return ""


def verify_saved(folder: Path) -> None:
    """Raise CheckpointError if a folder that a run wrote, a student or checkpoint, is not as it was written."""
    marked = (folder / STAMP).is_file() or (_NUMBERED.fullmatch(folder.name) and (folder / MANIFEST).is_file())
    if not marked:
        return
    try:
        verify(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. If somebody changed it on purpose, delete {STAMP} and {MANIFEST} in {folder}, and it is opened as it is"
        ) from error
