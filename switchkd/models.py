"""Load a teacher and a student, and refuse a pair that would train silently wrong.

Only safetensors and JSON are read, no code from a model folder runs, and a local folder never asks a hub.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from switchkd import signals
from switchkd.config import BASE
from switchkd.ends import Ends, declared_ends, merged_by, pair_ends
from switchkd.errors import ConfigError, DataError, ModelError, SwitchKDError, nearest
from switchkd.limits import check_counts, check_tokenizer, no_larger_than
from switchkd.paths import expanded
from switchkd.plain import check_type, json_object, shown
from switchkd.precision import chosen_dtype, chosen_teacher_dtype, dtype_name, quantised
from switchkd.saved_student import verify_saved
from switchkd.template_inputs import Template
from switchkd.vocabulary import check_logits_rows, check_vocabulary, left_out_note, other_prompts, prompt_warnings

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from switchkd.config import ModelConfig
    from switchkd.data import Batch

MADE = ("demo", "small")  # pairs that the package makes in the user's cache
ADAPTER_CONFIG = "adapter_config.json"
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
ROLLBACK_LAYERS = ("full_attention", "sliding_attention")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")


class _Index(TypedDict):
    weight_map: dict[str, str]


@dataclass(frozen=True)
class Pair:
    """A teacher (frozen) and a student (trainable) over one tokenizer, both in eval mode.

    ``vocab_size`` counts the ids that the tokenizer and both models' logits have; logits rows from ``vocab_size`` on
    are padding. ``eos_token_ids`` stop a text; where ``merged_eos_token_id`` is one of them, all are one event (``ends``).
    ``warnings`` are sentences to print once: the pair can be used, but differs in what they say. ``teachers`` are
    more teachers by name, for data rows that name one; all others have ``teacher``. ``folder_dtype`` is what the student's folder
    says that its weights are in, in which a distilled student is saved by default.
    """

    teacher: "PreTrainedModel"
    student: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    warnings: tuple[str, ...]
    teachers: "Mapping[str, PreTrainedModel]" = field(default_factory=dict)
    folder_dtype: str = "float32"
    merged_eos_token_id: int | None = None

    @property
    def ends(self) -> Ends:
        """What stops a text, and the law of that."""
        return Ends(tuple(self.eos_token_ids), self.merged_eos_token_id)

    @property
    def named_teachers(self) -> "dict[str, PreTrainedModel]":
        """All teachers by name; "" is the default one."""
        return {"": self.teacher, **self.teachers}

    def teacher_named(self, name: str) -> "PreTrainedModel":
        """The teacher of that name; raises ConfigError if there is none."""
        if name not in self.named_teachers:
            raise ConfigError(f"no teacher {name!r}{nearest(name, self.teachers)}; give it in teachers")
        return self.named_teachers[name]


def load_pair(
    teacher: str,
    student: str | None = None,
    *,
    dtype: str = "float32",
    teacher_dtype: str = "auto",
    device: str | None = None,
    lora: "ModelConfig | None" = None,
    seed: int = 0,
    teachers: Mapping[str, str] | None = None,
    template: str | Template | None = None,
) -> Pair:
    """Load and check a pair; each name is a hub name, a local folder, ``"demo"`` or ``"small"`` (for both if ``student`` is None).

    A folder may hold a LoRA adapter, which is put on its base. ``lora`` asks for an adapter on the student: a new one of these
    settings, its weights keyed by ``seed``, or the one that the student's folder holds. Only the adapter is then trainable.
    The teacher ``"base"`` is the student's own base, on the same weights. ``teachers`` are more of them by name; each is checked
    as the first one is, and equal folders are loaded once.
    ``dtype`` is of the student's weights and products, ``teacher_dtype`` of the teachers'; ``auto`` is bfloat16 on a GPU that is
    good at it, else float32, and float64 for a teacher beside a student in float64. A new or opened adapter is float32 or wider.
    ``template`` is the one that text will be written with: its end is one of the pair's. None: chat if the tokenizer has a chat
    template, else none.
    ``device`` None is the current CUDA device if there is one, else the CPU.
    Raises ConfigError for a wrong setting, ModelError for a model that cannot be used, CheckpointError for what a run saved and is
    not as it was written, VocabularyError where the tokenizers are not equal id by id or a model has too few logits rows.
    """
    teacher_name, student_name = _pair_names(teacher, student)
    sources = {"": teacher_name} | {name: made(source, "teacher") for name, source in (teachers or {}).items()}
    for source in dict.fromkeys([student_name, *sources.values()]):
        verify_saved(Path(expanded(source)))
    if BASE in sources.values() and lora is None and not _is_adapter(student_name):
        raise ConfigError(
            f"teacher {BASE!r} is the model under the student's adapter, and {student_name} has none; set use_peft, or name a "
            f"teacher (a folder of that name is './{BASE}')"
        )
    student_tokenizer = load_tokenizer(student_name)
    tokenizers, sizes = {}, []
    for name, source in sources.items():  # before any weights are read
        with _naming(name):
            tokenizers[name] = student_tokenizer if source == BASE else load_tokenizer(source)
            sizes.append(check_vocabulary(tokenizers[name], student_tokenizer))
    vocab_size = min(sizes)
    student_model, notes = _load_student(student_name, dtype, device, lora, seed)
    models = _load_teachers(sources, chosen_teacher_dtype(teacher_dtype, dtype, _device(device)), device, student_model)
    for name, model in models.items():
        with _naming(name):
            vocab_size = check_logits_rows(model, vocab_size, "teacher", tokenizers[name])
            vocab_size = check_logits_rows(student_model, vocab_size, "student", tokenizers[name])
    left_out = left_out_note([student_tokenizer, *tokenizers.values()], vocab_size)
    ends, told = _ends(models, student_model, tokenizers, student_tokenizer, vocab_size, template)
    tokenizer = tokenizers.pop("")
    warnings = notes + left_out + prompt_warnings(tokenizer, student_tokenizer) + other_prompts(tokenizer, tokenizers)
    warnings += told
    if teacher_name == BASE and not _is_adapter(student_name):
        warnings += (
            "note: a new adapter has no effect, so the student starts as its teacher, and a divergence on equal prompts has no "
            "gradient there: a teacher_prompt, dropout or what else is in the loss must move it; else name a student that is an "
            "adapter already",
        )
    source_dtype = _folder_dtype(student_name)
    default = models.pop("")
    return Pair(
        default, student_model, tokenizer, vocab_size, ends.ids, warnings, models, source_dtype, ends.merged_into
    )


def load_model(
    name: str, dtype: str = "float32", device: str | None = None, load_in_4bit: bool = False
) -> "PreTrainedModel":
    """A causal language model in eval mode, all parameters trainable; ``name`` as in `load_pair` (demo, small: the teacher).

    Of an adapter on its base only the adapter is trainable. ``load_in_4bit`` quantises the linear layers of the body.
    Raises ConfigError for an unknown ``dtype`` or ``device``, ModelError where the folder is not a whole model of
    safetensors and JSON, or its architecture cannot be decoded with rollback.
    """
    import torch
    from transformers import AutoModelForCausalLM

    signals.check()
    torch_device = _device(device)
    torch_dtype = _dtype(dtype, torch_device)
    source, is_local = _locate(name)
    if _is_adapter(source):
        from switchkd.adapters import open_adapter

        model = load_model(adapter_base(source), dtype, device, load_in_4bit)
        open_adapter(model, Path(source))
        _take_generation_config(model, Path(source))
        return model
    config = _load_config(source, is_local)
    refuse_recurrent(config)
    if load_in_4bit and (method := quantised(config)):
        raise ConfigError(f"load_in_4bit, and the weights of {source} are quantised already ({method}); leave it out")
    in_4bit = {"quantization_config": _nf4(torch_dtype), "device_map": {"": torch_device}} if load_in_4bit else {}
    size = no_larger_than(_weight_bytes(Path(source)), source) if is_local else nullcontext()
    with _as_model_error(source, is_local), size:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=torch_dtype,
            local_files_only=is_local,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=_attention(config),
            output_loading_info=True,
            **in_4bit,
        )
    # transformers only warns here and goes on with random weights.
    if unusable := sorted({str(key) for field in ("missing_keys", "mismatched_keys") for key in info[field]}):
        raise ModelError(
            f"{source}: {len(unusable)} weights of {type(model).__name__} are missing or have another shape, "
            f"first {', '.join(unusable[:3])}; copy or download the model again"
        )
    if torch_dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped products of experts have no float64
    return model.eval().to(torch_device)


def _take_generation_config(model: "PreTrainedModel", adapter: Path) -> None:
    """What is saved beside an adapter says where its texts end; its base may end them otherwise."""
    from transformers import GenerationConfig

    file = adapter / "generation_config.json"
    if file.is_file():
        with _as_model_error(str(adapter), True):
            model.generation_config = GenerationConfig.from_dict(json_object(file.read_bytes()))


def load_tokenizer(name: str, on_disk: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of ``name`` (as in `load_pair`); raises ModelError if there is none or it needs its own code.

    ``on_disk`` takes what is there already: no hub is asked, and no pair is made.
    """
    from transformers import AutoTokenizer

    if on_disk and name in MADE:
        raise ModelError(f"the tokenizer of {name!r} would have to be made first")
    source, is_local = _locate(name)
    if on_disk and not is_local:  # transformers would ask the hub all the same
        source, is_local = _in_cache(source), True
    own = any((Path(source) / file).is_file() for file in TOKENIZER_FILES)
    if _is_adapter(source) and not own:
        return load_tokenizer(adapter_base(source), on_disk)
    if is_local and not own:
        raise ModelError(
            f"{source} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); save one there with "
            "tokenizer.save_pretrained(folder)"
        )
    if is_local and (file := Path(source) / "tokenizer.json").is_file():
        check_tokenizer(file)
    with _as_model_error(source, is_local):
        return AutoTokenizer.from_pretrained(source, local_files_only=is_local, trust_remote_code=False)


