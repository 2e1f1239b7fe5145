"""Checkpoints, whole or absent.

A checkpoint is a folder ``checkpoint-N`` with the student and tokenizer as ``from_pretrained`` opens them, the optimizer's
moments in safetensors, the trainer's state in JSON, and a manifest with size and SHA-256 of every file, written last: a folder
without one is none, whatever else is in it. Weights and moments are as they are updated, in float32 or wider. The best student
that evaluations saw lies in ``best-N``, with such a manifest.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from switchkd.base.errors import CheckpointError, DiskError, ModelError
from switchkd.base.manifest import (
    MANIFEST,
    STAMP,
    make_room,
    read_manifest,
    read_record,
    take_away,
    verify,
    write_manifest,
)
from switchkd.base.plain import first, related, shown
from switchkd.base.storage import free_bytes, staged_folder
from switchkd.decoding.rollouts import RolloutRecord
from switchkd.forward.sharding import full, shard_like, state_of
from switchkd.models.adapters import has_adapter, load_adapter, save_adapter
from switchkd.models.saved_student import Stamp
from switchkd.models.vocabulary import save_tokenizer
from switchkd.training.optimizer import Masters

STATE, OPTIMIZER = "state.json", "optimizer.safetensors"
PREFIX, BEST = "checkpoint-", "best-"

Weights = Mapping[str, Tensor]  # the masters by parameter name, whole
Moments = dict[str, Tensor]  # AdamW's state by parameter name: ``name/exp_avg``, ``name/exp_avg_sq``, ``name/step``


class _Meaning(TypedDict, total=False):
    """What the rest of a state is of; checkpoints of old versions do not say it."""

    best_of: str
    rules: dict[str, str]
    rows: Annotated[int, range(2**63)]
    rows_per_step: Annotated[int, range(1, 2**31)]
    rows_per_rank: Annotated[int, range(1, 2**31)]


class State(_Meaning):
    """What state.json holds: all of a trainer that moves, but for weights and moments."""

    step: int
    num_tokens: int
    seconds: float
    best: dict[str, float]
    due: dict[str, Any] | None
    objective: dict[str, Any]
    mix: dict[str, Any]
    replay: list[RolloutRecord]


@related(State)
def _of_one_step(state: Mapping[str, Any]) -> str:
    step, best, due = state["step"], state["best"], state["due"]
    return first(
        {
            "step, num_tokens and seconds count from 0": not (
                step >= 0 and state["num_tokens"] >= 0 and 0 <= state["seconds"] < math.inf
            ),
            f"best is {shown(best)}, and step {step}": bool(best)
            and not (best.keys() == {"step", "score"} and best["step"] in range(1, step + 1)),
            f"due is {shown(due)}, and step {step}": bool(due) and due.get("step") != step,
            f"{step} steps read only {state.get('rows')} rows": state.get("rows", step) < step,
        }
    )


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Weights | None = None,
    dtype: torch.dtype | None = None,
    stamp: Stamp | None = None,
) -> None:
    """Save a model and its tokenizer into ``folder`` so that ``from_pretrained`` opens both, with a manifest of all files.

    What was written there before is replaced; anything else that lies there is put aside, with a warning. Of a model with an
    adapter, the adapter alone is saved. ``weights`` take the place of the model's own by these names, and all are saved in
    ``dtype`` (None: as they are). ``stamp`` says which of a run's students it is.
    """
    make_room(folder)
    with staged_folder(folder, replace=True, needs=_bytes(_saved_weights(model, weights or {}))) as staging:
        _write_model(staging, model, tokenizer, weights or {}, dtype)
        if stamp is not None:
            (staging / STAMP).write_text(json.dumps(stamp), encoding="utf-8")
        write_manifest(staging)


def save_checkpoint(
    run: Path,
    state: State,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Weights,
    moments: Moments,
    keep: int,
) -> Path:
    """Write ``run/checkpoint-step``, the model with these ``weights``, and read it back; when it is whole, the oldest go.

    The newest ``keep`` stay. A checkpoint of this step that is there already stays as it is.

    Raises DiskError where it cannot be written, and CheckpointError if the disk does not give back what was written.
    """
    target = run / f"{PREFIX}{state['step']}"
    if not target.exists():
        needs = _bytes([*_saved_weights(model, weights), *moments.values()])
        with staged_folder(target, needs=needs) as staging:
            _write_model(staging, model, tokenizer, weights)
            save_file(moments, staging / OPTIMIZER)
            (staging / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            write_manifest(staging)
    verify(target)
    prune(run, keep)
    return target


def save_best(
    run: Path, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: Weights
) -> None:
    """Write the student of this step to ``run/best-step``; earlier ones stay while a checkpoint would go on with them."""
    target = run / f"{BEST}{step}"
    make_room(target)
    with staged_folder(target, replace=True, needs=_bytes(_saved_weights(model, weights))) as staging:
        _write_model(staging, model, tokenizer, weights)
        write_manifest(staging)
    _prune_best(run)


def load_best(run: Path, step: int, model: PreTrainedModel, masters: Masters) -> None:
    """Put the weights of ``run/best-step`` into ``model`` and masters; raises CheckpointError if they are damaged."""
    verify(run / f"{BEST}{step}")
    load_weights(run / f"{BEST}{step}", model, masters)


def check_room(run: Path, model: PreTrainedModel, keep: int, students: int) -> None:
    """Raise DiskError if ``keep`` checkpoints like the newest and so many students more do not fit on the disk of ``run``."""
    size = sum(entry["size"] for entry in read_manifest(checkpoints(run)[-1]).values())
    needs = keep * size + students * _bytes(list(model.parameters()))
    if needs > (free := free_bytes(run)):
        raise DiskError(
            f"{run}: {keep} more checkpoints and {students} students need about {needs:,} bytes, and {free:,} are free there; make "
            "room, choose another --output-dir, or keep fewer with --save-total-limit"
        )


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest first, damaged ones among them."""
    return [folder for folder in numbered(run, PREFIX) if (folder / MANIFEST).is_file()]


