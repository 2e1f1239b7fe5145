"""How a run goes on: with the settings, text and models that it was started with, from the newest checkpoint that is whole."""

import hashlib
import inspect
import json
import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch

from switchkd.base import __version__
from switchkd.base.errors import CheckpointError, ConfigError, DataError, SwitchKDWarning
from switchkd.base.lock import LOCK
from switchkd.base.manifest import file_sha256, json_sha256, read_record
from switchkd.base.plain import check_type
from switchkd.base.settings import to_dict
from switchkd.base.storage import is_leftover, write_file
from switchkd.data.settings import AUTO
from switchkd.data.texts import TokenizedExample
from switchkd.evaluation.results import EVALUATION, completions_file
from switchkd.methods.rules import NOUNS, name_of
from switchkd.models.loading import default_device
from switchkd.models.settings import is_address, with_dtypes
from switchkd.reports.record import read_config
from switchkd.training.records import CONFIG, ORIGIN
from switchkd.training.settings import FREE_ON_RESUME, TrainConfig

CONDITIONS = "conditions"
ROWS = "given-rows"  # the folder of a run in which rows lie that were given in Python and not as a file
TEACHER = "teacher_model_name_or_path"
# What a run writes before its first checkpoint. It makes them anew.
_EARLY = {CONFIG, ORIGIN, LOCK, EVALUATION, completions_file(Path(EVALUATION)).name, "trackers", ROWS}

# --- what numbers depend on beside settings -----------------------------------------------------------------------
Conditions = dict[str, Any]  # JSON-ready
# Environment variables by which libraries are told to round otherwise.
_ROUNDING = ("ATEN_CPU_CAPABILITY", "CUBLAS_", "CUDNN_", "DNNL_", "MKL_", "NVIDIA_TF32", "ONEDNN_", "TORCH_ALLOW_TF32")


def conditions(device: torch.device, processes: int) -> Conditions:
    """The machine and the versions of this process; nothing that names its place, user or host."""
    cpu = f"cpu, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": cpu
        if device.type == "cpu"
        else torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else device.type,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "python": platform.python_version(),
        "switchkd": __version__,
        **{package: version(package) for package in ("torch", "transformers", "tokenizers")},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_ROUNDING)},
    }


def with_now(run: Path, before: Sequence[Conditions], now: Conditions) -> list[Conditions]:
    """The conditions that a run has been under, in order; warns of what is other ``now``, which may round otherwise."""
    if not before:
        return [now]
    last = before[-1]
    if differing := [name for name in now if last.get(name) != now[name]]:
        words = "; ".join(f"{name}: {last.get(name)!r} -> {now[name]!r}" for name in differing)
        warnings.warn(
            f"{run} goes on under other conditions ({words}): its numbers may round otherwise than if it had not stopped",
            SwitchKDWarning,
            stacklevel=2,
        )
        return [*before, now]
    return list(before)


def own_code(config: TrainConfig) -> dict[str, str]:
    """Checksums of the files of rules that do not ship with the package, by the setting that names the rule."""
    found = {}
    for noun, (_, known) in NOUNS.items():
        rule = type(getattr(config, noun))
        if rule not in known.values():
            try:
                found[noun] = file_sha256(Path(inspect.getfile(rule)))
            except (OSError, TypeError):  # typed into a session: there is no file
                found[noun] = hashlib.sha256(name_of(getattr(config, noun)).encode()).hexdigest()
    return found


# --- whether it may -----------------------------------------------------------------------------------------------


def check_run(run: Path, config: TrainConfig) -> None:
    """Raise ConfigError for a directory that holds something, or one to resume that was started with other settings."""
    if config.resumes:
        before, now = (
            to_dict(with_dtypes(each, default_device())) for each in (read_config(run), as_recorded(run, config))
        )
        free = FREE_ON_RESUME | set(config.allow_change)
        if is_address(before[TEACHER]) and is_address(now[TEACHER]):  # a server may move; what it serves is compared
            free.add(TEACHER)
        _refuse(run, {k: f"{before[k]!r} -> {now[k]!r}" for k in now if before[k] != now[k] and k not in free})
    elif begun(run):
        raise ConfigError(f"{run} already exists and is not empty; choose another --output-dir, or go on with --resume")


def as_recorded(run: Path, config: TrainConfig) -> TrainConfig:
    """``config`` with what a run to resume found out at its start, unless it says otherwise: the template of its prompts, the day
    that they are of, what its rounds cost, and the learning rate for a student of that size."""
    found = [name for name in ("template_date", "costs", "learning_rate") if getattr(config, name) in ("", (), None)]
    found += ["template"] if config.template == AUTO else []
    if not config.resumes or not found:
        return config
    before = read_config(run)
    return replace(config, **{name: getattr(before, name) for name in found})


def begun(run: Path) -> bool:
    """Whether a directory holds more than a run writes before its first checkpoint.

    Settings without the checksums that a run writes before them are somebody's own, and would be written over.
    """
    names = {path.name for path in run.iterdir() if not is_leftover(path)} if run.exists() else set()
    return not (names <= _EARLY and (ORIGIN in names or names <= {LOCK, ROWS}))


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
