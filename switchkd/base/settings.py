"""TODO."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

from switchkd.base.errors import ConfigError, nearest
from switchkd.base.plain import shown
from switchkd.base.storage import expand_settings, expanded

# Kinds of settings that are objects, how they are read from plain values (with the setting's name), and how they are written.
_KINDS: dict[type, tuple[Callable[[Any, str], Any], Callable[[Any], dict[str, Any]]]] = {}
INPUT_ONLY = ("bf16",)  # another name for a setting, under which nothing is recorded


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
    """The end of the chain of checks: a command's settings are checked by every class that they come from, paths being whole."""

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, setting.name)
            if isinstance(value, str) and str(setting.type).startswith("tuple["):  # it would be taken for its letters
                raise ConfigError(
                    f"{setting.name} must be several values, got the text {shown(value)}; give ({value!r},)"
                )
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
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise ConfigError(f"{source}: unknown setting {shown(name)}{nearest(name, names)}")
    given = {name: _typed(value, hints[name], f"{source}: {name}") for name, value in values.items()}
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


def _typed(value: Any, hint: Any, source: str) -> Any:
    """``value`` as the type that the field wants; YAML reads ``1e-4`` as text and ``1`` as an int."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if hint in _KINDS:
        return _KINDS[hint][0](value, source)
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            return tuple(_typed(item, typing.get_args(option)[0], f"{source}[{i}]") for i, item in enumerate(value))
        if typing.get_origin(option) is dict and isinstance(value, dict):
            kind = typing.get_args(option)[1]
            items = (
                (_typed(k, str, f"{source}, the name"), _typed(v, kind, f"{source} {k}")) for k, v in value.items()
            )
            return dict(items)
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is Any or option is type(value) or (option is types.NoneType and value is None):
            return value
        if option is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except (ValueError, OverflowError):
                continue
    wanted = " or ".join(
        ", ".join(map(repr, typing.get_args(o))) if typing.get_origin(o) is Literal else getattr(o, "__name__", str(o))
        for o in options
    )
    raise ConfigError(f"{source} must be {wanted}, got {shown(value)}")
