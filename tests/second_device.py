"""A second device for tests on a machine that has none: its tensors lie in the host's memory, and do not mix with the host's.

For a process of its own: what is registered with torch stays. The device is called ``second``.
"""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Module(_DummyBackendModule):
    """What torch asks of a device's module beside the least."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.zeros(1)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass


_setup_privateuseone_for_python_backend("second", _Module())
SECOND = torch.device("second:0")
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class There(torch.Tensor):
    """A tensor on the second device, around one of the host."""

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "There":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=SECOND,
        )
        made.here = here
        return made

    def __repr__(self) -> str:
        return f"There({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    there = [each for each in tensors if isinstance(each, There)]
    if there and func not in _COPIES and any(not isinstance(each, There) and each.dim() for each in tensors):
        raise RuntimeError(f"{func}: tensors on two devices")
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    if func is torch.ops.aten.copy_.default:
        wraps = isinstance(args[0], There)
    else:
        wraps = torch.device(asked).type == "second" if asked is not None else bool(there)
    by_id = {id(each.here): each for each in there}
    args, kwargs = tree_map(lambda each: each.here if isinstance(each, There) else each, (args, kwargs))
    out = func(*args, **kwargs)
    if not wraps:
        return out
    return tree_map(lambda x: (by_id[id(x)] if id(x) in by_id else There(x)) if isinstance(x, torch.Tensor) else x, out)


class SecondDevice(TorchDispatchMode):
    """Where tensors can be on the second device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def put_there(model: nn.Module) -> None:
    """Move a model's weights to the second device."""
    for module in model.modules():
        for name, own in [*module._parameters.items()]:
            if own is not None:
                module._parameters[name] = nn.Parameter(There(own.detach()), requires_grad=False)
        for name, own in [*module._buffers.items()]:
            if own is not None:
                module._buffers[name] = There(own)


_LIBRARY = torch.library.Library("aten", "IMPL")
for _name in ("empty_strided", "empty.memory_format", "copy_", "_copy_from", "_to_copy"):
    _op = getattr(torch.ops.aten, _name.split(".")[0])
    _op = getattr(_op, _name.split(".")[1] if "." in _name else "default")
    _LIBRARY.impl(_name, lambda *args, _op=_op, **kwargs: _run(_op, args, kwargs), "PrivateUse1")
