"""Which dtype ``auto`` means: what models multiply in on this device. (``masters`` keeps in float32 what is trained.)"""

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from switchkd.models.settings import ModelConfig
from switchkd.training.optimizer import _dtype_in

if TYPE_CHECKING:  # `switchkd --help` answers without loading torch
    import torch
    from transformers import PretrainedConfig


Settings = TypeVar("Settings", bound=ModelConfig)
AUTO = "auto"


def dtype_name(dtype: "torch.dtype") -> str:
    """A dtype by the name that settings have for it, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def good_at_bfloat16(device: "torch.device") -> bool:
    """Whether products in bfloat16 are made by the device itself. On a CPU they are mostly slower than those in float32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "xpu"


def quantised(config: "PretrainedConfig") -> str:
    """How the weights of a model are quantised, such as ``bitsandbytes``, whoever did it; "" if they are not."""
    found = getattr(config, "quantization_config", None) or {}
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return "" if not found else str(getattr(method, "value", method))


def chosen_dtype(name: str, device: "torch.device") -> str:
    """``name``, or what ``auto`` means on this device: bfloat16 where it is good at it, else float32."""
    return name if name != AUTO else "bfloat16" if good_at_bfloat16(device) else "float32"


def chosen_teacher_dtype(name: str, student: str, device: "torch.device") -> str:
    """``name``, or what ``auto`` means: float64 beside a student in float64, whose run is to be exact, else by device."""
    return "float64" if name == AUTO and student == "float64" else chosen_dtype(name, device)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the weights of ``model`` into ``dtype`` as ``from_pretrained`` would. Buffers stay, such as the angles of positions."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(_dtype_in(dtype, model, name, parameter))
