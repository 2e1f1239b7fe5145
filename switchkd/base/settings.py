"""Settings as dataclasses of checked values: read from YAML, made in Python, or written down, by one set of rules."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from switchkd.base.errors import ConfigError, DataError, nearest
from switchkd.base.plain import check_type, shown
from switchkd.base.storage import expand_settings, expanded

# Kinds of settings that are objects, how they are read from plain values (with the setting's name), and how they are written.
_KINDS: dict[type, tuple[Callable[[Any, str], Any], Callable[[Any], dict[str, Any]]]] = {}
# In files of earlier versions: they moved time alone, and nothing reads them now.
RETIRED = ("repeatable", "static_step")
# Not recorded, as they are no property of a run: another name for a setting, how somebody looks on, and whether it goes on, or out,
# this time.
INPUT_ONLY = ("bf16", "quiet", "resume", "resume_from", "allow_change", "push_to_hub")


def settings_kind(kind: type, read: Callable[[Any, str], Any], write: Callable[[Any], dict[str, Any]]) -> None:
    """Let settings of this type be read and written as plain values."""
    _KINDS[kind] = read, write


def check_at_least(config: Any, least: dict[str, float]) -> None:
    """Raise ConfigError for the first setting that is below its least value, infinite or NaN."""
    for name, low in least.items():
        value = getattr(config, name)
        if not low <= value < math.inf:
            raise ConfigError(f"{name} must be at least {low}, got {value}")


class Settings:
    """The end of the chain of checks: settings are of the types that they say, whoever made them, and paths are whole."""

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        for name, value in fitted(type(self), values).items():
            object.__setattr__(self, name, value)
        expand_settings(self)


Config = TypeVar("Config")


def shipped(kind: str) -> dict[str, Path]:
    """The ``recipes`` or ``plans`` that ship with the package, by name."""
    package = Path(str(files("switchkd")))
    folders = [package / kind, package.parent / kind]  # in a wheel; in a source tree
    return {file.stem: file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.yaml"))}


def named_file(path: str, kind: str) -> Path:
    """The file ``path``, or the one that ships under that name; raises ConfigError if there is neither."""
    if (file := Path(expanded(path))).is_file():
        return file
    known = shipped(kind)
    if path in known:
        return known[path]
    one = kind.removesuffix("s")
    where = "neither a file, nor a run directory, nor" if kind == "recipes" else "neither a file nor"
    raise ConfigError(f"no {one} {path!r}: {where} one that ships with switchkd{nearest(path, known)}")


def from_dict(cls: type[Config], values: dict[str, Any], source: str) -> Config:
    """An instance of a settings dataclass from plain values; ``source`` names their file in error messages."""
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold settings as `name: value`, got {shown(values)}")
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values = {name: value for name, value in values.items() if name not in RETIRED}
    for name in values:
        if name not in names:
            raise ConfigError(f"{source}: unknown setting {shown(name)}{nearest(name, names)}")
    given = fitted(cls, values, f"{source}: ")
    try:
        return cls(**given)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a settings dataclass, such that ``from_dict`` gives it back."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in INPUT_ONLY}
    return plain_values({name: _written(value) for name, value in values.items()})


def _written(value: Any) -> Any:
    write = next((write for kind, (_, write) in _KINDS.items() if isinstance(value, kind)), None)
    return write(value) if write else dict(value) if isinstance(value, dict) else value


def plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as YAML has them, lists for tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def fitted(cls: type, values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``values`` of fields of a dataclass as the types that these want; ``prefix`` stands before a field's name in messages.

    Raises:
        ConfigError: for one that is of another type.
    """
    hints, found = _hints(cls), {}
    for name, value in values.items():
        found[name] = _converted(value, hints[name], f"{prefix}{name}")
        try:
            check_type(found[name], hints[name], f"{prefix}{name}")
        except DataError as error:
            raise ConfigError(str(error)) from error
    return found


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _checked_rule(rule: Any, source: str) -> Any:
    """A policy, objective or mix that was made in Python, its own settings being of their types too."""
    with suppress(NameError):  # a class of somebody's own may name types that are not there at run time
        fitted(type(rule), {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}, f"{source}: ")
    return rule


def _converted(value: Any, hint: Any, source: str) -> Any:
    """What a plain value means for a setting of this type: YAML has lists for tuples, reads ``1e-4`` as text and ``1`` as int."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        kind, parts = typing.get_origin(option) or option, typing.get_args(option)
        if kind in _KINDS:
            return _checked_rule(value, source) if isinstance(value, kind) else _KINDS[kind][0](value, source)
        if kind is tuple and parts[0] is str and isinstance(value, (str, os.PathLike)):
            value = (value,)  # one of several that may be; as a list it would be taken for its letters
        if kind is tuple and isinstance(value, (list, tuple)):
            return tuple(_converted(item, parts[0], f"{source}[{i}]") for i, item in enumerate(value))
        if kind is dict and isinstance(value, dict):
            return {key: _converted(item, parts[1], f"{source} {key}") for key, item in value.items()}
        if option is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        if option is type(value):
            return value
    if int in options and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)  # of numpy, say
    if float in options and isinstance(value, (numbers.Real, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)
    return value
