"""LoRA on a student: put on, opened, saved, merged.

The adapter sits inside the model's own class (peft's injection), so that decoding, loss and evaluation see a causal language
model as before. Only the adapter is trained and saved. peft is imported when an adapter is asked for.
"""

import copy
import importlib
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from switchkd.base.errors import ConfigError, DataError, ModelError, nearest
from switchkd.base.limits import check_patterns
from switchkd.base.plain import check_type, json_object, shown
from switchkd.forward.base_model import adapter_layers
from switchkd.methods.sampling import Use, noise_key
from switchkd.models.settings import cast_weights, quantised

if TYPE_CHECKING:
    from peft import LoraConfig

    from switchkd.models.settings import ModelConfig


ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NAME = "default"  # peft's name of the only adapter in a model
PREFIX = "base_model.model."  # before each weight's name in peft's files
VERSIONS = {"peft": "0.20", "bitsandbytes": "0.45"}  # as in pyproject.toml
# Settings of ModelConfig and what peft's LoraConfig calls them.
SETTINGS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}


def add_adapter(model: PreTrainedModel, config: "ModelConfig", seed: int, beside: Sequence[str] = ()) -> None:
    """Put a LoRA adapter of zero effect on ``model`` and freeze everything else; ``seed`` is the key of its weights.

    The modules ``beside`` are left out, whatever their layers are called: text does not reach them.
    Raises ConfigError if a target is no linear layer of the body, or peft is not installed.
    """
    peft = require("peft")
    layers, weights = _targets(model, config.lora_target_modules)
    lora = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=layers if config.lora_target_modules else "all-linear",
        target_parameters=weights or None,
        task_type="CAUSAL_LM",
        exclude_modules=rf"({'|'.join(map(re.escape, beside))})(\..*)?" if beside else None,
        # GPT-2 keeps its weights transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(noise_key(seed, 0, 0, Use.ADAPTER) % 2**63)
        try:
            _inject(model, lora)
        except ValueError as error:  # such as dropout on experts
            raise ConfigError(
                f"no adapter of these settings can be put on the student, {model.config.model_type}: {error} Change lora_dropout, "
                "or name other layers in lora_target_modules, such as in_proj of a Mamba"
            ) from error
    _widen(model)


def open_adapter(model: PreTrainedModel, folder: Path, asked: "ModelConfig | None" = None) -> None:
    """Put the adapter saved in ``folder`` on its base ``model``, trainable; everything else is frozen.

    To be gone on with under the settings ``asked``, it is opened in float32 or wider, whatever the base is in.

    Raises ModelError if it is more than LoRA on the body, or does not fit the model, ConfigError if it is not what is ``asked``.
    """
    peft = require("peft")
    try:
        known = options(json_object((folder / ADAPTER_CONFIG).read_bytes()))
        lora = peft.LoraConfig(**known, task_type="CAUSAL_LM")
    except (OSError, DataError, TypeError, ValueError) as error:  # peft refuses some that contradict each other
        raise ModelError(f"the adapter {folder} cannot be opened: {ADAPTER_CONFIG} {error}") from error
    check_patterns(patterns(known), [name for name, _ in model.named_modules()], str(folder))
    targets = _targets(model, asked.lora_target_modules) if asked else ([], [])
    try:
        _inject(model, lora)
    except Exception as error:  # no layer of that name, or no value of that kind: peft does not check
        raise ModelError(f"{folder} does not fit {model.config.model_type}: {error}") from error
    _refuse_outer_layers(model, folder)
    if asked:
        _check_settings(lora, asked, [*targets[0], *targets[1]], folder)
        _widen(model)
    load_adapter(model, folder)


def _check_settings(lora: "LoraConfig", config: "ModelConfig", targets: list[str], folder: Path) -> None:
    """Raise ConfigError if ``config``, which names these ``targets``, asks for another adapter than that of ``folder``."""
    asked = {name: (getattr(config, name), getattr(lora, peft_name)) for name, peft_name in SETTINGS.items()}
    if targets:
        own = names(lora.target_modules) + names(lora.target_parameters)
        asked["lora_target_modules"] = (sorted(targets), sorted(own))
    if changed := [f"{name} {ours}, it has {theirs}" for name, (ours, theirs) in asked.items() if ours != theirs]:
        raise ConfigError(
            f"the student {folder} is an adapter already ({'; '.join(changed)}); give its own settings to go on with it, "
            "or name its base as the student for a new adapter"
        )


def check_trainable(model: PreTrainedModel, merge: bool) -> None:
    """Raise ConfigError if weights that are quantised are to be trained, or to take up an adapter: they would be rounded away."""
    if not (method := quantised(model.config)) or (has_adapter(model) and not merge):
        return
    what = "an adapter cannot be merged into them: leave merge out" if merge else "they cannot be trained: set use_peft"
    raise ConfigError(
        f"the student's weights are quantised ({method}), and {what}, or take the student in full precision"
    )


