"""Which weights of a model text reaches: those of a vision tower beside it get no gradient, and are none of a distillation's."""

import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from switchkd.runner.modes import evaluating


def freeze_beside_text(model: PreTrainedModel) -> tuple[str, ...]:
    """Freeze the trainable weights that no gradient of text reaches; returns the modules that they are in, outermost first.

    Trained, they would decay without a reason, and several processes would wait for their gradients.
    """
    unreached = beside_text(model)
    for parameter in unreached.values():
        parameter.requires_grad_(False)
    return _outermost(model, unreached)


def frozen_note(modules: tuple[str, ...]) -> str:
    """What to say of modules that were frozen."""
    return f"text does not reach the student's {', '.join(modules)}: frozen, neither trained nor adapted"


def beside_text(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Trainable parameters that are not in the graph of a short text's logits, by name.

    An expert may be out of it because no token of so short a text was sent there; it is not beside the text then.
    """
    ids = torch.arange(4, device=next(model.parameters()).device).remainder(model.config.get_text_config().vocab_size)
    with evaluating(model), torch.enable_grad():
        logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits
        reached = {id(leaf) for leaf in _leaves(logits)}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kinds = {_kind(name) for name, parameter in trainable.items() if id(parameter) in reached}
    return {
        name: parameter
        for name, parameter in trainable.items()
        if id(parameter) not in reached and not ("expert" in name and _kind(name) in kinds)
    }


def _kind(name: str) -> str:
    """A parameter's name without the numbers of its layer and expert."""
    return re.sub(r"\.\d+\.", ".#.", name)


def _leaves(output: torch.Tensor) -> Iterator[torch.Tensor]:
    """The parameters that a tensor was computed from."""
    seen, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        left += [before for before, _ in node.next_functions]


def _outermost(model: nn.Module, parameters: dict[str, nn.Parameter]) -> tuple[str, ...]:
    """The largest modules that hold nothing but these parameters, or the names of those that stand alone."""
    found: dict[str, None] = {}
    for name in parameters:
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(1, len(parts)))
        whole = (p for p in prefixes if not any(own.requires_grad for own in model.get_submodule(p).parameters()))
        found[next(whole, name)] = None
    return tuple(found)
