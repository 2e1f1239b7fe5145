"""The modes of a model, and what enters its output layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def head_inputs(model: PreTrainedModel, passes_on: Callable[[Tensor], Tensor] = lambda x: x) -> Iterator[list[Tensor]]:
    """Collect what enters the model's output layer within the context; the layer itself is given ``passes_on`` of it."""
    entered: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        entered.append(args[0])
        return (passes_on(args[0]), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield entered
    finally:
        handle.remove()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, cache allowed under gradient checkpointing), each module's own mode restored after."""
    with restoring_modes(*models):
        for model in models:
            model.eval()
        yield


@contextmanager
def restoring_modes(*models: nn.Module) -> Iterator[None]:
    """After the context each module is in the mode that it was in: a layer that was frozen in evaluation mode still is."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
