"""LoRA on a student: put on, opened, saved, merged.

The adapter sits inside the model's own class (peft's injection), so that decoding, loss and evaluation see a causal language
model as before. Only the adapter is trained and saved. peft is imported when an adapter is asked for.
"""

import copy
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from switchkd.errors import ConfigError, ModelError, nearest
from switchkd.masters import Masters, cast_weights
from switchkd.models import ADAPTER_CONFIG
from switchkd.plain import json_object, shown
from switchkd.sampling import Use, noise_key

if TYPE_CHECKING:
    from peft import LoraConfig

    from switchkd.config import ModelConfig

WEIGHTS = "adapter_model.safetensors"
NAME = "default"  # peft's name of the only adapter in a model
PREFIX = "base_model.model."  # before each weight's name in peft's files
# What an adapter may hold beside low-rank updates, and the values that mean nothing: the rest would move the base or the head.
PLAIN: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "megatron_config": (None,),  # with it, peft imports a module that the adapter names
    "init_lora_weights": (True, False, "gaussian"),
}
VERSIONS = {"peft": "0.20", "bitsandbytes": "0.45"}  # as in pyproject.toml
# Settings of ModelConfig and what peft's LoraConfig calls them.
SETTINGS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}


def add_adapter(model: PreTrainedModel, config: "ModelConfig", seed: int, beside: Sequence[str] = ()) -> None:
    """Put a LoRA adapter of zero effect on ``model`` and freeze everything else; ``seed`` is the key of its weights.

    The modules ``beside`` are left out, whatever their layers are called: text does not reach them.
    Raises ConfigError if a target is no linear layer of the body, or peft is not installed.
    """
    peft = require("peft")
    _check_targets(model, config.lora_target_modules)
    lora = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_target_modules) or "all-linear",
        task_type="CAUSAL_LM",
        exclude_modules=rf"({'|'.join(map(re.escape, beside))})(\..*)?" if beside else None,
        # GPT-2 keeps its weights transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(noise_key(seed, 0, 0, Use.ADAPTER) % 2**63)
        _inject(model, lora)
    _widen(model)


def open_adapter(model: PreTrainedModel, folder: Path, train: bool = False) -> None:
    """Put the adapter saved in ``folder`` on its base ``model``, trainable; everything else is frozen.

    To be gone on with (``train``), it is opened in float32 or wider, whatever the base is in.

    Raises ModelError if it is more than LoRA on the body, or does not fit the model.
    """
    peft = require("peft")
    try:
        kind = json_object((folder / ADAPTER_CONFIG).read_bytes()).get("peft_type")
        lora = peft.LoraConfig.from_pretrained(str(folder)) if kind == "LORA" else None
    except Exception as error:  # peft refuses settings in many ways
        raise ModelError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}; copy the adapter again") from error
    odd = [name for name, plain in PLAIN.items() if getattr(lora, name, plain[0]) not in plain]
    if lora is None or odd:
        what = f"{', '.join(odd)} set" if lora else f"peft_type {shown(kind)}"
        raise ModelError(f"{folder} has {what}; switchkd opens LoRA adapters of linear layers only: merge it with peft")
    try:
        _inject(model, lora)
    except Exception as error:  # no layer of that name, or no value of that kind: peft does not check
        raise ModelError(f"{folder} does not fit {model.config.model_type}: {error}") from error
    _refuse_outer_layers(model, folder)
    if train:
        _widen(model)
    load_adapter(model, folder)


def check_settings(model: PreTrainedModel, config: "ModelConfig", folder: Path) -> None:
    """Raise ConfigError if ``config`` asks for another adapter than the one that ``folder`` gave ``model``."""
    lora = model.peft_config[NAME]
    asked = {name: (getattr(config, name), getattr(lora, peft_name)) for name, peft_name in SETTINGS.items()}
    if config.lora_target_modules:
        asked["lora_target_modules"] = (sorted(config.lora_target_modules), sorted(lora.target_modules))
    if changed := [f"{name} {ours}, it has {theirs}" for name, (ours, theirs) in asked.items() if ours != theirs]:
        raise ConfigError(
            f"the student {folder} is an adapter already ({'; '.join(changed)}); give its own settings to go on with it, "
            "or name its base as the student for a new adapter"
        )


def has_adapter(model: nn.Module) -> bool:
    """Whether an adapter sits in ``model``."""
    return getattr(model, "_hf_peft_config_loaded", False)


