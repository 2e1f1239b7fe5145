"""What several processes (ranks) of one run must agree on. With one process, each function here is what its name says of itself."""

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object

from switchkd import signals
from switchkd.errors import ConfigError, SwitchKDError
from switchkd.rollouts import DecodeCost, Rollouts

Found = TypeVar("Found")

# How long ranks wait for one that evaluates or has the teacher's work done. By default it is minutes, after which they die.
PATIENCE = timedelta(days=1)

SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}


def new_accelerator() -> Accelerator:
    """An accelerator over the processes that a launcher has started, on CPUs too; only if told so does it use those by itself."""
    patient = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patient])


def check_unsharded(accelerator: Accelerator) -> None:
    """Raise ConfigError if the launcher was told to shard models."""
    if accelerator.distributed_type in SHARDED:
        raise ConfigError(
            f"weights sharded by accelerate's {accelerator.distributed_type.value} are not supported: rows are decoded at their "
            "own pace, and a forward in which not all ranks take part would wait for ever; launch with plain data parallelism, and "
            "shard the student with --fsdp"
        )


def from_main(accelerator: Accelerator, find: Callable[[], Found]) -> Found:
    """What the main process finds, on every rank, or the error that it meets."""
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [find()]
        except SwitchKDError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], SwitchKDError):
        raise found[0]
    return found[0]


def stop_together(accelerator: Accelerator) -> None:
    """Raise Stopped on every rank if a signal reached one: alone, a rank would leave the others waiting."""
    mine = torch.tensor([signals.received()], device=accelerator.device)
    if number := int(accelerator.gather(mine).max()):
        raise signals.Stopped(number)


def slowest(accelerator: Accelerator, seconds: float) -> float:
    """The time of the slowest rank, so that all end at the same step."""
    mine = torch.tensor([seconds], dtype=torch.float64, device=accelerator.device)
    return accelerator.gather(mine).max().item()


def all_rollouts(rollouts: Rollouts) -> Rollouts:
    """What all ranks generated, as one process would have, without the teacher's states."""
    light = [dataclasses.replace(rollout, teacher_hidden=None) for rollout in rollouts]
    parts = gather_object([(light, rollouts.cost)])
    cost = sum((own for _, own in parts), DecodeCost())
    cost.seconds = max(own.seconds for _, own in parts)  # they ran side by side
    return Rollouts([rollout for own, _ in parts for rollout in own], cost)
