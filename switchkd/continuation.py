"""How a run goes on: with the settings, text and models that it was started with, from the newest checkpoint that is whole."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from switchkd.checkpoint import BEST, PREFIX, checkpoints, numbered, read_state, step_of, verify
from switchkd.config import FREE_ON_RESUME, TrainConfig, to_dict
from switchkd.data import TokenizedExample
from switchkd.errors import CheckpointError, ConfigError, SwitchKDWarning
from switchkd.lock import LOCK
from switchkd.models import default_device
from switchkd.precision import with_dtypes
from switchkd.run_record import CONFIG, METRICS, ORIGIN, ROLLOUTS, SAMPLES, keep_until, read_config
from switchkd.storage import discard, set_aside, write_file
from switchkd.teacher_store import json_sha256

# --- whether it may -----------------------------------------------------------------------------------------------


def check_run(run: Path, config: TrainConfig) -> None:
    """Raise ConfigError for a directory that holds something, or one to resume that was started with other settings."""
    if config.resumes:
        before, now = (to_dict(with_dtypes(each, default_device())) for each in (read_config(run), config))
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
    """Whether a directory holds more than a run writes that was stopped before it had scored anything."""
    return run.exists() and any(path.name not in (CONFIG, ORIGIN, LOCK) for path in run.iterdir())


def check_origin(
    run: Path, config: TrainConfig, texts: Mapping[str, Sequence[TokenizedExample]], models: Mapping[str, str]
) -> None:
    """Note in the run directory which text and models it is on, or raise ConfigError if it was started on others.

    ``texts``, and the checksums in ``models``, are by the setting that names them, which is also what allows them to change.
    """
    now: dict[str, Any] = {name: _fingerprint(examples) for name, examples in texts.items()}
    now |= {name: {"sha256": sha256} for name, sha256 in models.items()}
    file = run / ORIGIN
    if config.resumes and file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        differing = [k for k in now if before.get(k) != now[k] and k not in config.allow_change]
        _refuse(run, {k: f"other contents ({_words(before.get(k))} -> {_words(now[k])})" for k in differing})
    write_file(file, json.dumps(now, indent=1))


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


def whole_checkpoint(run: Path, resume_from: str = "") -> Path:
    """The checkpoint to go on from: the newest that is whole, with a warning if newer ones are not; or the one that is named.

    Raises:
        CheckpointError: there is none that is whole, or the named one is not.
    """
    found = [_named(run, resume_from)] if resume_from else checkpoints(run)[::-1]
    damaged: list[CheckpointError] = []
    for folder in found:
        try:
            _verify_all(folder)
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


def _verify_all(folder: Path) -> None:
    """Verify a checkpoint, and the best student that goes with it."""
    verify(folder)
    if best := read_state(folder)["best"]:
        verify(folder.parent / f"{BEST}{best['step']}")


def take_back(run: Path, step: int, told: int) -> None:
    """Make the directory what it was at ``step``, with metrics up to step ``told``: it is from there that the run goes on.

    Later lines of the records go, and so do later best students, which are made again. Later checkpoints are set aside.
    """
    for folder in numbered(run, PREFIX):
        if step_of(folder) > step:
            warnings.warn(
                f"{folder} is later than the step that the run goes on from: it is now {set_aside(folder)}, and may be deleted",
                SwitchKDWarning,
                stacklevel=2,
            )
    for folder in numbered(run, BEST):
        if step_of(folder) > step:
            discard(folder)
    for name, last in ((ROLLOUTS, step), (METRICS, told), (SAMPLES, told)):
        keep_until(run / name, last)