def _in_cache(name: str) -> str:
    """The folder in which the hub's cache holds a tokenizer; raises ModelError if it holds none."""
    from huggingface_hub import try_to_load_from_cache

    found = next((file for file in TOKENIZER_FILES if isinstance(try_to_load_from_cache(name, file), str)), None)
    if found is None:
        raise ModelError(f"the tokenizer of {name} is not on this machine, and no hub is asked for it")
    return str(Path(str(try_to_load_from_cache(name, found))).parent)


def adapter_base(name: str) -> str:
    """The model that the adapter in folder ``name`` was trained on; ``name`` itself if it is no adapter.

    Raises ModelError if the adapter names no base, or another adapter as its base.
    """
    if not _is_adapter(name):
        return name
    file = Path(expanded(name)) / ADAPTER_CONFIG
    try:
        base = json_object(file.read_bytes()).get("base_model_name_or_path")
        check_type(base, str | None, "base_model_name_or_path")
    except (OSError, DataError) as error:
        raise ModelError(f"{file} cannot be read: {error}; copy the adapter again") from error
    if not base or _is_adapter(base):
        what = f"the adapter {base} as its base; merge that one first" if base else "no base_model_name_or_path"
        raise ModelError(f"{file} names {what}; write the name or folder of a whole model there")
    return base


