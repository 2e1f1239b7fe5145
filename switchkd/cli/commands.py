"""The table of commands. It holds names alone: the file of a command is imported when the command is asked for."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable


class Command(typing.NamedTuple):
    """Where a command is, as ``file.function`` of this folder, and what `switchkd --help` says of it."""

    place: str
    summary: str

    @property
    def function(self) -> Callable[[typing.Any], None]:
        """What does the work, given the settings."""
        file, _, name = self.place.partition(".")
        return getattr(importlib.import_module(f"switchkd.cli.{file}"), name)

    @property
    def settings(self) -> type:
        """The dataclass of the command's settings."""
        return typing.get_type_hints(self.function)["config"]


# In the order in which `switchkd --help` lists them.
GROUPS = {
    "train and look": {
        "train": Command("train.train", "distil a student as a recipe says"),
        "check": Command("train.check", "check pair, data, memory, settings, a run's records; --estimate for GPUs; train nothing"),
        "demo": Command("train.demo", "distil a real student on this machine, no hub needed"),
        "generate": Command("generate.generate", "complete prompts under a policy and show who wrote what"),
        "play": Command("generate.play", "watch one completion being written, with the divergence under it"),
    },
    "data and models": {
        "methods": Command("lists.methods", "list the recipes: who writes, what is trained, on which text, source"),
        "tasks": Command("lists.tasks", "list the tasks: what is scored, the main score, data by default, source"),
        "prune": Command("make.prune", "make a student by dropping a model's least influential layers"),
        "push": Command("make.push", "put a run's student on the Hugging Face Hub, private unless told otherwise"),
        "make-pair": Command("make.make_pair", "make the small pair `small` and its data, for studies on a CPU"),
    },
    "score, compare and study": {
        "evaluate": Command("evaluate.evaluate", "score teacher and student on held-out examples"),
        "lm-eval": Command("evaluate.lm_eval", "score a student on lm-eval's benchmarks"),
        "compare": Command("compare.compare", "compare evaluated runs, and say which differences are beyond chance"),
        "report": Command("compare.report", "write runs as one HTML page: who wrote what and why, scores, curves"),
        "plot": Command("compare.plot", "draw the papers' figures of runs: lambda, divergence, length, cost, …"),
        "study": Command("compare.study", "run a grid of methods and compare them; can be stopped and goes on"),
    },
}  # fmt: skip
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}

# Commands before whose flags a recipe or a run directory may stand.
TAKE_RECIPE = ("train", "check", "generate", "play", "evaluate")
# What these leave are files; what they print is to look on while they work.
LASTING = ("train", "demo", "study", "prune", "make-pair", "push")
# Settings that a command has of its own, and does not take from a recipe or run.
NOT_FROM_RECIPE = {"evaluate": ("policy", "eval_samples")}
# What a command means by a run, whose training had another policy: its student, which writes alone.
OF_A_RUN = {"generate": {"policy": "student_only"}}


def overview() -> str:
    """What `switchkd --help` prints."""
    lines = ["usage: switchkd COMMAND [RECIPE | RUN] [--setting value …]", ""]
    for title, group in GROUPS.items():
        lines += [f"{title}:", *(f"  {name:<10}{command.summary}" for name, command in group.items()), ""]
    lines += ["switchkd COMMAND --help lists a command's settings; switchkd --version prints the version.",
              "For tab completion in bash: source <(switchkd --tyro-print-completion bash); fish and zsh have it too."]  # fmt: skip
    return "\n".join(lines)
