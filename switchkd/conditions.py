"""What a run's numbers depend on beside settings, text and weights: the machine, versions, and code of the user's own."""

import hashlib
import inspect
import os
import platform
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from switchkd import __version__
from switchkd.config import NOUNS, TrainConfig, name_of
from switchkd.errors import SwitchKDWarning
from switchkd.manifest import file_sha256

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
