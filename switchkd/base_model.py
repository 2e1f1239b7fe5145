"""The model under a student's adapter as the teacher: self-distillation with one copy of the weights in memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from switchkd.adapters import adapter_layers
from switchkd.cache import evaluating


class BaseModel(nn.Module):
    """The model under the adapter of ``student``, as a frozen model of its own: the same modules, the same weights.

    Its forward runs the student with the adapter switched off and in evaluation mode, whatever the student's own mode is, and
    leaves both as they were. What is not overridden here (``config``, ``dtype``, …) is the student's.
    """

    _is_stateful = False  # the student's class answers for itself

    def __init__(self, student: PreTrainedModel):
        super().__init__()
        self.student = student
        self.layers = tuple(adapter_layers(student))
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        training = any(module.training for module in self.student.modules())
        mode = evaluating(self.student) if training else nullcontext()
        with mode, _switched_off(self.layers):
            return self.student(*args, **kwargs)

    def train(self, mode: bool = True) -> "BaseModel":
        """Nothing changes: the base always runs in evaluation mode, and the student's mode is its own."""
        return self

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights of the base. The adapter is not part of it: freezing the base does not freeze the adapter."""
        adapter = set(_adapter_parameters(self.layers))
        return (item for item in super().named_parameters(*args, **kwargs) if item[1] not in adapter)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("student"), name)


@contextmanager
def _switched_off(layers: Sequence[Any]) -> Iterator[None]:
    # peft's own enable_adapters also changes requires_grad, and is too slow for every forward.
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _adapter_parameters(layers: Sequence[Any]) -> Iterator[nn.Parameter]:
    for layer in layers:
        base = set(layer.get_base_layer().parameters())
        yield from (parameter for parameter in layer.parameters() if parameter not in base)
