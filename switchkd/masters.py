"""The weights that are trained, as the optimizer updates them: in float32, whatever the model multiplies in.

A bfloat16 weight has eight bits. An update of AdamW is about ``learning_rate`` large, and where that is less than a 512th of
the weight, adding it gives the weight back as it was: training runs, and nothing moves. So the optimizer works on *masters* in
float32, with moments in float32. A model that multiplies in bfloat16 holds rounded copies of them, made anew after every update.
"""

import re
from collections.abc import Mapping
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn

from switchkd.errors import ConfigError
from switchkd.sharding import full, is_sharded


class Masters:
    """The trained weights of ``model`` as an optimizer updates them, in float32 or wider: ``named``, by their names in the model.

    ``compute`` is the dtype that the model's products are made in from now on; None leaves the model as it is. Where that is
    narrower than float32, or the model's weights are, the model keeps rounded copies, and each backward pass adds its gradients to
    the masters' at once, in the masters' dtype. Else, and in a model that is sharded, the model's own weights are the masters.
    """

    def __init__(self, model: nn.Module, compute: torch.dtype | None = None):
        self.model = model
        self.named: dict[str, nn.Parameter] = {}
        self._copies: dict[str, nn.Parameter] = {}  # the model's own, where they are not the masters
        for name, parameter in model.named_parameters():
            dtype = parameter.dtype if is_sharded(model) else _dtype_in(compute, model, name, parameter)
            if parameter.requires_grad:
                self.named[name] = self._master(name, parameter, dtype)
            elif dtype != parameter.dtype:
                parameter.data = parameter.data.to(dtype)

    def _master(self, name: str, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        wide = torch.promote_types(torch.promote_types(parameter.dtype, dtype), torch.float32)
        if wide == dtype:
            parameter.data = parameter.data.to(wide)
            return parameter
        if dtype == torch.float16:
            raise ConfigError(
                "a student in float16 cannot be trained: small gradients vanish in it; take bfloat16 or float32 (--dtype)"
            )
        master = nn.Parameter(parameter.data.to(wide))
        parameter.data = parameter.data.to(dtype)
        parameter.register_post_accumulate_grad_hook(partial(_hand_over, master))
        self._copies[name] = parameter
        return master

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of a master."""
        return max((weight.dtype for weight in self.named.values()), key=lambda dtype: dtype.itemsize)

    @torch.no_grad()
    def publish(self) -> None:
        """Make the model's copies those of the masters as they are now."""
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), [self.named[name] for name in self._copies])

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take these weights, by name, for those that the model has rounded copies of."""
        for name in self._copies:
            self.named[name].copy_(weights[name])
        self.publish()

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        """Round masters and model to what ``dtype`` can hold, so that what is scored is what is saved in it."""
        for weight in self.named.values():
            weight.copy_(weight.to(dtype))
        self.publish()

    def whole(self) -> dict[str, Tensor]:
        """The masters; of a sharded model whole and on the host, and all ranks must ask, while it is in shards."""
        return {name: full(weight.detach()) for name, weight in self.named.items()}

    def sum_gradients(self, accelerator: Accelerator) -> None:
        """Make the gradients of all processes one sum, in the masters' dtype. A sharded model has done that in its backward pass.

        A weight that no process's text has reached keeps no gradient, as in one process.
        """
        if accelerator.num_processes == 1 or is_sharded(self.model):
            return
        weights = list(self.named.values())
        reached = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32)
        reached = accelerator.reduce(reached.to(accelerator.device), "sum")
        for weight, ranks in zip(weights, reached.tolist(), strict=True):
            if ranks:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                distributed.all_reduce(weight.grad)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the weights of ``model`` into ``dtype`` as ``from_pretrained`` would. Buffers stay, such as the angles of positions."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(_dtype_in(dtype, model, name, parameter))


def _dtype_in(compute: torch.dtype | None, model: nn.Module, name: str, parameter: nn.Parameter) -> torch.dtype:
    """What a model that computes in ``compute`` keeps a weight in: those in 4 bits stay, and some that never leave float32."""
    wide = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    kept = any(re.search(rf"(^|\.){re.escape(module)}($|\.)", name) for module in wide)
    return parameter.dtype if compute is None or kept or not parameter.is_floating_point() else compute


@torch.no_grad()
def _hand_over(master: nn.Parameter, parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.to(master.dtype)
    else:
        master.grad += parameter.grad
    parameter.grad = None
