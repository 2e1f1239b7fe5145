"""Policies, objectives and mixes by name, and those of a module of your own."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

from switchkd.base.errors import ConfigError, nearest
from switchkd.base.plain import shown
from switchkd.base.settings import from_dict, plain_values, settings_kind
from switchkd.methods.mixes import MIXES, Mix
from switchkd.methods.objective import Objective
from switchkd.methods.objectives import OBJECTIVES
from switchkd.methods.policies import POLICIES
from switchkd.methods.policy import Policy

# The settings that name a rule, with the base class of each and the names that ship with the package.
NOUNS: dict[str, tuple[type, dict[str, type]]] = {
    "policy": (Policy, dict(POLICIES)),
    "objective": (Objective, dict(OBJECTIVES)),
    "mix": (Mix, dict(MIXES)),
}


def name_of(rule: Any) -> str:
    """The name by which recipes call a policy, objective or mix; a dotted path for one from elsewhere."""
    known = (name for _, table in NOUNS.values() for name, cls in table.items() if cls is type(rule))
    return next(known, f"{type(rule).__module__}:{type(rule).__qualname__}")


def rule(noun: str, value: Any, source: str) -> Any:
    """The policy, objective or mix that a recipe's ``name`` or ``{name: …, setting: value}`` means.

    Raises:
        ConfigError: no such name (the nearest is suggested) or dotted path, or not a dataclass of that kind.
    """
    settings = {"name": value} if isinstance(value, str) else value
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        raise ConfigError(f"{source} must be a name or `{{name: …, setting: value}}`, got {shown(value)}")
    name = settings["name"]
    cls = _imported(noun, name, source) if ":" in name else NOUNS[noun][1].get(name)
    if cls is None:
        raise ConfigError(
            f"{source}: unknown {noun} {shown(name)}{nearest(name, NOUNS[noun][1])}; your own is my_module:MyClass"
        )
    return from_dict(cls, {k: v for k, v in settings.items() if k != "name"}, f"{source} {name}")


def _imported(noun: str, path: str, source: str) -> type:
    """The class behind ``module:Class``; modules are looked for in the working directory too."""
    module_name, _, class_name = path.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{source}: cannot import {path!r}: {error}; give it as my_module:MyClass") from error
    base = NOUNS[noun][0]
    if not (isinstance(cls, type) and issubclass(cls, base) and dataclasses.is_dataclass(cls)):
        raise ConfigError(f"{source}: {path} is not a frozen dataclass that inherits from switchkd.{base.__name__}")
    return cls


def _plain(rule: Any) -> dict[str, Any]:
    return {"name": name_of(rule), **plain_values(dataclasses.asdict(rule))}


for _noun, (_kind, _) in NOUNS.items():
    settings_kind(_kind, partial(rule, _noun), _plain)
