"""The commands that list what there is to choose from: `methods` the recipes, `tasks` what completions can be scored on."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from switchkd.base.settings import Settings, shipped, to_dict
from switchkd.base.terminal import console
from switchkd.training.settings import TrainConfig, load_recipe


@dataclass(frozen=True)
class MethodsConfig(Settings):
    """List the recipes that ship with the package."""


@dataclass(frozen=True)
class TasksConfig(Settings):
    """List the tasks that completions can be scored on."""


def methods(config: MethodsConfig) -> None:
    from switchkd.reports.steps import settings_text

    table = Table("recipe", "who writes", "what is trained", "on which text", "method and source", title_justify="left")
    for name, file in shipped("recipes").items():
        recipe: TrainConfig = load_recipe(str(file))
        rules = to_dict(recipe)
        policy = settings_text(rules, "policy") if recipe.mix.generates else "–"
        table.add_row(name, policy, settings_text(rules, "objective"), settings_text(rules, "mix"), recipe.method)
    console.print(table)


def tasks(config: TasksConfig) -> None:
    from switchkd.evaluation.tasks import TASKS

    table = Table("task", "what is scored", "main score", "data by default", "source")
    for task in TASKS.values():
        table.add_row(f"{task.name} ({task.version})", task.description, task.primary, task.hub or "–", task.source)
    console.print(table)