def bests(run: Path) -> list[Path]:
    """The best students of a run directory, of the first step first."""
    return [folder for folder in numbered(run, BEST) if (folder / MANIFEST).is_file()]


def numbered(run: Path, prefix: str) -> list[Path]:
    """The folders of this prefix and a step in a run directory, the first step first."""
    found = [p for p in run.glob(f"{prefix}*") if p.name.removeprefix(prefix).isdecimal() and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step that a checkpoint or best student is of."""
    return int(folder.name.rpartition("-")[2])


def load_checkpoint(folder: Path, model: PreTrainedModel, masters: Masters, optimizer: torch.optim.Optimizer) -> State:
    """Load weights and moments of a checkpoint that was found whole, in place; returns the trainer's state.

    Raises:
        CheckpointError: it belongs to another model.
    """
    try:
        load_weights(folder, model, masters)
        _load_optimizer(folder, masters, optimizer)
    except (RuntimeError, ValueError, OSError, ModelError, SafetensorError) as error:
        raise CheckpointError(f"{folder} belongs to another model: {error}") from error
    return read_state(folder)


def read_state(folder: Path) -> State:
    """The trainer's state in a checkpoint; raises CheckpointError if there is none, or it is of another step."""
    found = read_record(folder / STATE, State)
    if found["step"] != step_of(folder):
        raise CheckpointError(f"{folder} holds step {found['step']}: it was renamed, or swapped with another")
    return found


def prune(run: Path, keep: int) -> None:
    """Take away all checkpoints but for the newest ``keep``, and the best students that none of them would go on with."""
    for old in checkpoints(run)[:-keep]:
        take_away(old)
    _prune_best(run)


def _prune_best(run: Path) -> None:
    """Take away the best students but for the last, and for those that were the best when a checkpoint was written."""
    steps = [step_of(folder) for folder in checkpoints(run)]
    for folder, later in pairwise(bests(run)):
        if not any(step_of(folder) <= step < step_of(later) for step in steps):
            take_away(folder)


def _write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Weights,
    dtype: torch.dtype | None = None,
) -> None:
    if has_adapter(model):
        save_adapter(model, folder, weights, dtype)
    else:
        state = _state_to_save(model, weights, dtype)
        saved_in = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
        model.save_pretrained(folder, state_dict=state)  # which takes the tensors out of ``state``
        # Of several processes, transformers lets the first alone write, without a word.
        if not any(folder.glob("*.safetensors")):
            raise CheckpointError(
                f"{folder}: transformers wrote no weights; only the first process of a group may save"
            )
        config = copy.deepcopy(model.config)  # which says what the model computes in
        config.dtype = saved_in
        config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def _state_to_save(model: nn.Module, weights: Weights, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, the masters in their place, in ``dtype``. Tied ones stay one tensor."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own, saved = state_of(model), {}
    for key, tensor in {id(tensor): tensor for tensor in own.values()}.items():
        saved[key] = weights.get(names.get(key, ""), tensor)
        if dtype is not None and tensor.is_floating_point():
            saved[key] = saved[key].to(dtype)
    return {name: saved[id(tensor)] for name, tensor in own.items()}


def load_weights(folder: Path, model: PreTrainedModel, masters: Masters | None = None) -> None:
    """Put the weights that ``save_model`` wrote, or the adapter's, into a model of that kind, and unrounded into its masters."""
    if has_adapter(model):
        load_adapter(model, folder, masters.named if masters else None)
        if masters is not None:
            masters.publish()
        return
    # Loading through the model's class undoes whatever its save_pretrained does to names and tied weights.
    dtype = model.dtype if masters is None else masters.dtype
    saved = type(model).from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    own = model.state_dict()
    model.load_state_dict({name: shard_like(tensor, own.get(name)) for name, tensor in saved.state_dict().items()})
    if masters is not None:
        masters.load(dict(saved.named_parameters()))


def moments_of(masters: Masters, optimizer: torch.optim.Optimizer) -> Moments:
    """The optimizer's state, whole; of a sharded model all ranks must ask for it, while the model is in shards."""
    return {name: full(optimizer.state[weight][key]).contiguous() for name, weight, key in _moments(masters, optimizer)}


def _moments(masters: Masters, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter, str]]:
    for name, weight in masters.named.items():
        for key in optimizer.state.get(weight, {}):
            yield f"{name}/{key}", weight, key


def _load_optimizer(folder: Path, masters: Masters, optimizer: torch.optim.Optimizer) -> None:
    tensors = load_file(folder / OPTIMIZER)
    own = {name: (weight, key) for name, weight, key in _moments(masters, optimizer)}
    if differing := tensors.keys() ^ own.keys():
        name = min(differing)
        raise ModelError(f"{name} is in {'the checkpoint' if name in tensors else 'the model'} alone")
    for name, (weight, key) in own.items():
        state = optimizer.state[weight]
        state[key] = shard_like(tensors[name].to(weight.device), state[key])


def _saved_weights(model: PreTrainedModel, weights: Weights) -> list[Tensor]:
    """What ``_write_model`` writes of a model."""
    adapter = has_adapter(model)
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad or not adapter}
    return list({**own, **weights}.values())


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
