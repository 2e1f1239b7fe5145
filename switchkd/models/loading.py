"""Load a teacher and a student, and refuse a pair that would train silently wrong.

Only safetensors and JSON are read, no code from a model folder runs, and a local folder never asks a hub.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from huggingface_hub import try_to_load_from_cache

from switchkd.base import signals
from switchkd.base.errors import ConfigError, DataError, ModelError, nearest
from switchkd.base.limits import check_counts, check_tokenizer, no_larger_than
from switchkd.base.plain import check_type, json_object, shown
from switchkd.base.storage import expanded
from switchkd.data.small_data import NOT_MADE, SMALL_MODELS, small_model_folder
from switchkd.models import pypi_pairs
from switchkd.models.adapters import ADAPTER_CONFIG
from switchkd.models.settings import AUTO, BASE, Place, chosen_dtype, quantised
from switchkd.runner.architecture import check_layers, model_class

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


MADE = (*SMALL_MODELS, *pypi_pairs.PAIRS)  # pairs that the package makes in the user's cache
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")


class _Index(TypedDict):
    weight_map: dict[str, str]


def load_model(
    name: str,
    dtype: str = "float32",
    device: str | None = None,
    load_in_4bit: bool = False,
    place: Place | None = None,
) -> "PreTrainedModel":
    """A causal language model in eval mode, all parameters trainable; ``name`` as in `load_pair` (of a pair: the teacher).

    Of an adapter on its base only the adapter is trainable. ``load_in_4bit`` quantises the linear layers of the body. ``place``
    says more of where a teacher's weights go.
    Raises ConfigError for an unknown ``dtype`` or ``device``, ModelError where the folder is not a whole model of
    safetensors and JSON, or its architecture cannot be decoded with rollback.
    """
    import torch
    from transformers import AutoModelForCausalLM

    signals.check()
    torch_device = device_named(device)
    torch_dtype = dtype_named(dtype, torch_device)
    source, is_local = located(name)
    if is_adapter(source):
        from switchkd.models.adapters import open_adapter

        model = load_model(adapter_base(source), dtype, device, load_in_4bit, place)
        open_adapter(model, Path(source))
        _take_generation_config(model, Path(source))
        return model
    config = load_config(source, is_local)
    check_layers(config)
    place = place or Place(load_in_4bit=load_in_4bit)
    if (place.load_in_8bit or place.load_in_4bit) and (method := quantised(config)):
        bits = "load_in_4bit" if place.load_in_4bit else "load_in_8bit"
        raise ConfigError(f"{bits}, and the weights of {source} are quantised already ({method}); leave it out")
    placed = _placed(place, config, torch_device, torch_dtype)
    size = no_larger_than(_weight_bytes(Path(source)), source) if is_local else nullcontext()
    with as_model_error(source, is_local), size:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=torch_dtype,
            local_files_only=is_local,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=_attention(config),
            output_loading_info=True,
            **placed,
        )
    # transformers only warns here and goes on with random weights.
    if unusable := sorted({str(key) for field in ("missing_keys", "mismatched_keys") for key in info[field]}):
        raise ModelError(
            f"{source}: {len(unusable)} weights of {type(model).__name__} are missing or have another shape, "
            f"first {', '.join(unusable[:3])}; copy or download the model again"
        )
    if torch_dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped products of experts have no float64
    if spilled := [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]:
        raise ModelError(
            f"{source} does not fit on the GPUs of this process: {len(spilled)} of its weights would stay on the host or the disk, "
            "and be copied in every forward; use more GPUs, or teacher_load_in_8bit"
        )
    return model.eval() if placed else model.eval().to(torch_device)


@contextmanager
def silent_libraries() -> Iterator[None]:
    """No progress bars of transformers, which would stand between ours; they are as they were afterwards."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def check_place(name: str, place: Place) -> None:
    """Raise ConfigError or ModelError for a teacher whose weights cannot lie at this place; none are read."""
    from switchkd.forward.parallel import check_parallel, check_processes, processes

    if place.device == AUTO and processes() > 1:
        raise ConfigError(
            f"teacher_device auto spreads a teacher over all GPUs, and each of {processes()} processes would; start one process, "
            "or use teacher_tensor_parallel"
        )
    if place.device not in ("", AUTO):
        device_named(place.device)
    if place.tensor_parallel == 1:
        return
    check_processes(place.tensor_parallel)
    if is_adapter(name):
        raise ModelError(
            f"{name} is an adapter, which cannot be put on a teacher in shards; merge it into its base with peft"
        )
    source, is_local = located(name)
    check_parallel(load_config(source, is_local), source, place.tensor_parallel, place.expert_parallel)


