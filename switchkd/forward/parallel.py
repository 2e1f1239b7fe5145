"""A model that several processes hold in shards and run together: transformers' tensor parallelism, and its experts in shards.

Every forward needs all processes of the group, on the same rows and in the same order. Whoever asks such a model does so on all of
them in step, and what they decide of their next forward must be equal on all. Logits and hidden states come back whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig

from switchkd.base.errors import ConfigError, ModelError, SwitchKDError
from switchkd.runner.architecture import model_class

Asked = TypeVar("Asked")
Found = TypeVar("Found")

# As transformers names the axis of the mesh along which a group lies.
_AXIS = "tp"


@dataclass(frozen=True)
class Together:
    """The processes that run one model together: the ``rank``-th of ``size`` is this one. Most models are run by one alone."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None

    @staticmethod
    def of(model: nn.Module) -> "Together":
        """Those that run ``model``. They follow on each other, so that the first ``size`` processes are a group."""
        for parameter in model.parameters():
            if isinstance(parameter, DTensor) and _AXIS in (parameter.device_mesh.mesh_dim_names or ()):
                group = parameter.device_mesh.get_group(_AXIS)
                return Together(distributed.get_world_size(group), distributed.get_rank(group), group)
        return Together()

    @property
    def alone(self) -> bool:
        """Whether this process needs no other one."""
        return self.size == 1

    def gather(self, mine: Found) -> list[Found]:
        """What each of them has, in order."""
        if self.alone:
            return [mine]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, mine, group=self.group)
        return found

    def first(self, find: Callable[[], Found]) -> Found:
        """What the first of them finds, on all of them, or the error that it meets."""
        if self.alone:
            return find()
        found: list[Any] = [None]
        if self.rank == 0:
            try:
                found = [find()]
            except SwitchKDError as error:
                found = [error]
        distributed.broadcast_object_list(found, group=self.group, group_src=0)
        if isinstance(found[0], SwitchKDError):
            raise found[0]
        return cast(Found, found[0])

    def led(self, lead: Callable[[Callable[[Asked], Found]], None], work: Callable[[Asked], Found]) -> None:
        """``lead(work)`` on the first of them. What it asks ``work`` for, the others do as well, and let go of what they find."""
        if self.rank == 0:
            going = True

            def asked(what: Asked) -> Found:
                nonlocal going
                self.first(lambda: (what,))
                going = False  # what ends the work ends it on the others too, who then do not listen any more
                found = work(what)
                going = True
                return found

            try:
                lead(asked if not self.alone else work)
            finally:
                if going:
                    self.first(lambda: None)
            return
        while (told := self.first(lambda: None)) is not None:
            work(cast(tuple[Asked], told)[0])


# --- before weights are read --------------------------------------------------------------------------------------


def check_processes(size: int) -> None:
    """Raise ConfigError unless the processes of this run can be divided into groups of ``size``."""
    started = processes()
    if started % size:
        are = "this process runs alone" if started == 1 else f"there are {started}, which {size} does not divide"
        raise ConfigError(
            f"teacher_tensor_parallel {size} spreads a teacher over {size} processes of `switchkd train`, and {are}; start a "
            f"multiple of {size}: torchrun --nproc-per-node {size} -m switchkd.cli train …, or set teacher_tensor_parallel to 1"
        )


def processes() -> int:
    """The processes that a launcher has started, and which have found each other; 1 without one."""
    found = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if found else 1


def check_parallel(config: PretrainedConfig, source: str, size: int, experts: bool) -> None:
    """Raise ModelError for a model whose architecture cannot be spread over ``size`` processes; looks at its config alone.

    ``experts``: each process is to hold some experts whole, in place of a share of each.
    """
    text, name = config.get_text_config(decoder=True), f"{source} ({config.model_type})"
    plan = {
        **(getattr(model_class(config), "_tp_plan", None) or {}),
        **(getattr(text, "base_model_tp_plan", None) or {}),
    }
    if not getattr(text, "base_model_tp_plan", None):
        raise ModelError(
            f"{name} has no plan for tensor parallelism in transformers; set teacher_tensor_parallel to 1, spread it over the GPUs "
            "of one process with teacher_device auto, or choose another teacher"
        )
    if experts and not getattr(text, "base_model_ep_plan", None):
        raise ModelError(f"{name} has no plan for experts in shards in transformers; leave teacher_expert_parallel out")
    split: dict[str, Any] = {"intermediate_size": getattr(text, "intermediate_size", None)}
    if any("attn" in rule and style == "colwise" for rule, style in plan.items()):
        split |= {key: getattr(text, key, None) for key in ("num_attention_heads", "num_key_value_heads")}
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    split |= {key: getattr(text, key, None) for key in (counts if experts else ("moe_intermediate_size",))}
    if uneven := [f"{key} {count}" for key, count in split.items() if isinstance(count, int) and count % size]:
        raise ModelError(
            f"{name} cannot be divided among {size} processes: {', '.join(uneven)}; set teacher_tensor_parallel to a divisor of "
            f"{'it' if len(uneven) == 1 else 'each'}, or to 1"
        )


def sharded_over(size: int, experts: bool) -> dict[str, Any]:
    """What ``from_pretrained`` is told so that each group of ``size`` processes holds one model in shards."""
    from transformers.distributed import DistributedConfig

    class Replicas(DistributedConfig):
        """Groups that know nothing of each other. transformers would wrap replicas in FSDP, for gradients that a teacher does not
        have, and FSDP copies every weight in every forward."""

        dp_size = 1

    replicas = processes() // size
    return {"distributed_config": Replicas(tp_size=size, dp_replicate_size=replicas, ep_size=size if experts else None)}


# --- its weights --------------------------------------------------------------------------------------------------


def whole_linear(linear: nn.Linear) -> nn.Linear:
    """The layer itself, or where it is in shards a copy of it that is whole; then all processes of its group must ask."""
    if not isinstance(linear.weight, DTensor):
        return linear
    with torch.device("meta"):
        copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    for name, parameter in linear.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        setattr(copy, name, nn.Parameter(full.detach(), requires_grad=False))
    return copy.eval()
