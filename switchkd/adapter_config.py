"""What adapter_config.json may say: the options of LoRA that are known to work here. All others are refused by name.

peft gains options with every release, and some do nothing, or something else, outside peft's own model class. So an option is let
through because it is known, and not because nobody has thought of refusing it.
"""

from collections.abc import Mapping
from typing import Any

from switchkd.errors import DataError
from switchkd.plain import check_type, shown

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
