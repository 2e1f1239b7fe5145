"""TODO."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from switchkd.base.errors import ConfigError
from switchkd.base.settings import Settings
from switchkd.models.precision import Settings, chosen_dtype, chosen_teacher_dtype

if TYPE_CHECKING:
    import torch


pass


def with_dtypes(config: Settings, device: torch.device) -> Settings:
    """The same settings with ``auto`` replaced by what it means on this device. A teacher on the student's base has its dtype."""
    dtype = chosen_dtype(config.dtype, device)
    teacher = dtype if config.teacher_is_base else chosen_teacher_dtype(config.teacher_dtype, dtype, device)
    chosen: dict[str, Any] = {"dtype": dtype, "teacher_dtype": teacher}
    return replace(config, **chosen)


BASE = "base"  # as a teacher: the model under the student's adapter


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Which pair, in which numbers."""

    teacher_model_name_or_path: Annotated[str, tyro.conf.arg(aliases=["--teacher"])] = "demo"
    """Hub name or local folder of the teacher; `demo` is SmolLM2-135M-Instruct, `small` what `make-pair` made."""
    student_model_name_or_path: Annotated[str, tyro.conf.arg(aliases=["--student"])] = "demo"
    """Hub name or local folder of the student; `demo` and `small` are made for the teachers of these names."""
    teachers: dict[str, str] = field(default_factory=dict)
    """More teachers, by the name that a row's teacher_field gives them; rows that name none have the teacher above."""
    teacher_field: str = ""
    """The field of a training row that names its teacher, one of `teachers`."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """What the student multiplies in; auto is bfloat16 on a GPU that is good at it, else float32. Trained weights and moments are
    kept and updated in float32 in any case (in float64 with float64), and so are divergences and decisions."""
    bf16: bool = False
    """The same as dtype bfloat16, by the name that transformers has for it; it is recorded as dtype."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Dtype of the teachers' weights and products; auto is bfloat16 on a GPU that is good at it, else float32."""
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
        if self.teacher_is_base and self.teacher_dtype not in ("auto", self.dtype):
            raise ConfigError(
                f"the teacher {BASE!r} is on the student's own weights, so it cannot be in teacher_dtype {self.teacher_dtype} "
                f"beside dtype {self.dtype}; leave teacher_dtype out"
            )
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
