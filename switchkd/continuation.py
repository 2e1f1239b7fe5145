"""How a run goes on: with the settings, text and models that it was started with, from the newest checkpoint that is whole."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from switchkd.checkpoint import BEST, PREFIX, bests, checkpoints, numbered, read_state, step_of
from switchkd.conditions import Conditions, with_now
from switchkd.config import FREE_ON_RESUME, TrainConfig, to_dict
from switchkd.data import TokenizedExample
from switchkd.errors import CheckpointError, ConfigError, DataError, SwitchKDWarning
from switchkd.lock import LOCK
from switchkd.manifest import STAMP, put_aside, read_record, take_away, verify
from switchkd.models import default_device
from switchkd.plain import check_type
from switchkd.precision import with_dtypes
from switchkd.results import EVALUATION, completions_file, read_results, take_out
from switchkd.run_record import CONFIG, METRICS, ORIGIN, ROLLOUTS, SAMPLES, keep_until, read_config
from switchkd.saved_student import SCORED, STUDENT, SavedStudent
from switchkd.storage import is_leftover, write_file
from switchkd.teacher_store import json_sha256

CONDITIONS = "conditions"
# What a run writes before its first checkpoint. It makes them anew.
_EARLY = {CONFIG, ORIGIN, LOCK, EVALUATION, completions_file(Path(EVALUATION)).name, "trackers"}


# --- whether it may -----------------------------------------------------------------------------------------------


def check_run(run: Path, config: TrainConfig) -> None:
    """Raise ConfigError for a directory that holds something, or one to resume that was started with other settings."""
    if config.resumes:
        before, now = (
            to_dict(with_dtypes(each, default_device())) for each in (read_config(run), on_recorded_day(run, config))
        )
        free = FREE_ON_RESUME | set(config.allow_change)
        _refuse(run, {k: f"{before[k]!r} -> {now[k]!r}" for k in now if before[k] != now[k] and k not in free})
    elif begun(run):
        raise ConfigError(f"{run} already exists and is not empty; choose another --output-dir, or go on with --resume")


def on_recorded_day(run: Path, config: TrainConfig) -> TrainConfig:
    """``config`` with the day that the prompts of a run to resume are of, unless it names another."""
    if not config.resumes or config.template_date:
        return config
    return replace(config, template_date=read_config(run).template_date)


def begun(run: Path) -> bool:
    """Whether a directory holds more than a run writes before its first checkpoint.

    Settings without the checksums that a run writes before them are somebody's own, and would be written over.
    """
    names = {path.name for path in run.iterdir() if not is_leftover(path)} if run.exists() else set()
    return not (names <= _EARLY and (ORIGIN in names or names <= {LOCK}))


def check_origin(
    run: Path,
    config: TrainConfig,
    texts: Mapping[str, Sequence[TokenizedExample]],
    models: Mapping[str, str],
    conditions: Conditions,
) -> None:
    """Note in the run directory which text, models and code it is on, or raise ConfigError if it was started on others.

    ``texts``, and the checksums in ``models``, are by the setting that names them, which is also what allows them to change.
    ``conditions`` may change, with a warning; those that it has been under are noted.
    """
    now: dict[str, Any] = {name: _fingerprint(examples) for name, examples in texts.items()}
    now |= {name: {"sha256": sha256} for name, sha256 in models.items()}
    file, before = run / ORIGIN, dict[str, Any]()
    if config.resumes and file.is_file():
        before = _read_origin(file)
        differing = [k for k in now if before.get(k) != now[k] and k not in config.allow_change]
        _refuse(run, {k: f"other contents ({_words(before.get(k))} -> {_words(now[k])})" for k in differing})
    now[CONDITIONS] = with_now(run, before.get(CONDITIONS, []), conditions)
    write_file(file, json.dumps(now, indent=1))


class _Counted(TypedDict, total=False):
    examples: int


class _Fingerprint(_Counted):
    """What origin.json says of a text or model: a checksum, and of a text the number of its examples."""

    sha256: str


def _read_origin(file: Path) -> dict[str, Any]:
    try:
        found = read_record(file, dict[str, Any])
        try:
            check_type(found.get(CONDITIONS, []), list[dict[str, Any]], CONDITIONS)
            check_type({name: value for name, value in found.items() if name != CONDITIONS}, dict[str, _Fingerprint])
        except DataError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; whether the run is still on the text and models that it began with cannot be told. "
            f"If you know that it is, delete {file} and resume again"
        ) from error
    return found


def _fingerprint(examples: Sequence[TokenizedExample]) -> dict[str, int | str]:
    """Number and checksum of the examples as the models read them."""
    rows = [(e.id, e.prompt_ids, e.completion_ids, e.references, e.teacher, e.teacher_prompt_ids) for e in examples]
    return {"examples": len(rows), "sha256": json_sha256(rows)}


def _words(fingerprint: Mapping[str, int | str] | None) -> str:
    if not fingerprint:
        return "none"
    count = f"{fingerprint['examples']} examples, " if "examples" in fingerprint else ""
    return f"{count}sha256 {str(fingerprint['sha256'])[:12]}…"


def _refuse(run: Path, differing: Mapping[str, str]) -> None:
    if differing:
        raise ConfigError(
            f"{run} was started otherwise: {'; '.join(f'{name}: {what}' for name, what in differing.items())}. Resume with what it "
            f"had, start anew, or allow it: --allow-change {' '.join(differing)}"
        )


# --- from where ---------------------------------------------------------------------------------------------------


def whole_checkpoint(run: Path, resume_from: str = "", with_best: bool = True) -> Path:
    """The checkpoint to go on from: the newest that is whole, with a warning if newer ones are not; or the one that is named.

    ``with_best``: the best student so far, if there is one, must be whole too.

    Raises:
        CheckpointError: there is none that is whole, or the named one is not.
    """
    found = [_named(run, resume_from)] if resume_from else checkpoints(run)[::-1]
    damaged: list[CheckpointError] = []
    for folder in found:
        try:
            _verify_all(folder, with_best)
        except CheckpointError as error:
            damaged.append(error)
            continue
        if damaged:
            warnings.warn(
                f"{'; '.join(map(str, damaged))}. The run goes on from {folder}", SwitchKDWarning, stacklevel=2
            )
        return folder
    others = ", ".join(folder.name for folder in checkpoints(run) if folder not in found)
    out = f"there {'are' if ',' in others else 'is'} {others}: give --resume-from, or --resume for the newest that is whole"
    raise CheckpointError(
        f"{'; '.join(map(str, damaged)) or f'{run} holds no checkpoint to resume from'}; "
        + (out if others else "start without --resume, in another --output-dir")
    )


def _named(run: Path, resume_from: str) -> Path:
    """``run/checkpoint-N`` from its path or name."""
    folder = run / Path(resume_from).name
    if Path(resume_from).name != resume_from and Path(resume_from).resolve() != folder.resolve():
        raise CheckpointError(f"resume_from {resume_from} does not lie in {run}, the run that is to go on")
    if folder not in numbered(run, PREFIX):
        known = ", ".join(each.name for each in checkpoints(run)) or "none"
        raise CheckpointError(f"resume_from {resume_from}: no such checkpoint; {run} holds {known}")
    return folder


def _verify_all(folder: Path, with_best: bool) -> None:
    """Verify a checkpoint, and the best student that goes with it."""
    verify(folder)
    if (best := read_state(folder)["best"]) and with_best:
        try:
            verify(folder.parent / f"{BEST}{best['step']:g}")
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; {folder.name} is whole, and goes on without that best student if you allow it to be forgotten: "
                "--allow-change metric_for_best_model"
            ) from error


def take_back(run: Path, step: int, told: int, ended: bool) -> None:
    """Make the directory what it was at ``step``, with metrics up to step ``told``: it is from there that the run goes on.

    Later lines of the records go, and so do later best students, which are made again. Later checkpoints are set aside, and so are
    the student and its scores, unless they are of this step and the run has ``ended`` with it.
    """
    for folder in numbered(run, PREFIX):
        if step_of(folder) > step:
            _set_aside(folder, "is later than the step that the run goes on from")
    for folder in bests(run):
        if step_of(folder) > step:
            take_away(folder)
    _take_back_student(run, step, ended)
    for name, last in ((ROLLOUTS, step), (METRICS, told), (SAMPLES, told)):
        keep_until(run / name, last)


def _take_back_student(run: Path, step: int, ended: bool) -> None:
    """Put the student and its scores aside, unless they are what a run that has ``ended`` at this step would write again."""
    try:
        student = SavedStudent.of(run)
    except CheckpointError:
        student = None
    folder = run / STUDENT
    if ended and (student.step == step if student else not (folder / STAMP).exists()):
        return
    if os.path.lexists(folder):
        _set_aside(folder, f"is the student of another step than {step}, from which the run goes on")
    for file in sorted(run.glob("evaluation*.json")):
        if _scores_a_student(file):
            _set_aside(file, f"has scores of another student than that of step {step}, from which the run goes on")
            put_aside(completions_file(file))


def _scores_a_student(file: Path) -> bool:
    """Whether an evaluation is of a run's student; of the run's own, only that part is taken out where there is another."""
    try:
        results = read_results(file)
    except DataError:
        return False  # nobody reads its scores
    scored = any(name in SCORED for name in results)
    return scored and not (file.name == EVALUATION and take_out(file, results, SCORED))


def _set_aside(path: Path, why: str) -> None:
    warnings.warn(f"{path} {why}: it is now {put_aside(path)}, and may be deleted", SwitchKDWarning, stacklevel=4)