def student_base(name: str) -> str:
    """The model that the teacher ``"base"`` of student ``name`` is."""
    return adapter_base(_pair_names(BASE, name)[1])


def context_length(model: "PreTrainedModel") -> float:
    """Tokens that fit into the model's context and are read exactly; infinite where its config sets no limit."""
    config = model.config.get_text_config()
    own = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 0
    return min([own if own > 0 else float("inf"), *exact_lengths(config).values()])


def context_note(*models: "PreTrainedModel") -> str:
    """Why a context of these models is shorter than their config says, to stand behind its number; "" if it is not."""
    found = dict.fromkeys(why for model in models for why in exact_lengths(model.config.get_text_config()))
    return f" ({'; '.join(found)})" if found else ""


def exact_lengths(config: "PretrainedConfig") -> dict[str, int]:
    """Lengths of text up to which a row's logits depend on the row alone, by the reason; none for most models."""
    found = {}
    for rope in ropes(config):
        if rope.get("rope_type") == "longrope" and (length := rope.get("original_max_position_embeddings")):
            # One set of rotations serves a whole batch, and a text that grows beyond changes what was cached of it.
            found["beyond original_max_position_embeddings longrope turns the positions of all rows otherwise"] = length
    if length := getattr(config, "keep_window_size", None):  # Doge
        found["beyond keep_window_size it leaves out tokens, and looks ahead to choose them"] = length
    return found


def batch_inputs(model: "PreTrainedModel", batch: "Batch") -> dict[str, Any]:
    """What a model is called with to read a padded batch.

    Padding stands at the right, where no row looks, so that it needs no mask. Under one, places that see nothing at all may
    become NaN, and 0 · NaN then spoils the row. Balancing losses count the tokens by it.
    """
    mask = batch.attention_mask if has_router_logits(model) else None
    return {
        "input_ids": batch.input_ids,
        "attention_mask": mask,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }


