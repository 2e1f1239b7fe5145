"""The layers of a model on a CPU, as decoding wants them: a few rows at a time, thousands of times.

A decoding step multiplies a handful of rows by every weight of the model. torch hands that product to a BLAS, which lays out the
weight anew each time; with the weight laid out for it once (MKL calls that packing) the same product takes two thirds of the time.
An RMS norm in five operations takes a third of what the model's own takes. Nothing changes on a GPU, in other dtypes than fp32, or
in training. Where torch comes without MKL, only the norms change.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class FastLayers:
    """The fast forms of one model's fp32 layers on the CPU; within ``with fast():`` the model works with them.

    For inference only: no gradient flows. The copies of the weights take the weights' memory once more. They are made at a layer's
    first use, outlive the context where a weight is not trained (or with ``keep_trained`` in any case), and are made again once
    it has changed; within one context, weights must stay as they are. Contexts may be nested. Results differ from the plain
    layers' by rounding.
    """

    def __init__(self, model: nn.Module, keep_trained: bool = False):
        self._products: list[_Product] = []
        self._forwards: dict[nn.Module, Callable[..., Tensor]] = {}
        self._others = False  # whether there are products of other layers
        for module in model.modules():
            if type(module) is nn.Linear and _packs():  # a subclass may do more
                self._products.append(product := _Product(module, keep_trained))
                self._forwards[module] = product
            elif (eps := _rms_eps(module)) is not None:
                self._forwards[module] = partial(_rms_norm, module, eps)
            elif not isinstance(module, nn.Embedding):
                self._others |= any(weight is not None and weight.dim() > 1 for weight in module._parameters.values())

    @property
    def steady(self) -> bool:
        """Whether every product is a packed one, whose bits do not depend on the number of threads as those of others do."""
        return not self._others and all(_is_plain(product.layer) for product in self._products)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within the context, the model's layers work in their fast form; afterwards each is as it was."""
        changed = [layer for layer in self._forwards if _is_plain(layer)]
        try:
            for layer in changed:
                layer.forward = self._forwards[layer]
            with torch.no_grad():  # once, as to enter it takes longer than a small product
                yield
        finally:
            for layer in changed:
                vars(layer).pop("forward", None)
            for product in self._products if changed else ():
                product.known = False
                if not product.lasts:
                    product.forget()


def kept_layers(model: nn.Module) -> FastLayers:
    """The fast layers of a model that is decoded with again and again, for as long as it lives."""
    if model not in _kept:
        _kept[model] = FastLayers(model, keep_trained=True)
    return _kept[model]


_kept: WeakKeyDictionary[nn.Module, FastLayers] = WeakKeyDictionary()


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is nobody else's business: its own forward, and weights in fp32 and in one piece on the CPU."""
    return "forward" not in vars(layer) and all(
        type(weight) in (nn.Parameter, Tensor)
        and (weight.device.type, weight.dtype) == ("cpu", torch.float32)
        and weight.is_contiguous()
        for weight in layer._parameters.values()
        if weight is not None
    )


class _Product:
    """The product of one layer, with a packed copy of its weight."""

    def __init__(self, layer: nn.Linear, keep_trained: bool):
        self.layer, self.keep_trained = layer, keep_trained
        self.known = False  # whether the copy is known to be of the weight as it is
        self._of: object = None
        self._copy = torch.empty(0)

    @property
    def lasts(self) -> bool:
        """Whether the copy outlives a context: a trained weight will be another one, and has better use for the room."""
        return self.keep_trained or not self.layer.weight.requires_grad

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if x.dtype != torch.float32:
            return nn.functional.linear(x, self.layer.weight, self.layer.bias)
        if not self.known:
            self._renew()
        # torch takes a packed weight only for the number of rows that it is told: here that of x.
        return torch.ops.mkl._mkl_linear(x, self._copy, self.layer.weight, self.layer.bias, x.numel() // x.shape[-1])

    def forget(self) -> None:
        """Let go of the copy."""
        self._of, self._copy = None, torch.empty(0)

    def _renew(self) -> None:
        state = _state(self.layer.weight) if self.lasts else None
        if state is None or state != self._of:
            self.forget()  # the old copy goes before the new one comes
            self._copy = _packed(self.layer.weight.detach())
            self._of = state
        self.known = True


def _packed(weight: Tensor) -> Tensor:
    """A weight ``[out, in]`` as MKL wants it, in a tensor that only its product can read."""
    return torch.ops.mkl._mkl_reorder_linear_weight(weight, _ROWS)


# The number of rows that the layout is chosen for. Few rows lose nothing by a large one; many rows lose by a small one.
_ROWS = 256


@cache
@torch.no_grad()
def _packs() -> bool:
    """Whether there is an MKL whose packed weights serve any number of rows: its manual allows that, torch does not rely on it."""
    # The packed weight is a tensor of torch's oneDNN backend.
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 193, generator=generator) for rows in (131, 2 * _ROWS + 1))
    packed, expected = _packed(weight), x @ weight.T
    few = (1, 2, 7, _ROWS, len(x))
    said = [torch.ops.mkl._mkl_linear(x[:rows], packed, weight, None, rows) for rows in few]
    return all(torch.allclose(each, expected[: len(each)], rtol=1e-4, atol=1e-4) for each in said)


def _state(weight: Tensor) -> tuple[object, ...]:
    """What is another once the weight has changed.

    The version alone is not: fused AdamW, ``.data`` and the gathering of shards write without counting. So all bits are added up
    as whole numbers, which takes a sixth of the time of packing; a change that keeps the sum is a permutation, or one in 2^64.
    """
    bits = weight.detach().view(-1)
    wide = bits.numel() % 2 == 0 and bits.storage_offset() % 2 == 0
    total = bits.view(torch.int64 if wide else torch.int32).sum().item()
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.shape, total


def _rms_norm(norm: Any, eps: Tensor, x: Tensor, *gate: Any, **settings: Any) -> Tensor:
    """``weight * x / sqrt(mean(x²) + eps)`` over the last dimension, in five operations. With a gate it is the layer's own."""
    if x.dtype != torch.float32 or gate or settings:
        return type(norm).forward(norm, x, *gate, **settings)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(norm.weight)


@torch.no_grad()
def _rms_eps(norm: nn.Module) -> Tensor | None:
    """The epsilon of a layer that is an RMS norm with a weight, which its own numbers prove; None for others."""
    eps, weight = getattr(norm, "variance_epsilon", getattr(norm, "eps", None)), norm._parameters.get("weight")
    alone = len(norm._parameters) == 1 and not norm._buffers and not norm._modules
    if not isinstance(eps, float) or not alone or weight is None or weight.dim() != 1 or not _is_plain(norm):
        return None
    generator = torch.Generator().manual_seed(0)
    # Lengths around the root of epsilon too, where it counts, and a weight of which no entry is 1.
    lengths = torch.tensor([1.0, 30.0, eps**0.5]).view(3, 1, 1)
    x = torch.randn(3, 2, len(weight), generator=generator) * lengths
    other = nn.Module()
    other.weight = nn.Parameter(torch.randn(len(weight), generator=generator))
    try:
        expected = torch.func.functional_call(norm, {"weight": other.weight}, (x,))
        torch.testing.assert_close(_rms_norm(other, torch.tensor(eps), x), expected, rtol=2e-6, atol=1e-9)
    except Exception:  # it is another function, or wants more than an input
        return None
    return torch.tensor(eps)