def _placed(place: Place, config: "PretrainedConfig", device: "torch.device", dtype: "torch.dtype") -> dict[str, Any]:
    """What ``from_pretrained`` is told of where weights go; nothing, if they are moved to their one device afterwards."""
    if place.tensor_parallel > 1:
        from switchkd.forward.parallel import sharded_over

        return sharded_over(place.tensor_parallel, place.expert_parallel)
    told: dict[str, Any] = {"device_map": AUTO} if place.device == AUTO else {}
    if place.load_in_8bit or place.load_in_4bit:
        told = {"device_map": {"": device}} | told | {"quantization_config": _in_bits(place, dtype)}
    return told


def load_shapes(name: str) -> "PreTrainedModel":
    """The model of ``name`` without its weights: its modules and their shapes, in float32, on torch's meta device.

    ``name`` is a folder with a config.json, such a file, or a hub name, which is asked for that one file. Raises ModelError where
    that describes no causal language model that can be decoded here, or an adapter.
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(expanded(name))
    if is_adapter(path):
        raise ModelError(f"{name} is an adapter, which has no config.json; name its base, {adapter_base(name)}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{name} holds no config.json; name a folder that has one, such a file, or a hub name")
    if not path.exists() and not HUB_NAME.fullmatch(name):
        raise ModelError(f"{name} does not exist; name a folder that holds a config.json, such a file, or a hub name")
    source = str(path) if path.exists() else name
    config = load_config(source, path.exists())
    check_layers(config)
    with as_model_error(source, path.exists()), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=_attention(config), trust_remote_code=False
        ).eval()


def _take_generation_config(model: "PreTrainedModel", adapter: Path) -> None:
    """What is saved beside an adapter says where its texts end; its base may end them otherwise."""
    from transformers import GenerationConfig

    file = adapter / "generation_config.json"
    if file.is_file():
        with as_model_error(str(adapter), True):
            model.generation_config = GenerationConfig.from_dict(json_object(file.read_bytes()))


def load_tokenizer(name: str, on_disk: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of ``name`` (as in `load_pair`); raises ModelError if there is none or it needs its own code.

    ``on_disk`` takes what is there already: no hub is asked, and no pair is made.
    """
    from transformers import AutoTokenizer

    if on_disk and name in MADE:
        raise ModelError(f"the tokenizer of {name!r} would have to be made first")
    source, is_local = located(name)
    if on_disk and not is_local:  # transformers would ask the hub all the same
        source, is_local = _in_cache(source), True
    own = any((Path(source) / file).is_file() for file in TOKENIZER_FILES)
    if is_adapter(source) and not own:
        return load_tokenizer(adapter_base(source), on_disk)
    if is_local and not own:
        raise ModelError(
            f"{source} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); save one there with "
            "tokenizer.save_pretrained(folder)"
        )
    if is_local and (file := Path(source) / "tokenizer.json").is_file():
        check_tokenizer(file)
    with as_model_error(source, is_local):
        return AutoTokenizer.from_pretrained(source, local_files_only=is_local, trust_remote_code=False)


def _in_cache(name: str) -> str:
    """The folder in which the hub's cache holds a tokenizer; raises ModelError if it holds none."""

    found = next((file for file in TOKENIZER_FILES if isinstance(try_to_load_from_cache(name, file), str)), None)
    if found is None:
        raise ModelError(f"the tokenizer of {name} is not on this machine, and no hub is asked for it")
    return str(Path(str(try_to_load_from_cache(name, found))).parent)


def adapter_base(name: str) -> str:
    """The model that the adapter in folder ``name`` was trained on; ``name`` itself if it is no adapter.

    Raises ModelError if the adapter names no base, or another adapter as its base.
    """
    if not is_adapter(name):
        return name
    file = Path(expanded(name)) / ADAPTER_CONFIG
    try:
        base = json_object(file.read_bytes()).get("base_model_name_or_path")
        check_type(base, str | None, "base_model_name_or_path")
    except (OSError, DataError) as error:
        raise ModelError(f"{file} cannot be read: {error}; copy the adapter again") from error
    if not base or is_adapter(base):
        what = f"the adapter {base} as its base; merge that one first" if base else "no base_model_name_or_path"
        raise ModelError(f"{file} names {what}; write the name or folder of a whole model there")
    return base


def made(name: str, role: Literal["teacher", "student"]) -> str:
    """The folder of that role if ``name`` is a pair that the package makes, else ``name``."""
    if name not in MADE:
        return name
    if name in SMALL_MODELS:
        folder = small_model_folder(name, role)
        if not folder.is_dir():
            raise ModelError(NOT_MADE.format(folder.parent))
        return str(folder)
    teacher, student = pypi_pairs.pair_paths(name)
    return str(teacher if role == "teacher" else student)


