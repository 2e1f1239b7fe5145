"""The commands that list what ships with the package: `methods` its recipes, `tasks` what completions can be scored on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from switchkd.base.settings import Settings, shipped, to_dict
from switchkd.base.terminal import console
from switchkd.reports.steps import settings_text
from switchkd.training.settings import TrainConfig, load_recipe

if TYPE_CHECKING:
    from switchkd.evaluation.tasks import Task


def method_table(recipes: dict[str, TrainConfig]) -> Table:
    """The recipes by name: who writes, what is trained, on which text, and where the method is from."""
    table = Table("recipe", "who writes", "what is trained", "on which text", "method and source", title_justify="left")
    for name, config in recipes.items():
        rules = to_dict(config)
        policy = settings_text(rules, "policy") if config.mix.generates else "–"
        table.add_row(name, policy, settings_text(rules, "objective"), settings_text(rules, "mix"), config.method)
    return table


def task_table(tasks: Iterable[Task]) -> Table:
    """The tasks by name: what is scored, the main score, where the data comes from by default, and the source."""
    table = Table("task", "what is scored", "main score", "data by default", "source")
    for task in tasks:
        table.add_row(f"{task.name} ({task.version})", task.description, task.primary, task.hub or "–", task.source)
    return table


@dataclass(frozen=True)
class MethodsConfig(Settings):
    """List the recipes that ship with the package."""


@dataclass(frozen=True)
class TasksConfig(Settings):
    """List the tasks that completions can be scored on."""


def methods(config: MethodsConfig) -> None:

    console.print(method_table({name: load_recipe(str(file)) for name, file in shipped("recipes").items()}))


def tasks(config: TasksConfig) -> None:
    from switchkd.evaluation.tasks import TASKS

    console.print(task_table(TASKS.values()))