def adapter_layers(model: nn.Module) -> list[Any]:
    """The layers that hold a part of the adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def save_adapter(
    model: PreTrainedModel, folder: Path, weights: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write the adapter alone, in peft's format. (save_pretrained would ask the hub about the base's vocabulary.)

    ``weights`` take the place of the adapter's own by these names; ``dtype`` None saves them as they are.
    """
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in _tensors(model, weights or {}).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    model.peft_config[NAME].save_pretrained(str(folder))
    model.generation_config.save_pretrained(folder)


@torch.no_grad()
def load_adapter(model: PreTrainedModel, folder: Path, masters: Masters | None = None) -> None:
    """Read saved adapter weights into the adapter of ``model``, or its masters, in place.

    Raises ModelError unless names and shapes agree.
    """
    try:
        saved, own = load_file(folder / WEIGHTS), _tensors(model, masters.named if masters else {})
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS} cannot be read: {error}; copy the adapter again") from error
    shapes = [{name: list(tensor.shape) for name, tensor in tensors.items()} for tensors in (saved, own)]
    names = sorted(shapes[0].keys() | shapes[1].keys())
    if wrong := [name for name in names if shapes[0].get(name) != shapes[1].get(name)]:
        there, here = (shape.get(wrong[0], "nothing") for shape in shapes)
        raise ModelError(
            f"{folder} holds another adapter: {len(wrong)} weights do not fit, first {wrong[0]}: {there} there, {here} here; "
            "load it with its own settings and base"
        )
    for name, tensor in own.items():
        tensor.copy_(saved[name])
    if masters:
        masters.publish()


def merged(
    model: PreTrainedModel, weights: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A copy of ``model`` as a plain model, the adapter added to its weights. Takes the model's memory once more.

    ``weights`` take the place of the adapter's own by these names. The sum is made in float32 or wider and rounded to ``dtype``
    (None: the model's own), which is what the copy's weights are in.
    """
    plain = copy.deepcopy(model)
    cast_weights(plain, torch.promote_types(model.dtype, torch.float32))
    for name, weight in (weights or {}).items():
        plain.get_parameter(name).data.copy_(weight)
    layers = set(adapter_layers(plain))
    for name, layer in [(name, module) for name, module in plain.named_modules() if module in layers]:
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.get_base_layer())
    del plain.peft_config
    plain._hf_peft_config_loaded = False
    cast_weights(plain, dtype or model.dtype)
    return plain


def require(package: str) -> Any:
    """Import an optional package. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        command = f"pip install '{package}>={VERSIONS[package]}'"
        raise ConfigError(f"{package} is needed and cannot be imported ({error}); {command}") from error


def _inject(model: PreTrainedModel, lora: "LoraConfig") -> None:
    name = model.name_or_path
    # What add_adapter does; that one also asks for a peft as new as the transformers, which may not be there yet.
    lora.inference_mode = False  # as which peft saves every adapter
    require("peft").inject_adapter_in_model(lora, model, NAME)
    model._hf_peft_config_loaded = True
    model.eval()  # new modules are born in training mode
    # A folder's own name, so that the adapter opens from anywhere; sorted, so that equal adapters have equal files.
    lora.base_model_name_or_path = str(Path(name).resolve()) if name and Path(name).is_dir() else name
    lora.target_modules = sorted(lora.target_modules)


def _widen(model: PreTrainedModel) -> None:
    """Put the adapter into float32, if it is narrower: it is to be updated."""
    for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    head = model.get_output_embeddings()
    for target in targets:
        found = [module for name, module in linear.items() if f".{name}".endswith(f".{target}")]
        if any(module is head for module in found):
            raise ConfigError(
                f"lora_target_modules names the output layer {target!r}, whose weight the loss takes as it is; "
                "adapt the layers of the body only"
            )
        if not found:
            known = {name.rsplit(".", 1)[-1] for name, module in linear.items() if module is not head}
            raise ConfigError(
                f"lora_target_modules: the student has no linear layer {target!r}{nearest(target, known)}"
            )


def _refuse_outer_layers(model: PreTrainedModel, folder: Path) -> None:
    layers = adapter_layers(model)
    for layer, name in ((model.get_output_embeddings(), "output layer"), (model.get_input_embeddings(), "embedding")):
        if layer in layers:
            raise ModelError(
                f"{folder} adapts the {name}; switchkd takes adapters of the body only: merge it with peft"
            )


def _tensors(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's weights by their names in peft's files; they share the memory of ``weights``, else the model's."""
    from peft import get_peft_model_state_dict

    state = {**model.state_dict(), **{name: weight.detach() for name, weight in weights.items()}}
    tensors = get_peft_model_state_dict(model, state, adapter_name=NAME, save_embedding_layers=False)
    return {PREFIX + name: tensor for name, tensor in tensors.items()}
