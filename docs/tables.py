"""Fills the tables of the reference from the code when the site is built, so that they cannot be out of date.

A line such as ``{{ settings: training }}`` in a page is replaced by a table: see ``TABLES``. MkDocs calls ``on_page_markdown``.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from typing import Any

from switchkd.base.plain import read_yaml
from switchkd.base.settings import shipped
from switchkd.cli.commands import GROUPS
from switchkd.data.settings import DataConfig
from switchkd.decoding.settings import DecodeConfig
from switchkd.evaluation.settings import EvalConfig
from switchkd.methods.rules import NOUNS
from switchkd.models.settings import ModelConfig
from switchkd.training.settings import TrainConfig

SECTIONS = {
    "models": ModelConfig, "data": DataConfig, "writing": DecodeConfig, "evaluation": EvalConfig, "training": TrainConfig,
}  # fmt: skip
MARK = re.compile(r"^\{\{ (\w+)(?:: (\w+))? \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page with its tables."""
    return MARK.sub(lambda found: TABLES[found[1]](*filter(None, found.groups()[1:])), markdown)


def texts(cls: type) -> dict[str, str]:
    """What is said of each setting that ``cls`` itself defines: the string under it, else the comment behind it."""
    source = inspect.getsource(cls)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    [tree] = ast.parse(source).body
    found = {}
    for line, after in zip(tree.body, [*tree.body[1:], None], strict=True):  # type: ignore[attr-defined]
        if not isinstance(line, ast.AnnAssign):
            continue
        behind = comments.get(line.end_lineno or 0, "").split("  # fmt")[0]
        under = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        found[ast.unparse(line.target)] = str(ast.literal_eval(after.value)) if under else behind  # type: ignore[union-attr]
    return {name: " ".join(text.split()) for name, text in found.items() if not name.startswith("_")}


def defaults(cls: type) -> dict[str, Any]:
    made = cls()
    return {field.name: getattr(made, field.name) for field in dataclasses.fields(cls)}


def cell(text: str) -> str:
    """Words as they stand in a cell of a table."""
    return text.replace("|", "\\|")


def code(value: Any) -> str:
    return f"`{value!r}`".replace("|", "\\|") if not dataclasses.is_dataclass(value) else f"`{type(value).__name__}`"


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings(section: str) -> str:
    """The settings of one section, as flags."""
    cls = SECTIONS[section]
    known, values = texts(cls), defaults(TrainConfig)
    rows = (
        (f'<a id="{name}"></a>`--{name.replace("_", "-")}`', code(values[name]), cell(known[name])) for name in known
    )
    return table(("setting", "default", "what it does"), rows)


def rules(noun: str) -> str:
    """Policies, objectives or mixes: what each is, and its settings."""
    shared = {"objective": texts(NOUNS["objective"][0])}.get(noun, {})
    parts = []
    for name, cls in NOUNS[noun][1].items():
        own = {
            key: text
            for base in reversed(cls.__mro__)
            if dataclasses.is_dataclass(base)
            for key, text in texts(base).items()
        }
        values = {key: value for key, value in defaults(cls).items() if key not in shared}
        rows = ((f"`--{noun}.{key.replace('_', '-')}`", code(values[key]), cell(own.get(key, ""))) for key in values)
        lists = f"\n\n{table(('setting', 'default', 'what it does'), rows)}" if values else ""
        parts.append(f"### `{name}`\n\n{inspect.cleandoc(cls.__doc__ or '')}{lists}")
    return "\n\n".join(parts)


def recipes() -> str:
    """The recipes that ship, with the rules that each names."""

    def named(value: Any) -> str:
        return f"`{value['name'] if isinstance(value, dict) else value}`"

    read = {name: read_yaml(file) for name, file in sorted(shipped("recipes").items())}
    rows = (
        (f"`{name}`", cell(recipe["method"]), named(recipe["policy"]), named(recipe["objective"]), named(recipe["mix"]))
        for name, recipe in read.items()
    )
    return table(("recipe", "method and source", "policy", "objective", "mix"), rows)


def commands() -> str:
    """The commands in groups, as ``switchkd --help`` has them."""
    head, parts = ("command", "what it does"), []
    for title, group in GROUPS.items():
        rows = ((f"`switchkd {name}`", cell(command.summary)) for name, command in group.items())
        parts.append(f"### {title.capitalize()}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


TABLES: dict[str, Callable[..., str]] = {"settings": settings, "rules": rules, "recipes": recipes, "commands": commands}
