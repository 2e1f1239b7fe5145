"""A study's plan: methods, pairs, budgets and seeds in a YAML file, and the grid of runs that they make."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from switchkd.base.errors import ConfigError, nearest
from switchkd.base.plain import first, read_yaml, shown, yaml_value
from switchkd.base.settings import from_dict, named_file, to_dict
from switchkd.data.settings import DataConfig
from switchkd.decoding.rollouts import BANDS
from switchkd.evaluation.settings import EvalConfig
from switchkd.evaluation.tasks import TASKS
from switchkd.reports.steps import SCORE
from switchkd.training.settings import TrainConfig, load_recipe

CELLS, LOGS = "cells", "logs"  # names in the folder of a study
REPORT, JUDGEMENTS, SCORES, PAGE = "study.md", "claims.json", "scores.json.xz", "progress.html"
_FILE_NAME = re.compile(r"\w[\w.-]*")
# Which of the held-out rows, by the length of their references: all, or the shortest or longest third.
ALL, SHORT, LONG = "all", "short", "long"
FALLS, RISES = "falls", "rises"
# Metrics of the training steps that a claim may be about; beside them `eval/` and a score, those along the way.
STEP_METRICS = (
    "seconds",
    "loss",
    *(f"switch/{name}" for name in ("teacher_share", "switched_share", "first_switch", "threshold", "divergence_mean")),
    *(f"switch/divergence_{band}" for band in BANDS),
)
# What a study gives each of its runs, and no plan.
_OWN = ("seed", "output_dir", "eval_on_start", "resume", "resume_from", "allow_change")


@dataclass(frozen=True)
class Size:
    """One size of a plan: what all runs share, and what they are crossed with."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of every run, over its recipe's."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    pairs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings by the name of a pair; without any, those above name the only one."""
    budgets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings by the name of a budget, such as max_train_tokens or max_train_seconds."""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further evaluations of each student, by task: settings of `switchkd evaluate`."""


@dataclass(frozen=True)
class Claim:
    """A hypothesis that a plan writes down before its first run, and what is measured to judge it.

    It is judged for every method of ``than`` and every group by itself. A group is a pair and budget of the plan, named as in
    the names of its runs (PAIR-BUDGET, PAIR or BUDGET; a plan with one of each has one group without a name).
    """

    says: str = ""
    """The hypothesis, in one plain sentence."""
    source: str = ""
    """Where it is from: paper and table."""
    better: str = ""
    """The method that the claim is about."""
    than: tuple[str, ...] = ()
    """The methods that it is better than; none where `against` or `against_rows` compares the method with itself."""
    score: str = ""
    """A score of the evaluation (default: the task's main one), or a metric of the training steps: seconds, loss, switch/…, eval/….
    "Better" is lower for seconds, losses and divergences, and higher for all else."""
    task: str = ""
    """A further evaluation of the plan; default each run's own."""
    expected: float = 0.0
    """The gain that the source claims, as a share of the mean of `than` (0.05: 5 %); 0 if it names none."""
    groups: tuple[str, ...] = ()
    """The groups it is about; default all."""
    against: str = ""
    """A group: the claim is then that the gain is larger in `groups` than in this one."""
    rows: str = ALL
    """all, short or long: the third of the held-out rows with the shortest or longest references."""
    against_rows: str = ""
    """all, short or long: the claim is then that the gain is larger on `rows` than on these."""
    at: float = 1.0
    """The share of a run's tokens at which it is measured, by the scores along the way (needs eval_steps); 1: at the end."""
    change: str = ""
    """falls or rises: the claim is then that the score of `better` does so from `since` to `at`, measured along the way."""
    since: float = 0.1
    """The share of a run's tokens from which a `change` is measured."""

    def __post_init__(self) -> None:
        problems = {
            "it needs `says`, the hypothesis in one sentence": not self.says.strip(),
            f"there is no metric {self.score!r} of the training steps{nearest(self.score, STEP_METRICS)}; scores along the way are "
            "eval/ and the score's name": self.of_steps
            and self.score not in STEP_METRICS
            and not self.score.startswith(SCORE),
            "it needs `better`, the method that it is about": not self.better,
            f"expected is a share of at least 0, such as 0.05 for 5 %, not {self.expected}": not 0
            <= self.expected
            < math.inf,
            f"at is a share of the run above 0 and up to 1, not {self.at}": not 0 < self.at <= 1,
            f"since is a share of the run between 0 and `at`, not {self.since}": bool(self.change)
            and not 0 < self.since < self.at,
            f"change is {FALLS!r} or {RISES!r}, not {self.change!r}": self.change not in ("", FALLS, RISES),
            "a `change` is of one method alone: leave `than`, `against` and `against_rows` out": bool(
                self.change and (self.than or self.against or self.against_rows)
            ),
            "it needs `than`, the methods that `better` is compared with": not (
                self.than or self.change or self.against or self.against_rows
            ),
            f"{self.better!r} cannot be better than itself": self.better in self.than,
            "a method stands twice in `than`": len(set(self.than)) < len(self.than),
            "a group stands twice in `groups`": len(set(self.groups)) < len(self.groups),
            f"{self.against!r} is compared with itself: it stands in `groups` and `against`": bool(self.against)
            and self.against in self.groups,
            "give `against` or `against_rows`, not both": bool(self.against and self.against_rows),
            f"rows are {ALL}, {SHORT} or {LONG}, not {self.rows!r}": self.rows not in (ALL, SHORT, LONG),
            f"against_rows are {ALL}, {SHORT} or {LONG} and not `rows`, not {self.against_rows!r}": self.against_rows
            not in ("", *({ALL, SHORT, LONG} - {self.rows})),
            "rows by length are known at the end alone, of scores of the evaluation: leave `rows` out": self.along
            and (self.rows, self.against_rows) != (ALL, ""),
            "along the way there is each run's own evaluation alone: leave `task` out": self.along and bool(self.task),
        }
        if problem := first(problems):
            raise ConfigError(problem)

    @property
    def along(self) -> bool:
        """Whether it is measured while a run trains, and not by the evaluation at its end."""
        return self.at < 1 or bool(self.change) or self.of_steps

    @property
    def of_steps(self) -> bool:
        """Whether the score is a metric of the training steps."""
        return self.score in STEP_METRICS or "/" in self.score


@dataclass(frozen=True)
class Plan:
    """What to run and what to compare."""

    title: str = ""
    methods: dict[str, Any] = field(default_factory=dict)
    """By name: a recipe, or its settings under `recipe` with others over it."""
    sizes: dict[str, Size] = field(default_factory=dict)
    baseline: str = ""
    """The method that the others are compared with; default the first."""
    scores: tuple[str, ...] = ()
    """Scores to compare; default the task's own."""
    curves: tuple[str, ...] = ()
    """Metrics of the training steps to draw, a panel each."""
    claims: dict[str, Claim] = field(default_factory=dict)
    """Hypotheses by name, which the study judges."""

    def sized(self, name: str) -> Size:
        """The size of that name; raises ConfigError if the plan has none."""
        if name not in self.sizes:
            raise ConfigError(f"the plan has no size {name!r}{nearest(name, self.sizes)}")
        return self.sizes[name]


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str
    method: str
    group: str
    """The pair and budget that it is compared in; "" if there is one of each."""
    config: TrainConfig


@dataclass(frozen=True)
class Scoring(DataConfig, EvalConfig):
    """Settings that a plan may give a further evaluation of each student."""

    eval_samples: int = -1


def load_plan(path: str) -> Plan:
    """Read a plan: a YAML file, or the name of one that ships with the package.

    Raises:
        ConfigError: no such file or plan, no YAML, an unknown name in it, or nothing to run.
    """
    file = named_file(path, "plans")
    values = read_yaml(file)
    if not all(isinstance(values.get(name), dict) for name in ("methods", "sizes")):
        raise ConfigError(f"{file} is no plan: it needs `title`, `methods` by name and `sizes` by name")
    sizes = {name: from_dict(Size, size or {}, f"{file}: size {name}") for name, size in values["sizes"].items()}
    claims = values.get("claims") or {}
    if not isinstance(claims, dict):
        raise ConfigError(f"{file}: claims are given by name, not as {shown(claims)}")
    claims = {name: from_dict(Claim, claim, f"{file}: claim {name}") for name, claim in claims.items()}
    plan = from_dict(Plan, values | {"sizes": sizes, "claims": claims}, str(file))
    if not plan.methods or not all(size.seeds for size in sizes.values()):
        raise ConfigError(f"{file} has nothing to run: it needs a method, and each size a seed")
    for name in [
        *plan.methods,
        *(name for size in sizes.values() for name in [*size.pairs, *size.budgets, *size.evaluations]),
    ]:
        if not _FILE_NAME.fullmatch(name):
            raise ConfigError(f"{file}: {shown(name)} names files of the study; use letters, digits and . _ - inside")
    if plan.baseline and plan.baseline not in plan.methods:
        raise ConfigError(f"{file}: baseline {plan.baseline!r} is no method{nearest(plan.baseline, plan.methods)}")
    for name, claim in plan.claims.items():
        _check_claim(plan, claim, f"{file}: claim {name}")
    return plan


def _check_claim(plan: Plan, claim: Claim, source: str) -> None:
    """Raise ConfigError for a method that the plan has not, or a group or task that no size of it has."""
    tasks = dict.fromkeys(task for size in plan.sizes.values() for task in size.evaluations)
    groups = dict.fromkeys(group for size in plan.sizes.values() for group, *_ in groups_of(size))
    for what, given, known in (
        ("method", [claim.better, *claim.than], plan.methods),
        ("task among the plan's evaluations", [claim.task] * bool(claim.task), tasks),
        ("group", [*claim.groups, *([claim.against] * bool(claim.against))], groups),
    ):
        if unknown := [name for name in given if name not in known]:
            raise ConfigError(
                f"{source}: there is no {what} {unknown[0]!r}{nearest(unknown[0], known) if known else ''}"
            )


def with_settings(size: Size, given: Sequence[str]) -> Size:
    """The size with settings of every run over its own, each given as NAME=VALUE.

    Raises:
        ConfigError: one is not of that form. An unknown name is found where the runs are made.
    """
    settings = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ConfigError(f"a setting is given as NAME=VALUE, such as max_train_tokens=20000, not {text!r}")
        settings[name] = yaml_value(value, f"--set {name}")
    return dataclasses.replace(size, settings=size.settings | settings)


def cells(plan: Plan, size: Size, output_dir: Path) -> list[Cell]:
    """Every run of a study, seed by seed, so that a study that is stopped has seen every method as often as it can.

    Raises:
        ConfigError: a setting or task is unknown or out of range, or two results would have one name.
    """
    made = []
    for seed, (group, pair, budget), method in itertools.product(size.seeds, groups_of(size), plan.methods):
        name = joined(group, method, f"seed{seed}")
        # The pair's own scores are the same in each of its runs.
        leads = seed == size.seeds[0] and method == next(iter(plan.methods))
        own = {"seed": seed, "output_dir": str(output_dir / name), "eval_on_start": leads}
        shared = size.settings | size.pairs.get(pair, {}) | size.budgets.get(budget, {})
        made.append(Cell(name, method, group, _config(method, plan.methods[method], shared, own)))
    groups = dict.fromkeys(cell.group for cell in made)
    _check_names(cell.name for cell in made)
    _check_names(joined(kind, group, task) for group in groups for kind, task in results_of_group(size))
    for task in size.evaluations:
        if task not in TASKS:
            raise ConfigError(f"evaluations of the plan: there is no task {task!r}{nearest(task, TASKS)}")
        for cell in made:
            scoring(cell.config, task, size)
    return made


def is_about(claim: Claim, size: Size) -> bool:
    """Whether a size has the groups and the evaluation that a claim names."""
    groups = {group for group, *_ in groups_of(size)}
    named = {*claim.groups, *([claim.against] * bool(claim.against))}
    return named <= groups and (not claim.task or claim.task in size.evaluations)


def groups_of(size: Size) -> list[tuple[str, str, str]]:
    """The groups of runs that are compared with one another: name, pair and budget of each; "" where there is one."""
    pairs, budgets = size.pairs or [""], size.budgets or [""]
    return [
        (joined(pair if len(pairs) > 1 else "", budget if len(budgets) > 1 else ""), pair, budget)
        for pair, budget in itertools.product(pairs, budgets)
    ]


def results_of_group(size: Size) -> list[tuple[str, str]]:
    """What a study writes of each pair and budget: the kind of a file or folder, and the task that it is of."""
    return [("curves", ""), ("progress", ""), *(("compare", task) for task in ("", *size.evaluations))]


def scoring(config: TrainConfig, task: str, size: Size) -> Scoring:
    """How a run's student is evaluated on a further task: as the run says, with the plan's settings over that."""
    names = [f.name for f in dataclasses.fields(Scoring) if f.name != "eval_samples"]
    given = size.evaluations[task]
    source = f"evaluation {task} of the plan"
    if "task" in given:
        raise ConfigError(f"{source}: its name is its task; leave `task` out")
    return from_dict(Scoring, {name: getattr(config, name) for name in names} | {"task": task} | given, source)


def joined(*parts: str) -> str:
    """A name of those parts that are not empty."""
    return "-".join(part for part in parts if part)


def _check_names(names: Iterable[str]) -> None:
    """Raise ConfigError for a name that two runs, or two results, of a study would have."""
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"the plan gives {count} runs or results the name {name!r}, which is made of the names of pair, budget and method, "
            "the task and the seed; rename one of them, or give each seed once"
        )


def _config(method: str, given: Any, shared: dict[str, Any], own: dict[str, Any]) -> TrainConfig:
    """A method's settings: its recipe's, those that all runs share, those that the plan gives the method, and the run's own."""
    settings = {"recipe": given} if isinstance(given, str) else given
    if not isinstance(settings, dict) or not isinstance(settings.get("recipe"), str):
        raise ConfigError(f"method {method!r} of the plan names no recipe: {shown(given)}")
    recipe: TrainConfig = load_recipe(settings["recipe"])
    changes = shared | {name: value for name, value in settings.items() if name != "recipe"}
    if taken := [name for name in _OWN if name in changes]:
        raise ConfigError(
            f"method {method!r} of the plan: {taken[0]} is the study's to set; leave it out"
            + (", and list the training seeds as `seeds` of the size" if taken[0] == "seed" else "")
        )
    # A rule in the plan replaces the recipe's whole rule.
    return from_dict(TrainConfig, to_dict(recipe) | changes | own, f"method {method!r} of the plan")
