"""Paths as people type them: ``~`` is the home directory, in a flag, a recipe or a call."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

_ENDINGS = ("_file", "_dir", "_path")  # of the names of settings that are paths
_NAMES = ("runs", "plan", "resume_from", "teachers")


def expanded(path: str | os.PathLike[str]) -> str:
    """``path`` with a ``~`` or ``~user`` at its beginning replaced; as it is where there is no such user."""
    return os.path.expanduser(os.fspath(path))


def expand_settings(config: Any) -> None:
    """Replace ``~`` in the paths among a frozen dataclass's settings, which are known by their names."""
    for field in dataclasses.fields(config):
        if field.name.endswith(_ENDINGS) or field.name in _NAMES:
            object.__setattr__(config, field.name, _expanded(getattr(config, field.name)))


def _expanded(value: Any) -> Any:
    if isinstance(value, str):
        return expanded(value)
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    return {name: _expanded(one) for name, one in value.items()} if isinstance(value, dict) else value
