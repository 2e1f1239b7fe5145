"""What several processes (ranks) of one run must agree on. With one process, each function here is what its name says of itself."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from switchkd.base import signals
from switchkd.base.errors import ConfigError, ModelError, SwitchKDError
from switchkd.base.manifest import json_sha256
from switchkd.decoding.rollouts import DecodeCost, Rollouts
from switchkd.forward.parallel import Together
from switchkd.training.settings import TrainConfig

Found = TypeVar("Found")

# How long ranks wait for one that evaluates or has the teacher's work done. By default it is minutes, after which they die.
PATIENCE = timedelta(days=1)

SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}


def new_accelerator() -> Accelerator:
    """An accelerator over the processes that a launcher has started, on CPUs too; only if told so does it use those by itself."""
    patient = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patient])


def with_launchers_settings(accelerator: Accelerator, config: TrainConfig) -> TrainConfig:
    """``config`` with what the accelerator was told and means the same here: bf16, and the steps that a gradient is summed over.

    Raises ConfigError, naming the setting, for what the accelerator was told that would change results here, or not reach them.
    """
    _refuse_foreign(accelerator)
    told: dict[str, Any] = {}
    if accelerator.mixed_precision == "bf16":
        told["dtype"] = "bfloat16"
    if accelerator.gradient_accumulation_steps > 1:
        told["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name, value in told.items():
        own = getattr(config, name)
        if own not in (value, defaults[name]):
            raise ConfigError(
                f"{name} is {own} in the settings and {value} in the accelerator or its launcher; give it in one place, or the "
                "same in both"
            )
    return dataclasses.replace(config, **told)


def _refuse_foreign(accelerator: Accelerator) -> None:
    if accelerator.distributed_type in SHARDED:
        raise ConfigError(
            f"weights sharded by accelerate's {accelerator.distributed_type.value} are not supported: processes write "
            "texts of different lengths, and a forward that not all of them run would never end; launch with plain data "
            "parallelism, and shard the student with --fsdp"
        )
    dynamo, ways = accelerator.state.dynamo_plugin, accelerator.parallelism_config
    foreign = {
        f"mixed_precision {accelerator.mixed_precision}": accelerator.mixed_precision not in ("no", "bf16"),
        f"the dynamo backend {dynamo.backend.value}": dynamo.backend != DynamoBackend.NO,
        f"parallelism_config {ways}": ways is not None and ways.total_size > 1,
        "device_placement False": not accelerator.device_placement,
        "DistributedDataParallelKwargs": accelerator.ddp_handler is not None,
        "AutocastKwargs": accelerator.autocast_handler is not None,
    }
    if named := [setting for setting, told in foreign.items() if told]:
        raise ConfigError(
            f"the accelerator, or its launcher, was told {' and '.join(named)}, which has no meaning here: switchkd makes products "
            "in bfloat16 or float32 (--dtype), compiles nothing, and sums gradients over processes itself; take it out"
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
    mine = torch.tensor([seconds], dtype=torch.float32, device=accelerator.device)
    return accelerator.gather(mine).max().item()


def in_first_group(accelerator: Accelerator, together: Together) -> bool:
    """Whether this is the main process, or runs the teacher together with it: then it does what that one asks the teacher for, too,
    and writes nothing."""
    return accelerator.process_index < together.size


@contextmanager
def first_group_first(accelerator: Accelerator, together: Together) -> Iterator[None]:
    """The first group of processes goes through the context, then all others."""
    first = in_first_group(accelerator, together)
    if not first:
        accelerator.wait_for_everyone()
    yield
    if first:
        accelerator.wait_for_everyone()


def check_agreed(rollouts: Rollouts, together: Together, where: str) -> None:
    """Raise ModelError unless all processes that run the teacher together have decoded the same text."""
    texts = [(rollout.id, rollout.completion_ids, rollout.speakers) for rollout in rollouts]
    if len(set(together.gather(json_sha256(texts)))) == 1:
        return
    first, *others = together.gather(texts)
    rank, other = next((rank, other) for rank, other in enumerate(others, start=1) if other != first)
    one, two = next(pair for pair in zip_longest(first, other) if pair[0] != pair[1])
    raise ModelError(
        f"{where}: process 0 and process {rank} of those that run the teacher together have decoded different text: sample "
        f"{one and one[0]} has the tokens {one and one[1]} by {one and one[2]} on the one, and sample {two and two[0]} has "
        f"{two and two[1]} by {two and two[2]} on the other. They must be of one kind of machine, with the same versions, and "
        "hold the same student"
    )


def all_rollouts(rollouts: Rollouts) -> Rollouts:
    """What all ranks generated, as one process would have, without the teacher's states."""
    light = [dataclasses.replace(rollout, said=None) for rollout in rollouts]
    parts = gather_object([(light, rollouts.cost)])
    cost = sum((own for _, own in parts), DecodeCost())
    cost.seconds = max(own.seconds for _, own in parts)  # they ran side by side
    return Rollouts([rollout for own, _ in parts for rollout in own], cost)
