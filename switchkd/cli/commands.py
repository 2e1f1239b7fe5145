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
        "check": Command("train.check", "check pair, data, memory and records; --estimate for GPUs"),
        "demo": Command("train.demo", "distil a real student on this machine, no hub needed"),
        "generate": Command("generate.generate", "complete prompts by a student alone, or under a policy"),
        "chat": Command("generate.chat", "talk to a student, or to any model, in the terminal"),
        "play": Command("generate.play", "watch a text being written, with the divergence under it"),
    },
    "data and models": {
        "new": Command("choose.new", "write a recipe for your own pair and data by five questions"),
        "methods": Command("choose.methods", "list the recipes: who writes, what is trained, on which text"),
        "tasks": Command("choose.tasks", "list the tasks: what is scored, and on which data"),
        "prune": Command("train.prune", "make a student by dropping a model's least influential layers"),
        "push": Command("train.push", "put a run's student on the Hugging Face Hub, private by default"),
        "make-pair": Command("train.make_pair", "make the small pair `small` and its data, for studies on a CPU"),
    },
    "score, compare and study": {
        "evaluate": Command("evaluate.evaluate", "score teacher and student on held-out examples"),
        "lm-eval": Command("evaluate.lm_eval", "score a student on lm-eval's benchmarks"),
        "compare": Command("compare.compare", "compare runs, and say which differences are beyond chance"),
        "report": Command("compare.report", "write runs as one HTML page: who wrote what, scores, curves"),
        "plot": Command("compare.plot", "draw the papers' figures of runs: lambda, length, cost, …"),
        "study": Command("compare.study", "run a grid of methods and compare them; it can be stopped"),
        "completion": Command("choose.completion", "print a shell's script that completes commands and flags"),
    },
}  # fmt: skip
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}

# Commands before whose flags a recipe or a run directory may stand.
TAKE_RECIPE = ("train", "check", "generate", "chat", "play", "evaluate")
# Commands with more settings than `--help` shows at once.
MANY = ("train", "check", "generate", "play", "evaluate")
# What these leave are files; what they print is to look on while they work.
LASTING = ("train", "demo", "study", "prune", "make-pair", "push")
# What needs no model, and is to answer at once.
QUICK = ("new", "completion")
# Settings that a command has of its own, and does not take from a recipe or run.
NOT_FROM_RECIPE = {"evaluate": ("policy", "eval_samples")}
# What a command means by a run, whose training had another policy, or by a model: a student, which writes alone.
OF_A_RUN: dict[str, dict[str, str]] = {"generate": {"policy": "student_only"}, "chat": {}}


def overview() -> str:
    """What `switchkd --help` prints."""
    lines = ["usage: switchkd COMMAND [RECIPE | RUN] [--setting value …]", ""]
    for title, group in GROUPS.items():
        lines += [f"{title}:", *(f"  {name:<12}{command.summary}" for name, command in group.items()), ""]
    lines += ["switchkd COMMAND --help lists a command's main settings, --help-all all of them;",
              "switchkd --version prints the version; source <(switchkd completion bash)",
              "has the shell complete commands and flags."]  # fmt: skip
    return "\n".join(lines)
