"""The model under a student's adapter as the teacher: self-distillation with one copy of the weights in memory."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from switchkd.runner.modes import evaluating


class BaseModel(nn.Module):
    """The model under the adapter of ``student``, as a frozen model of its own: the same modules, the same weights.

    Its forward and ``generate`` run the student with the adapter switched off and in evaluation mode, whatever the student's own
    mode is, and leave both as they were. Its weights are those of the base, under the base's names. What else it is asked for and
    is a plain value (``config``, ``dtype``, …) is the student's; a method or a part of the student is not given out, because it
    would run with the adapter.
    """

    _is_stateful = False  # the student's class answers for itself

    def __init__(self, student: PreTrainedModel):
        super().__init__()
        self.student = student
        self.layers = tuple(adapter_layers(student))
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._base():
            return self.student(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What transformers' ``generate`` writes with the base."""
        with self._base():
            return self.student.generate(*args, **kwargs)

    def train(self, mode: bool = True) -> "BaseModel":
        """Nothing changes: the base always runs in evaluation mode, and the student's mode is its own."""
        return self

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights of the base. The adapter is not part of it: freezing the base does not freeze the adapter."""
        return self._without_adapter(self.student.named_parameters(*args, **kwargs))

    def state_dict(self, *args: Any, keep_vars: bool = False, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The weights and buffers of the base, as those of the base loaded alone."""
        state = self.student.state_dict(*args, keep_vars=True, **kwargs)
        return {name: own if keep_vars else own.detach() for name, own in self._without_adapter(state.items())}

    def get_output_embeddings(self) -> nn.Module:
        """The output layer, which no adapter may sit on."""
        return self.student.get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, which no adapter may sit on."""
        return self.student.get_input_embeddings()

    @property
    def generation_config(self) -> GenerationConfig:
        """The student's: it is also what its ``generate`` reads."""
        return self.student.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.student.generation_config = config

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(super().__getattr__("student"), name)
        if inspect.ismethod(found) or isinstance(found, nn.Module | Tensor):
            raise AttributeError(
                f"the base of a student gives out no {name!r}, which would be the student's, with its adapter"
            )
        return found

    def _without_adapter(self, named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        adapter = {id(parameter) for parameter in _adapter_parameters(self.layers)}
        return ((name.replace(".base_layer", ""), own) for name, own in named if id(own) not in adapter)

    @contextmanager
    def _base(self) -> Iterator[None]:
        """The student's modules as the base: without the adapter, in evaluation mode."""
        training = any(module.training for module in self.student.modules())
        with evaluating(self.student) if training else nullcontext():
            # peft's own enable_adapters also changes requires_grad, and is too slow for every forward.
            try:
                for layer in self.layers:
                    layer._disable_adapters = True
                yield
            finally:
                for layer in self.layers:
                    layer._disable_adapters = False


def _adapter_parameters(layers: Sequence[Any]) -> Iterator[nn.Parameter]:
    for layer in layers:
        base = set(layer.get_base_layer().parameters())
        yield from (parameter for parameter in layer.parameters() if parameter not in base)


def adapter_layers(model: nn.Module) -> list[Any]:
    """The layers that hold a part of the adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
