"""Linear layers for decoding on a CPU.

A decoding step multiplies a handful of rows by every weight of the model. torch hands that product to a BLAS made for tall
matrices; oneDNN with the weight laid out for it beforehand does the same work sooner (``benchmarks/RESULTS.md``).
Nothing changes on a GPU, in other dtypes than fp32, or in training.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def packed(*models: nn.Module) -> Iterator[None]:
    """Within the context, fp32 ``nn.Linear`` layers on the CPU multiply by a copy of their weight in oneDNN's layout.

    For inference only: the copy does not follow the weight, and no gradient flows. It holds as much memory as the weights.
    """
    with ExitStack() as stack:
        for layer in {layer for model in models for layer in model.modules()}:
            if not isinstance(layer, nn.Linear) or not _packs(layer):
                continue
            layer.forward = _packed_forward(layer)  # type: ignore[method-assign,assignment]
            stack.callback(delattr, layer, "forward")
        yield


def _packs(layer: nn.Linear) -> bool:
    return (
        type(layer) is nn.Linear  # a subclass may do more
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and "forward" not in vars(layer)  # someone else's hook stays in charge
        and torch.backends.mkldnn.is_available()
    )


def _packed_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    packed_weight: Tensor | None = None
    bias = None if layer.bias is None else layer.bias.detach()

    def forward(x: Tensor) -> Tensor:
        nonlocal packed_weight
        if packed_weight is None:  # at first use: a model that is never called is never copied
            packed_weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        return torch.ops.mkldnn._linear_pointwise(x, packed_weight, bias, "none", [], "")

    return forward
