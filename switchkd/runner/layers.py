"""Dropping layers from a model."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from switchkd.base.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


PER_LAYER_SETTINGS = ("layer_types", "mlp_layer_types", "no_rope_layers")


def prune_layers(model: "PreTrainedModel", keep: Sequence[int]) -> "PreTrainedModel":
    """A new model of the same class, dtype and device with only the decoder layers ``keep`` (ascending, each once).

    ``model`` is left alone. Raises ConfigError for a wrong ``keep``, ModelError where the decoder layers are not found
    or the smaller model has no place for the weights.
    """
    import torch

    path, layers = decoder_layers(model)
    count = len(layers)
    if not keep or sorted(set(keep)) != list(keep) or keep[0] < 0 or keep[-1] >= count:
        raise ConfigError(f"keep = {list(keep)} must name layers of 0 to {count - 1} in ascending order, each once")
    config = _smaller_config(model.config, keep, count)
    # The constructor draws initial weights, which are overwritten; the caller's random state must not notice.
    with torch.random.fork_rng(devices=[]):
        smaller = type(model)._from_config(config, dtype=model.dtype).to(model.device)
    try:
        smaller.load_state_dict(_renumbered(model.state_dict(), path, keep))
    except RuntimeError as error:
        raise ModelError(
            f"{config.model_type}: layers {list(keep)} do not fit a model of {len(keep)} layers ({error}); its layers "
            "differ by position, so it cannot be pruned this way"
        ) from error
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.train(model.training)


def decoder_layers(model: "PreTrainedModel") -> "tuple[str, nn.ModuleList]":
    """Path and list of the decoder's layers: the outermost ModuleList as long as ``config.num_hidden_layers``."""
    from torch import nn

    if model.config.get_text_config(decoder=True) is not model.config:
        raise ModelError(f"{model.config.model_type} is a model of several parts; prune its text model on its own")
    count = model.config.num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise ModelError(f"{model.config.model_type}: no list of {count} decoder layers found, so it cannot be pruned")


@contextmanager
def turning(layers: "nn.ModuleList") -> "Iterator[list[torch.Tensor]]":
    """While open, sums 1 - cos(input, output) over every token that passes each layer."""
    import torch

    totals = [torch.zeros((), dtype=torch.float64) for _ in layers]

    def hook(index: int) -> Any:
        def add(_: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.nn.functional.cosine_similarity(before.cpu().double(), after.cpu().double(), dim=-1)
            totals[index] += (1 - cosine).sum()

        return add

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield totals
    finally:
        for handle in handles:
            handle.remove()


def _smaller_config(config: "PretrainedConfig", keep: Sequence[int], count: int) -> "PretrainedConfig":
    smaller = copy.deepcopy(config)
    smaller.num_hidden_layers = len(keep)
    for name in PER_LAYER_SETTINGS:
        values = getattr(config, name, None)
        if isinstance(values, list) and len(values) == count:
            setattr(smaller, name, [values[layer] for layer in keep])
    return smaller


def _renumbered(state: "dict[str, torch.Tensor]", path: str, keep: Sequence[int]) -> "dict[str, torch.Tensor]":
    new_index = {str(old): str(new) for new, old in enumerate(keep)}
    pattern = re.compile(rf"{re.escape(path)}\.(\d+)(\..+)")
    renamed = {}
    for name, tensor in state.items():
        match = pattern.fullmatch(name)
        if match is None:
            renamed[name] = tensor
        elif match[1] in new_index:
            renamed[f"{path}.{new_index[match[1]]}{match[2]}"] = tensor
    return renamed
