"""The commands: each is a settings dataclass and a function; heavy imports wait until the function runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from switchkd.cli.compare import CompareConfig, PlotConfig, ReportConfig, compare, plot, report
from switchkd.cli.evaluate import EvaluateConfig, evaluate
from switchkd.cli.generate import GenerateConfig, PlayConfig, generate, play
from switchkd.cli.lists import MethodsConfig, TasksConfig, methods, tasks
from switchkd.cli.lm_eval import LmEvalConfig, lm_eval
from switchkd.cli.make import MakePairConfig, PruneConfig, make_pair, prune
from switchkd.cli.study import StudyConfig, study
from switchkd.cli.train import DemoConfig, check, demo, train
from switchkd.methods.policy import StudentOnly
from switchkd.training.settings import TrainConfig

if TYPE_CHECKING:
    pass


# Settings that a command has of its own, and does not take from a recipe or run.
NOT_FROM_RECIPE: dict[type, tuple[str, ...]] = {EvaluateConfig: ("policy", "eval_samples")}
# What a command means by a run, whose training had another policy: its student, which writes alone.
OF_A_RUN: dict[type, dict[str, Any]] = {GenerateConfig: {"policy": StudentOnly()}}


# What these leave are files; what they print is to look on while they work.
LASTING = ("train", "demo", "study", "prune", "make-pair")

# name: (settings, function, whether a recipe may come first, what it does)
COMMANDS: dict[str, tuple[type, Callable[[Any], None], bool, str]] = {
    "train": (TrainConfig, train, True, "distil a student as a recipe says"),
    "generate": (GenerateConfig, generate, True, "complete prompts under a policy and show who wrote what"),
    "play": (PlayConfig, play, True, "watch one completion being written, with the divergence under it"),
    "evaluate": (EvaluateConfig, evaluate, True, "score teacher and student on held-out examples"),
    "lm-eval": (LmEvalConfig, lm_eval, False, "score a student on lm-eval's benchmarks"),
    "study": (StudyConfig, study, False, "run a grid of methods and compare them; can be stopped and goes on"),
    "compare": (CompareConfig, compare, False, "compare evaluated runs, and say which differences are beyond chance"),
    "report": (ReportConfig, report, False, "write runs as one HTML page: who wrote what and why, scores, curves"),
    "plot": (PlotConfig, plot, False, "draw the papers' figures of trained runs: lambda, divergence, length, cost, …"),
    "check": (
        TrainConfig,
        check,
        True,
        "check pair, data, memory and settings, and of a run its records; train nothing",
    ),
    "methods": (MethodsConfig, methods, False, "list the recipes: who writes, what is trained, on which text, source"),
    "tasks": (TasksConfig, tasks, False, "list the tasks: what is scored, the main score, data by default, source"),
    "demo": (DemoConfig, demo, False, "distil a real student on this machine, no hub needed"),
    "prune": (PruneConfig, prune, False, "make a student by dropping a model's least influential layers"),
    "make-pair": (MakePairConfig, make_pair, False, "make the small pair `small` and its data, for studies on a CPU"),
}
