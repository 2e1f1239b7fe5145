"""Checkpoints, whole or absent: the one file that moves folders into place.

A checkpoint is a folder ``checkpoint-N`` with the student and tokenizer as ``from_pretrained`` opens them, the optimizer's
moments in safetensors, the trainer's state in JSON, and a manifest with size and SHA-256 of every file, written last.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from switchkd.adapters import has_adapter, load_adapter, save_adapter
from switchkd.errors import CheckpointError, ModelError

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"


@contextmanager
def staged_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """An empty sibling of ``target`` that takes its place if the block ends well, and is removed otherwise.

    An empty ``target`` is replaced; OSError if something else is there by then, unless ``replace`` says to remove it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{uuid4().hex}")
    staging.mkdir()
    try:
        yield staging
        for path in staging.rglob("*"):
            _sync(path)
        _sync(staging)
        if replace:
            shutil.rmtree(target, ignore_errors=True)
        os.replace(staging, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A path beside ``target`` for a file that takes its place if the block ends well, and is removed otherwise."""
    staging = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        yield staging
        _sync(staging)
        os.replace(staging, target)
        _sync(target.parent)
    finally:
        staging.unlink(missing_ok=True)


def write_file(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with staged_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save a model and its tokenizer into ``folder`` so that ``from_pretrained`` opens both; replaces what is there.

    Of a model with an adapter, the adapter alone is saved.
    """
    with staged_folder(folder, replace=True) as staging:
        _write_model(staging, model, tokenizer)


def save_checkpoint(
    run: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``run/checkpoint-step`` whole, then remove the oldest beyond ``keep``. An existing one stays as it is."""
    target = run / f"{PREFIX}{step}"
    if not target.exists():
        with staged_folder(target) as staging:
            _write_model(staging, model, tokenizer)
            save_file(_optimizer_tensors(model, optimizer), staging / "optimizer.safetensors")
            (staging / "state.json").write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
            (staging / MANIFEST).write_text(json.dumps(_manifest(staging), indent=1), encoding="utf-8")
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest first."""
    found = [p for p in run.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal() and (p / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is of."""
    return int(checkpoint.name.removeprefix(PREFIX))


def load_checkpoint(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Check every file against the manifest, then load weights and moments in place; returns the trainer's state.

    Raises:
        CheckpointError: a file is missing or damaged, or the checkpoint belongs to another model.
    """
    verify(folder)
    try:
        load_weights(folder, model)
    except (RuntimeError, ModelError) as error:
        raise CheckpointError(f"{folder} belongs to another model: {error}") from error
    _load_optimizer(folder, model, optimizer)
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest. Raises CheckpointError naming the first that differs."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {MANIFEST} cannot be read ({error})") from error
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; resume from another checkpoint of {folder.parent}")
        if path.stat().st_size != expected["size"] or _sha256(path) != expected["sha256"]:
            raise CheckpointError(
                f"{path} is damaged (not as written); resume from another checkpoint of {folder.parent}"
            )


def _write_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if has_adapter(model):
        save_adapter(model, folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Put the weights that ``save_model`` wrote, or the adapter's, into a model of that kind."""
    if has_adapter(model):
        load_adapter(model, folder)
    else:
        # Loading through the model's class undoes whatever its save_pretrained does to names and tied weights.
        saved = type(model).from_pretrained(
            folder, dtype=model.dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        model.load_state_dict(saved.state_dict())


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter name: ``name/exp_avg``, ``name/exp_avg_sq``, ``name/step``."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value.contiguous()
    return tensors


def _load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = load_file(folder / "optimizer.safetensors")
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter_name, key = name.rsplit("/", 1)
        if parameter_name not in parameters:
            raise CheckpointError(
                f"{folder}/optimizer.safetensors has a moment of {parameter_name}, which is not in the model"
            )
        parameter = parameters[parameter_name]
        optimizer.state[parameter][key] = value.to(parameter.device)


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Push a file or folder to the disk: a rename may otherwise survive a power cut that the contents do not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
