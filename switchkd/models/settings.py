"""The settings of models: which pair, in which numbers, with which adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from switchkd.base.errors import ConfigError
from switchkd.base.settings import Settings, check_at_least

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig


BASE = "base"  # as a teacher: the model under the student's adapter
_DEVICE = re.compile(r"|auto|cpu|mps|(cuda|xpu)(:\d+)?")


@dataclass(frozen=True)
class Place:
    """Where the weights of a teacher lie, and in how many bits; by default where the student's do, in their dtype.

    ``device``: another one, or ``auto``: the GPUs of this process share them. ``tensor_parallel``: so many processes do, and each
    has some ``experts`` whole if asked to.
    """

    device: str = ""
    tensor_parallel: int = 1
    expert_parallel: bool = False
    load_in_8bit: bool = False
    load_in_4bit: bool = False

    @property
    def stays(self) -> bool:
        """Whether they lie where they were asked to, and are not moved to the student's device."""
        return self != Place()


def is_address(name: str) -> bool:
    """Whether a teacher's name is the address of a server."""
    return name.startswith(("http://", "https://"))


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Which pair, in which numbers."""

    teacher_model_name_or_path: Annotated[str, tyro.conf.arg(aliases=["--teacher"])] = "demo"
    """Hub name or local folder of the teacher; `demo` is SmolLM2-135M-Instruct, `qwen-coder` Qwen2.5-Coder-1.5B-Instruct (1.6 GB
    to download once), `small` what `make-pair` made. Or the address of a vLLM server that it is behind, such as http://host:8000."""
    teacher_files: str = ""
    """Of a teacher behind a server: the folder or hub name of its config, tokenizer and output layer; default what the server
    names, which may be a folder of another machine."""
    teacher_writer: str = ""
    """Of a teacher behind a server: the address of a second one that writes as it, for adaswitch and for the teacher's own text."""
    student_model_name_or_path: Annotated[str, tyro.conf.arg(aliases=["--student"])] = "demo"
    """Hub name or local folder of the student; `demo`, `qwen-coder` (0.5B) and `small` belong to the teachers of these names."""
    teachers: dict[str, str] = field(default_factory=dict)
    """More teachers, by the name that a row's teacher_field gives them; rows that name none have the teacher above."""
    teacher_field: str = ""
    """The field of a training row that names its teacher, one of `teachers`."""
    shared_marks: dict[str, str] = field(default_factory=dict)
    """Where teacher and student have different tokenizers: special tokens that mean the same, the student's name of each to the
    teacher's, such as {"<think>": "<think>"}. The ends of texts always do."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """What the student multiplies in; auto is bfloat16 on a GPU that is good at it, else float32. Trained weights and moments are
    kept and updated in float32 in any case (in float64 with float64), and so are divergences and decisions."""
    bf16: bool = False
    """The same as dtype bfloat16, by the name that transformers has for it; it is recorded as dtype."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Dtype of the teachers' weights and products; auto is bfloat16 on a GPU that is good at it, else float32."""
    teacher_device: str = ""
    """Device of the teachers, such as cuda:1, or auto: spread over the GPUs of this process. Default: the student's."""
    teacher_tensor_parallel: int = 1
    """Processes that hold the teachers together, each a share of every matrix (tensor parallel); a divisor of their number."""
    teacher_expert_parallel: bool = False
    """Of a teacher that is a mixture of experts, give each of these processes whole experts in place of a share of each."""
    teacher_load_in_8bit: bool = False
    """The teachers' weights in 8 bits; moves what they say. Needs bitsandbytes, of the extra `qlora`, and a GPU."""
    teacher_load_in_4bit: bool = False
    """The same in 4 bits (NF4)."""
    use_peft: bool = False
    """Train a LoRA adapter on the frozen student; needs the extra `peft`. Goes on with the student's own if it is an adapter."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """The adapter's update is scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout on what enters the adapter."""
    lora_target_modules: tuple[str, ...] = ()
    """Names of the linear layers to adapt, such as q_proj v_proj; without any, all of the body."""
    load_in_4bit: bool = False
    """QLoRA: the frozen student in 4 bits (NF4), products in dtype; needs the extra `qlora`."""

    @property
    def teacher_is_base(self) -> bool:
        """Whether the teacher is the model under the student's adapter."""
        return self.teacher_model_name_or_path == BASE

    @property
    def teacher_place(self) -> Place:
        """Where the teachers' weights lie."""
        return Place(
            self.teacher_device, self.teacher_tensor_parallel, self.teacher_expert_parallel, self.teacher_load_in_8bit,
            self.teacher_load_in_4bit,
        )  # fmt: skip

    def _check_teacher_place(self) -> None:
        """Raise ConfigError where the settings of ``teacher_place`` contradict each other."""
        if not _DEVICE.fullmatch(self.teacher_device):
            raise ConfigError(f"teacher_device {self.teacher_device!r}; use 'cuda:1', 'cpu' or 'auto', or leave it out")
        check_at_least(self, {"teacher_tensor_parallel": 1})
        over, own = self.teacher_tensor_parallel, self.teacher_place
        named = {name: value for name, value in vars(own).items() if value != vars(Place())[name]}
        settings = " and ".join(f"teacher_{name} {value}" for name, value in named.items())
        if self.teacher_expert_parallel and over == 1:
            raise ConfigError(
                "teacher_expert_parallel without teacher_tensor_parallel, which says over how many processes; give both"
            )
        if self.teacher_is_base and own.stays:
            raise ConfigError(
                f"the teacher {BASE!r} is on the student's own weights, which {settings} would move; leave it out"
            )
        if over > 1 and named.keys() - {"tensor_parallel", "expert_parallel"}:
            raise ConfigError(f"{settings}: weights in shards over processes go with no other place or bits; drop one")
        if self.teacher_load_in_8bit and self.teacher_load_in_4bit:
            raise ConfigError("teacher_load_in_8bit and teacher_load_in_4bit; give one of them")
        if (self.teacher_load_in_8bit or self.teacher_load_in_4bit) and self.teacher_dtype == "float64":
            raise ConfigError(f"{settings}: quantised weights have no products in teacher_dtype float64; use bfloat16")

    def _take_bf16(self) -> None:
        """``bf16`` is another way to say ``dtype``; a flag for one may meet a recipe's word on the other."""
        if self.bf16 and self.dtype not in ("auto", "bfloat16"):
            raise ConfigError(
                f"bf16 means dtype bfloat16, and dtype is {self.dtype}; give --dtype bfloat16 alone, or drop bf16"
            )
        if self.bf16:
            object.__setattr__(self, "dtype", "bfloat16")
            object.__setattr__(self, "bf16", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._take_bf16()
        self._check_teacher_place()
        if self.teacher_is_base and self.teacher_dtype not in ("auto", self.dtype):
            raise ConfigError(
                f"the teacher {BASE!r} is on the student's own weights, so it cannot be in teacher_dtype {self.teacher_dtype} "
                f"beside dtype {self.dtype}; leave teacher_dtype out"
            )
        for name in ("teacher_files", "teacher_writer"):
            if getattr(self, name) and not is_address(self.teacher_model_name_or_path):
                raise ConfigError(
                    f"{name} {getattr(self, name)} is for a teacher behind a server, and the teacher is "
                    f"{self.teacher_model_name_or_path}; give its address as the teacher, or leave {name} out"
                )
        if self.teacher_writer and not is_address(self.teacher_writer):
            raise ConfigError(f"teacher_writer {self.teacher_writer} is no address; give one such as http://host:8001")
        if bool(self.teachers) != bool(self.teacher_field):
            missing = "teacher_field, the field of a row that names one" if self.teachers else "teachers, by name"
            raise ConfigError(
                f"teachers {self.teachers} with teacher_field {self.teacher_field!r}: give {missing}, or neither"
            )
        if not all(name and source for name, source in self.teachers.items()):
            raise ConfigError(f"teachers needs a name and a model in each entry, got {self.teachers}")
        if self.lora_r < 1 or self.lora_alpha < 1:
            raise ConfigError(f"lora_r and lora_alpha must be at least 1, got {self.lora_r} and {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be from 0 to below 1, got {self.lora_dropout}")
        if self.load_in_4bit and not self.use_peft:
            raise ConfigError(
                "load_in_4bit without use_peft: weights in 4 bits cannot be trained; set use_peft, or drop it"
            )
        if self.load_in_4bit and self.dtype == "float64":
            raise ConfigError("load_in_4bit has no products in float64; set dtype to bfloat16 or float32")


# --- dtypes -------------------------------------------------------------------------------------------------------

Chosen = TypeVar("Chosen", bound="ModelConfig")


def with_dtypes(config: Chosen, device: torch.device) -> Chosen:
    """The same settings with ``auto`` replaced by what it means on this device. A teacher on the student's base has its dtype."""
    dtype = chosen_dtype(config.dtype, device)
    there = teacher_device(config.teacher_place, device)
    teacher = dtype if config.teacher_is_base else chosen_teacher_dtype(config.teacher_dtype, dtype, there)
    chosen: dict[str, Any] = {"dtype": dtype, "teacher_dtype": teacher}
    return replace(config, **chosen)


AUTO = "auto"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype by the name that settings have for it, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def good_at_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are made by the device itself. On a CPU they are mostly slower than those in float32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "xpu"


def quantised(config: PretrainedConfig) -> str:
    """How the weights of a model are quantised, such as ``bitsandbytes``, whoever did it; "" if they are not."""
    found = getattr(config, "quantization_config", None) or {}
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return "" if not found else str(getattr(method, "value", method))


def chosen_dtype(name: str, device: torch.device) -> str:
    """``name``, or what ``auto`` means on this device: bfloat16 where it is good at it, else float32."""
    return name if name != AUTO else "bfloat16" if good_at_bfloat16(device) else "float32"


def teacher_device(place: Place, device: torch.device) -> torch.device:
    """The device that a teacher is on, the first of several, beside a student on ``device``."""
    import torch

    return device if place.device in ("", AUTO) else torch.device(place.device)


def chosen_teacher_dtype(name: str, student: str, device: torch.device) -> str:
    """``name``, or what ``auto`` means: float64 beside a student in float64, whose run is to be exact, else by device."""
    return "float64" if name == AUTO and student == "float64" else chosen_dtype(name, device)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the weights of ``model`` into ``dtype`` as ``from_pretrained`` would. Buffers stay, such as the angles of positions."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype_in(dtype, model, name, parameter))


def dtype_in(compute: torch.dtype | None, model: nn.Module, name: str, parameter: nn.Parameter) -> torch.dtype:
    """What a model that computes in ``compute`` keeps a weight in: those in 4 bits stay, and some that never leave float32."""
    wide = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    kept = any(re.search(rf"(^|\.){re.escape(module)}($|\.)", name) for module in wide)
    return parameter.dtype if compute is None or kept or not parameter.is_floating_point() else compute
