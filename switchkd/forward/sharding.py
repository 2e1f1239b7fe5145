"""The student in shards, one for each process (FSDP2): weights, gradients and moments at rest take an N-th of their memory.

Processes write texts of different lengths, and run different numbers of forwards. If each forward gathered the weights, one that
the other processes do not run would never end. So the weights are gathered once a step, by all processes together; every forward
finds them whole until the step's last backward, which sums the gradients and leaves shards. A model that was never sharded passes
through all functions here as it is.
"""

import atexit
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


def shard(model: PreTrainedModel, accelerator: Accelerator, compute: torch.dtype) -> None:
    """Leave each process its share of every weight, in place; layers are gathered and reduced one by one.

    Shares, gradients over ranks and moments are in float32 or wider, so that the shares are what an optimizer may update; gathered
    weights and products are in ``compute``.
    """
    wide = torch.promote_types(model.dtype, torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(wide)
    policy = MixedPrecisionPolicy(compute, wide) if compute != wide else MixedPrecisionPolicy()
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    layers = set(model._no_split_modules or ())
    for module in [each for each in model.modules() if type(each).__name__ in layers] + [model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    atexit.register(_leave)


def gather(model: nn.Module) -> None:
    """Make the weights whole on every rank, until a backward or ``whole`` ends that; all ranks must call it."""
    for unit in _units(model):
        unit.unshard()


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within the context the weights are whole, and each rank may use them alone; all ranks must enter and leave it."""
    gather(model)
    try:
        yield
    finally:
        for unit in _units(model):
            unit.reshard()


def reduce_in_next_backward(model: nn.Module, last: bool) -> None:
    """Whether the next backward is the last of a step, in which gradients are averaged over ranks and weights become shards."""
    for unit in _units(model):
        unit.set_requires_gradient_sync(last, recurse=False)
        unit.set_reshard_after_backward(last, recurse=False)


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds a share of the weights."""
    return bool(_units(model))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, as they are: those of a sharded model must be ``whole``."""
    if not is_sharded(model):
        return model.state_dict(keep_vars=True)  # of a sharded one, this would be its shards
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}".lstrip(".")] = buffer
    return found


def full(tensor: Tensor) -> Tensor:
    """A tensor of which each rank has a shard, whole and on the host; all ranks must call it. Any other as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, own: Tensor | None) -> Tensor:
    """This rank's share of a whole tensor, where ``own`` is one. Each rank has the whole tensor; nothing is sent."""
    if not isinstance(own, DTensor):
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip(parameters: list[nn.Parameter], most: float) -> float:
    """Scale all gradients so that their norm is at most ``most``; returns what it was, the same on every rank."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm.item()


def _leave() -> None:
    """End the process group while Python still runs: a thread of its own may otherwise abort the process at its end."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
