"""The commands that help to choose: `methods` and `tasks` list what there is, `new` writes a recipe by questions, and `completion`
has a shell complete what is typed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import tyro
import yaml
from rich.table import Table

from switchkd.base.errors import ConfigError
from switchkd.base.plain import yaml_value
from switchkd.base.settings import Settings, from_dict, shipped, to_dict
from switchkd.base.storage import written
from switchkd.base.terminal import console
from switchkd.training.settings import TrainConfig, load_recipe


@dataclass(frozen=True)
class MethodsConfig(Settings):
    """List the recipes that ship with the package."""


@dataclass(frozen=True)
class TasksConfig(Settings):
    """List the tasks that completions can be scored on."""


@dataclass(frozen=True)
class NewConfig(Settings):
    """Write a recipe by five questions; a file that is there is never written over."""

    output_file: tyro.conf.Positional[str] = "recipe.yaml"
    """The recipe."""


@dataclass(frozen=True)
class CompletionConfig(Settings):
    """Print the script that completes commands and flags in a shell."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]] = "bash"
    """The shell: source <(switchkd completion bash), or put what is printed where the shell looks for such scripts."""


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


def completion(config: CompletionConfig) -> None:
    from switchkd.cli.flags import print_completion

    print_completion(config.shell)


# --- a recipe by five questions -------------------------------------------------------------------------------------

Answer = TypeVar("Answer")
QUESTIONS = {
    "teacher_model_name_or_path": ("1. The teacher: a name on the hub, a folder, or a server's address", "demo"),
    "student_model_name_or_path": ("2. The student: a name on the hub, or a folder", "demo"),
    "train_file": ("3. The file to train on, with a prompt in each row", "gsm8k-sample:train"),
}
WHICH = (
    "4. The method. Does each row have an answer, too? (y/n)",
    "   Can the teacher run while the student is trained? (y/n)",
    "   Is there time to write new text in training, which takes several times as long? (y/n)",
)
WHY = {
    "kd": "the student learns from the answers of the data, token by token from the teacher; no text is written, which is quickest",
    "seqkd": "the teacher writes an answer to each prompt once, and the student learns from these",
    "on_policy": "the student writes every text, and learns from what the teacher thinks of each token; no answers are needed",
}


def which(answers: bool, runs: bool, time: bool) -> str:
    """The method to begin with: whether the data have answers, the teacher can run in training, and there is time to write text."""
    if not runs:
        return "seqkd"
    if time:
        return "on_policy"
    return "kd" if answers else "seqkd"


def new(config: NewConfig) -> None:
    file = Path(config.output_file)
    if file.exists() or file.is_symlink():
        raise ConfigError(f"{file} is there already and is not written over; name another: switchkd new other.yaml")
    settings = {name: _asked(question, default, str) for name, (question, default) in QUESTIONS.items()}
    method = which(*[_asked(question, "y", _yes) for question in WHICH])
    settings["output_dir"] = _asked("5. The folder of the run", f"runs/{method}", str)
    text = recipe_text(method, settings, str(file))
    with written(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    console.print(f"{method}: {WHY[method]}.\n{file} is written. Next: switchkd check {file}", soft_wrap=True)


def recipe_text(method: str, settings: dict[str, str], file: str) -> str:
    """A method's recipe with these settings above it, which must be whole and right."""
    # What the user is asked has the place of what the recipe says of it, and a model's own chat template that of a paper's.
    recipe = shipped("recipes")[method].read_text(encoding="utf-8")
    recipe = re.sub(rf"^({'|'.join(settings)}|template):.*\n", "", recipe, flags=re.MULTILINE)
    lines = [
        "# Written by `switchkd new`. Look at what it would do, then train:",
        f"#   switchkd check {file}",
        f"#   switchkd train {file}",
        "# `switchkd train --help-all` lists all settings.",
        "",
        yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        f"# {method}: {WHY[method]}.",
        recipe,
    ]
    from_dict(TrainConfig, yaml_value(text := "\n".join(lines), file), file)
    return text


def _yes(answer: str) -> bool:
    if (first := answer[:1].lower()) not in ("y", "n"):
        raise ValueError("y or n")
    return first == "y"


def _asked(question: str, default: str, read: Callable[[str], Answer]) -> Answer:
    """The answer to a question, which an empty line leaves as it is; asked again until it can be read."""
    while True:
        console.print(f"{question} [{default}]: ", end="", soft_wrap=True)
        line = sys.stdin.readline()
        if not line:
            raise ConfigError("the input ended before the last question; nothing is written")
        try:
            return read(line.strip() or default)
        except ValueError as error:
            console.print(f"   {error}, please", soft_wrap=True)