def has_router_logits(model: "PreTrainedModel") -> bool:
    """Whether the model is a mixture of experts whose forward may be asked for the logits of its routers."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes = any(p.name == "output_router_logits" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return takes and hasattr(model.config.get_text_config(), "output_router_logits")


def ropes(config: "PretrainedConfig") -> "list[dict[str, Any]]":
    """The settings of a config's rotary embeddings: one set, or one for each kind of layer."""
    own = getattr(config, "rope_parameters", None) or {}
    return [own] if "rope_type" in own else [part for part in own.values() if isinstance(part, dict)]


def refuse_recurrent(model_or_config: "PreTrainedModel | PretrainedConfig") -> None:
    """Raise ModelError for a model whose drafts cannot be rolled back by lowering a cache length.

    Those are models with recurrent, linear, convolutional, chunked or compressed layers, and encoder-decoders.
    """
    from transformers import PretrainedConfig

    given_config = isinstance(model_or_config, PretrainedConfig)
    config = model_or_config if given_config else model_or_config.config
    name = config.model_type
    if config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder model; switchkd decodes decoder-only models: choose one")
    model_class = _model_class(config) if given_config else type(model_or_config)
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ()) - set(ROLLBACK_LAYERS)
    if kinds == {"chunked_attention"}:
        raise ModelError(
            f"{name} attends in chunks (chunked_attention), so a row's cache slots do not follow its token positions; "
            "choose a model with full or sliding-window attention"
        )
    if kinds or model_class._is_stateful:
        found = f"layers of kind {', '.join(sorted(kinds))}" if kinds else "recurrent layers"
        raise ModelError(
            f"{name} has {found}: their state cannot be rolled back when a draft is rejected; "
            "choose a model with full or sliding-window attention"
        )


def num_parameters(model: "torch.nn.Module") -> int:
    """Parameters of ``model``; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_bytes(model: "torch.nn.Module") -> int:
    """Bytes that the parameters of ``model`` take; tied ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def cache_bytes_per_token(model: "PreTrainedModel") -> int:
    """Bytes that the keys and values of one token take."""
    text = model.config.get_text_config()
    # Of some models (Gemma 4) layers differ in their heads.
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text] * text.num_hidden_layers
    return sum(2 * _kv_numbers(layer) for layer in layers) * model.dtype.itemsize


def _kv_numbers(layer: "PretrainedConfig") -> int:
    head = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return (getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads) * head


def _pair_names(teacher: str, student: str | None) -> tuple[str, str]:
    if student is None and teacher not in MADE:
        raise ConfigError(
            f"teacher {teacher!r} has no student; name one, or make one with `switchkd prune {teacher} FOLDER`"
        )
    return made(teacher, "teacher"), made(teacher if student is None else student, "student")


def made(name: str, role: Literal["teacher", "student"]) -> str:
    """The folder of that role if ``name`` is a pair that the package makes, else ``name``."""
    if name not in MADE:
        return name
    from switchkd import demo_pair, small_pair

    teacher, student = demo_pair.demo_pair_paths() if name == "demo" else small_pair.small_pair_paths()
    return str(teacher if role == "teacher" else student)


def _same_model(one: str, other: str) -> bool:
    folders = [Path(expanded(name)) for name in (one, other)]
    return one == other or (
        BASE not in (one, other) and all(map(Path.is_dir, folders)) and folders[0].samefile(folders[1])
    )


@contextmanager
def _naming(teacher: str) -> Iterator[None]:
    """What is wrong with a named teacher is said with its name."""
    try:
        yield
    except SwitchKDError as error:
        if not teacher:
            raise
        raise type(error)(f"teacher {teacher!r}: {error}") from error


def _ends(
    teachers: "Mapping[str, PreTrainedModel]",
    student: "PreTrainedModel",
    tokenizers: "Mapping[str, PreTrainedTokenizerBase]",
    student_tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int,
    template: str | Template | None,
) -> tuple[Ends, tuple[str, ...]]:
    """The ends of a pair, which all of its models then declare, and what there is to say of them."""
    found = {}
    for name, model in teachers.items():
        with _naming(name):
            found[f"teacher {name!r}" if name else "teacher"] = declared_ends(model, tokenizers[name], vocab_size)
    found["student"] = declared_ends(student, student_tokenizer, vocab_size)
    models = [*teachers.values(), student]
    merged = any(merged_by(model) is not None for model in models)
    ends, told = pair_ends({role: ids for role, (ids, _) in found.items()}, tokenizers[""], template, merged)
    for model in models:
        ends.declare(model)
    return ends, (*dict.fromkeys(note for _, note in found.values() if note), *told)