def made_folder(name: str, role: Literal["teacher", "student"]) -> str:
    """``made`` for a pair that was made already; else ``name``. Nothing is made."""
    if name not in MADE:
        return name
    folder = small_model_folder(name, role) if name in SMALL_MODELS else pypi_pairs.pair_folder(name) / role
    return str(folder) if folder.is_dir() else name


def is_adapter(name: str | Path) -> bool:
    return (Path(expanded(name)) / ADAPTER_CONFIG).is_file()


def _in_bits(place: Place, dtype: "torch.dtype") -> "BitsAndBytesConfig":
    """Weights in 8 bits, or, as QLoRA's base, in 4-bit NormalFloat; products in ``dtype``."""
    from transformers import BitsAndBytesConfig

    from switchkd.models.adapters import require

    require("bitsandbytes")
    if place.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def check_source(name: str) -> None:
    """Raise ModelError unless ``name`` may be a model's: a folder that holds one, or a name on the hub, which is not asked."""
    if name != BASE and name not in MADE:
        located(name)


def located(name: str) -> tuple[str, bool]:
    """The name to load and whether it is a local folder; a local folder is checked here."""
    name = made(name, "teacher")
    folder = Path(expanded(name))
    if folder.is_dir():
        _check_folder(folder)
        return str(folder), True
    if folder.exists() or not HUB_NAME.fullmatch(name):
        what = "is a file" if folder.exists() else "does not exist"
        raise ModelError(f"{name} {what}; a model is a folder with config.json and *.safetensors, or a hub name")
    return name, False


def _check_folder(folder: Path) -> None:
    if is_adapter(folder):
        return  # its base is checked when it is loaded
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json; name the folder that model.save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        raise ModelError(
            f"{folder} holds no *.safetensors{f' but {others[0]}' if others else ''}; only safetensors are read: load "
            "the model with its own tools and write it again with model.save_pretrained(folder)"
        )
    for index in folder.glob("*.safetensors.index.json"):
        _check_shards(index)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _check_shards(index: Path) -> None:
    """Raise ModelError unless a list of shards names files of its own folder. (A link there may lead elsewhere: a hub's cache
    is made of them, and what is read is safetensors in any case.)"""
    try:
        record = json_object(index.read_bytes())
        check_type(record, _Index)
    except (OSError, DataError) as error:
        raise ModelError(f"{index} cannot be read: {error}; copy the model again") from error
    if outside := [name for name in record["weight_map"].values() if not SHARD.fullmatch(name)]:
        raise ModelError(
            f"{index} names the shard {shown(outside[0])}, which is no *.safetensors in its folder; copy the model again"
        )


def load_config(source: str, is_local: bool) -> "PretrainedConfig":
    from transformers import AutoConfig, PretrainedConfig

    with as_model_error(source, is_local):
        raw, _ = PretrainedConfig.get_config_dict(source, local_files_only=is_local)
    if "auto_map" in raw:
        raise ModelError(
            f"{source} needs its own code (auto_map in config.json); switchkd runs no code from a model folder: "
            "choose a model whose architecture is part of transformers"
        )
    check_counts(raw, source)
    with as_model_error(source, is_local):
        return AutoConfig.from_pretrained(source, local_files_only=is_local, trust_remote_code=False)


@contextmanager
def as_model_error(source: str, is_local: bool) -> Iterator[None]:
    """The many ways in which transformers refuse a file, or stumble over it, become one error."""
    try:
        yield
    except Exception as error:
        where = "" if is_local else f" (there is no local folder {source}, so the hub was asked)"
        raise ModelError(f"cannot load {source}{where}: {error}; check the name, or copy the model again") from error


def _attention(config: "PretrainedConfig") -> str:
    # sdpa has no place for a tanh on the attention logits, and leaves it out.
    soft_capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None
    return "eager" if soft_capped or not model_class(config)._supports_sdpa else "sdpa"


def dtype_named(name: str, device: "torch.device") -> "torch.dtype":
    import torch

    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}{nearest(name, DTYPES)}")
    return getattr(torch, chosen_dtype(name, device))


def default_device() -> "torch.device":
    """Where models are loaded if nobody says where: the current CUDA device, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_named(name: str | None) -> "torch.device":
    import torch

    if name is None:
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; use 'cpu', 'cuda' or 'cuda:1'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}, but PyTorch sees no CUDA device; use 'cpu', or leave device out")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"device {name!r}, but PyTorch sees {count} CUDA devices, which count from 0; name one of them"
        )
    return device