def has_adapter(model: nn.Module) -> bool:
    """Whether an adapter sits in ``model``."""
    return getattr(model, "_hf_peft_config_loaded", False)


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
def load_adapter(model: PreTrainedModel, folder: Path, into: Mapping[str, Tensor] | None = None) -> None:
    """Read saved adapter weights into the adapter of ``model``, or into these tensors by the names of its weights, in place.

    Raises ModelError unless names and shapes agree.
    """
    try:
        saved, own = load_file(folder / WEIGHTS), _tensors(model, into or {})
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
    # Of the weights of one module, such as experts, each has a layer of its own around the layer of the one before.
    for name, layer in reversed([(name, module) for name, module in plain.named_modules() if module in layers]):
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.base_layer)
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
    with warnings.catch_warnings():  # peft looks for its own patterns of experts among modules alone, and warns
        warnings.simplefilter("ignore", RuntimeWarning)
        require("peft").inject_adapter_in_model(lora, model, NAME)
    model._hf_peft_config_loaded = True
    model.eval()  # new modules are born in training mode
    # A folder's own name, so that the adapter opens from anywhere.
    lora.base_model_name_or_path = str(Path(name).resolve()) if name and Path(name).is_dir() else name
    put_in_order(lora)


def _widen(model: PreTrainedModel) -> None:
    """Put the adapter into float32, if it is narrower: it is to be updated."""
    for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _targets(model: PreTrainedModel, targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """The targets that name linear layers, and the weights that others name: of experts and routers, which are no such layers.

    Raises ConfigError for a target that names neither, or the output layer.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    head, weights = model.get_output_embeddings(), _bare_weights(model)
    layers: list[str] = []
    named: dict[str, None] = {}
    for target in targets:
        found = [module for name, module in linear.items() if _ends_with(name, target)]
        if any(module is head for module in found):
            raise ConfigError(
                f"lora_target_modules names the output layer {target!r}, whose weight the loss takes as it is; "
                "adapt the layers of the body only"
            )
        own = [name for name in weights if _ends_with(name, target) or _ends_with(name.rpartition(".")[0], target)]
        if not found and not own:
            known = {name.rsplit(".", 1)[-1] for name, module in linear.items() if module is not head}
            known |= {name.split(".")[-2] for name in weights}
            raise ConfigError(
                f"lora_target_modules: the student has no linear layer {target!r}{nearest(target, known)}"
            )
        layers += [target] if found else []
        named |= dict.fromkeys(own)
    return layers, list(named)


def _bare_weights(model: PreTrainedModel) -> list[str]:
    """Names of the matrices that stand in no layer of torch: those of experts and routers."""
    return [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if prefix
        and not (isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) or type(module).__module__.startswith("torch."))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() in (2, 3) and not name.endswith("bias")
    ]


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


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


# --- the options of an adapter's config that are known to work ----------------------------------------------------

_LIST_OR_TEXT = (list[str], str)  # names, or one regular expression
# The options that reach peft, with the types that each may have.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "r": (int,),
    "lora_alpha": (float,),
    "lora_dropout": (float,),
    "target_modules": _LIST_OR_TEXT,
    "exclude_modules": _LIST_OR_TEXT,
    "target_parameters": (list[str],),
    "layers_to_transform": (list[int], int),
    "layers_pattern": _LIST_OR_TEXT,
    "rank_pattern": (dict[str, int],),
    "alpha_pattern": (dict[str, float],),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "fan_in_fan_out": (bool,),
}
# Options that may be given, but only so that they mean nothing beyond plain LoRA on a causal language model.
VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "revision": ("main",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian"),
    "modules_to_save": ([],),
    "loftq_config": ({},),
}
# Options that are read elsewhere, or by nobody unless another one is set that is refused.
_UNREAD = {
    "base_model_name_or_path", "inference_mode", "peft_version", "auto_mapping", "megatron_core", "qalora_group_size",
}  # fmt: skip


def options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings of an adapter say to peft's LoraConfig. Raises DataError, naming every option that is not known to work."""
    used = {name: value for name, value in settings.items() if not (value is None or value is False or name in _UNREAD)}
    known = {name: value for name, value in used.items() if name in OPTIONS}
    odd = [name for name in used.keys() - known.keys() if used[name] not in VALUES.get(name, ())]
    if odd:
        raise DataError(
            f"has {', '.join(f'{name} set to {shown(used[name])}' for name in sorted(odd))}, which is not known to work here: "
            f"switchkd opens LoRA adapters that use no options but {', '.join(OPTIONS)}; merge this one into its base with peft, "
            "and give the merged model"
        )
    for name, value in known.items():
        _check(name, value)
    return known


def patterns(known: Mapping[str, Any]) -> list[str]:
    """The regular expressions in an adapter's options."""
    texts = (known.get(name) for name in ("target_modules", "exclude_modules"))
    lists = (names(known.get("layers_pattern")), known.get("rank_pattern", ()), known.get("alpha_pattern", ()))
    return [text for text in texts if isinstance(text, str)] + [text for each in lists for text in each]


def put_in_order(lora: Any) -> None:
    """Put what peft made a set of into an ordered list, so that equal adapters have equal files. Text stays text."""
    for name, value in vars(lora).items():
        if isinstance(value, set):
            setattr(lora, name, sorted(value))


def names(value: Any) -> list[str]:
    """One name or pattern, several, or none, as a list. (``list`` of a text would be its letters.)"""
    return [] if value is None else [value] if isinstance(value, str) else sorted(value)


def _check(name: str, value: Any) -> None:
    for hint in OPTIONS[name]:
        try:
            return check_type(value, hint, name)
        except DataError as error:
            wrong = error
    raise wrong