def _is_adapter(name: str | Path) -> bool:
    return (Path(expanded(name)) / ADAPTER_CONFIG).is_file()


def _load_teacher(name: str, dtype: str, device: str | None, student: "PreTrainedModel") -> "PreTrainedModel":
    if name != BASE:
        return load_model(name, dtype, device).requires_grad_(False)
    from switchkd.base_model import BaseModel

    return BaseModel(student)


def _load_teachers(
    sources: Mapping[str, str], dtype: str, device: str | None, student: "PreTrainedModel"
) -> "dict[str, PreTrainedModel]":
    """The teachers by name, one model for equal sources."""
    models: dict[str, PreTrainedModel] = {}
    for name, source in sources.items():
        same = next((other for other in models if _same_model(sources[other], source)), None)
        with _naming(name):
            models[name] = _load_teacher(source, dtype, device, student) if same is None else models[same]
    return models


def _load_student(
    name: str, dtype: str, device: str | None, lora: "ModelConfig | None", seed: int
) -> "tuple[PreTrainedModel, tuple[str, ...]]":
    """The student, and what there is to say of it."""
    from switchkd.text_path import freeze_beside_text, frozen_note

    if lora is None:
        model = load_model(name, dtype, device)
        beside = freeze_beside_text(model)
    else:
        from switchkd.adapters import add_adapter, open_adapter

        model = load_model(adapter_base(name), dtype, device, lora.load_in_4bit)
        beside = freeze_beside_text(model)
        if _is_adapter(name):
            open_adapter(model, Path(name), asked=lora)
            freeze_beside_text(model)  # what another hand has adapted there
        else:
            add_adapter(model, lora, seed, beside)
    return model, (frozen_note(beside),) if beside else ()


def _nf4(dtype: "torch.dtype") -> "BitsAndBytesConfig":
    """QLoRA's base: 4-bit NormalFloat weights, products in ``dtype``."""
    from transformers import BitsAndBytesConfig

    from switchkd.adapters import require

    require("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def check_source(name: str) -> None:
    """Raise ModelError unless ``name`` may be a model's: a folder that holds one, or a name on the hub, which is not asked."""
    if name != BASE and name not in MADE:
        _locate(name)


def _locate(name: str) -> tuple[str, bool]:
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
    if _is_adapter(folder):
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


def _load_config(source: str, is_local: bool) -> "PretrainedConfig":
    from transformers import AutoConfig, PretrainedConfig

    with _as_model_error(source, is_local):
        raw, _ = PretrainedConfig.get_config_dict(source, local_files_only=is_local)
    if "auto_map" in raw:
        raise ModelError(
            f"{source} needs its own code (auto_map in config.json); switchkd runs no code from a model folder: "
            "choose a model whose architecture is part of transformers"
        )
    check_counts(raw, source)
    with _as_model_error(source, is_local):
        return AutoConfig.from_pretrained(source, local_files_only=is_local, trust_remote_code=False)


@contextmanager
def _as_model_error(source: str, is_local: bool) -> Iterator[None]:
    """The many ways in which transformers refuse a file, or stumble over it, become one error."""
    try:
        yield
    except Exception as error:
        where = "" if is_local else f" (there is no local folder {source}, so the hub was asked)"
        raise ModelError(f"cannot load {source}{where}: {error}; check the name, or copy the model again") from error


def _model_class(config: "PretrainedConfig") -> "type[PreTrainedModel]":
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{config.model_type} is not a causal language model; choose one that generates text")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _attention(config: "PretrainedConfig") -> str:
    # sdpa has no place for a tanh on the attention logits, and leaves it out.
    soft_capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None
    return "eager" if soft_capped or not _model_class(config)._supports_sdpa else "sdpa"


def _dtype(name: str, device: "torch.device") -> "torch.dtype":
    import torch

    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}{nearest(name, DTYPES)}")
    return getattr(torch, chosen_dtype(name, device))


def _folder_dtype(name: str) -> str:
    """What a model's config.json says that its weights are in; float32 where it says nothing. Of an adapter, its base's."""
    source, is_local = _locate(adapter_base(name))
    dtype = _load_config(source, is_local).dtype
    return "float32" if dtype is None else dtype_name(dtype)


def default_device() -> "torch.device":
    """Where models are loaded if nobody says where: the current CUDA device, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device(name: str | None) -> "torch.device":
    import torch

    if name is None:
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; use 'cpu', 'cuda' or 'cuda:1'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}, but PyTorch sees no CUDA device; use 'cpu', or leave device out")
    return device
