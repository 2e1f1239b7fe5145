"""A study: a grid of training runs (methods x pairs x budgets x seeds) that can be stopped anywhere, then one comparison.

A plan is a YAML file. Its folder of results holds

    cells/NAME.yaml   each run's settings, a recipe of its own
    NAME/             each run, NAME = [PAIR-][BUDGET-]METHOD-seedN
    logs/NAME.log     what it printed
    compare*.md …     the comparison, its figures, and study.md, which says what each method cost

Runs are processes of their own, so that one that fails takes no other with it.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from switchkd import signals
from switchkd.checkpoint import checkpoints
from switchkd.config import TrainConfig, from_dict, load_recipe, named_file, to_dict
from switchkd.errors import ConfigError, DataError, nearest
from switchkd.lock import locked
from switchkd.plain import read_yaml, shown, yaml_value
from switchkd.results import read_results
from switchkd.storage import write_file

_FILE_NAME = re.compile(r"\w[\w.-]*")
# How a run stands: whole, ended by an error, ended by a signal, not begun since a signal came.
DONE, FAILED, STOPPED, WAITING = "done", "FAILED", "stopped", "waiting"
# Exit codes of a process that a signal ended: noted by itself, or by the system.
STOPPED_CODES = {code for number in signals.STOPPING for code in (128 + number, -number)}
POLL_SECONDS = 0.2


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
    plan = from_dict(Plan, values | {"sizes": sizes}, str(file))
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
    return plan


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
    """Every run of a study, seed by seed, so that a study that is stopped has seen every method as often as it can."""
    pairs, budgets = size.pairs or {"": {}}, size.budgets or {"": {}}
    made = []
    for seed, pair, budget, method in itertools.product(size.seeds, pairs, budgets, plan.methods):
        group = joined(pair if len(pairs) > 1 else "", budget if len(budgets) > 1 else "")
        name = joined(group, method, f"seed{seed}")
        # The pair's own scores are the same in each of its runs.
        first = seed == size.seeds[0] and method == next(iter(plan.methods))
        own = {"seed": seed, "output_dir": str(output_dir / name), "eval_on_start": first}
        shared = size.settings | pairs[pair] | budgets[budget]
        made.append(Cell(name, method, group, _config(method, plan.methods[method], shared, own)))
    return made


def joined(*parts: str) -> str:
    """A name of those parts that are not empty."""
    return "-".join(part for part in parts if part)


def _config(method: str, given: Any, shared: dict[str, Any], own: dict[str, Any]) -> TrainConfig:
    """A method's settings: its recipe's, those that all runs share, those that the plan gives the method, and the run's own."""
    settings = {"recipe": given} if isinstance(given, str) else given
    if not isinstance(settings, dict) or not isinstance(settings.get("recipe"), str):
        raise ConfigError(f"method {method!r} of the plan names no recipe: {shown(given)}")
    recipe: TrainConfig = load_recipe(settings["recipe"])
    changes = shared | {name: value for name, value in settings.items() if name != "recipe"} | own
    # A rule in the plan replaces the recipe's whole rule.
    return from_dict(TrainConfig, to_dict(recipe) | changes, f"method {method!r} of the plan")


# --- running ------------------------------------------------------------------------------------------------------


def run_cells(
    grid: Sequence[Cell], size: Size, output_dir: Path, jobs: int, done: Callable[[str, float], None]
) -> dict[str, str]:
    """Run what is not done yet, ``jobs`` at a time, and tell ``done`` of each; returns how those stand that are not done.

    A run that was stopped goes on from its newest checkpoint, or starts anew if it has none.

    Raises:
        Stopped: a signal came. It was passed on to what was running, and all of that has ended.
        InUseError: another process works in ``output_dir``.
    """
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    with signals.deferred(), locked(output_dir):
        left = _run_cells(grid, size, output_dir, jobs, done)
        if number := signals.received():
            stop = signals.Stopped(number)
            stop.add_note("what was running has ended with a checkpoint; the same command goes on")
            raise stop
    return left


def _run_cells(
    grid: Sequence[Cell], size: Size, output_dir: Path, jobs: int, done: Callable[[str, float], None]
) -> dict[str, str]:
    for folder in ("cells", "logs"):
        (output_dir / folder).mkdir(parents=True, exist_ok=True)
    for cell in grid:
        _write_cell(output_dir, cell)
    left, running = {}, _Running(jobs)
    with ThreadPoolExecutor(jobs) as pool:
        work = {pool.submit(_run_cell, cell, size, output_dir, running): cell for cell in grid}
        try:
            for finished in as_completed(work):
                name, (state, seconds) = work[finished].name, finished.result()
                if state != DONE:
                    left[name] = state
                if state != WAITING:
                    done(f"{name}: {state}{f', see {output_dir}/logs/{name}.log' if state == FAILED else ''}", seconds)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            running.end()
            raise
    return left


class _Running:
    """The processes of a study that run now, each with its share of the cores."""

    def __init__(self, jobs: int):
        cores = max(1, (os.cpu_count() or 1) // jobs)
        self.environment = dict(os.environ) if jobs == 1 else {**os.environ, "OMP_NUM_THREADS": str(cores)}
        self.processes: set[subprocess.Popen] = set()

    def run(self, arguments: Sequence[str], log: IO[str]) -> int:
        """Run a command of switchkd and return its exit code; a signal that comes meanwhile is passed on to it."""
        log.write(f"$ switchkd {' '.join(arguments)}\n")
        log.flush()
        command = [sys.executable, "-m", "switchkd.cli", *arguments]
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment) as process:
            self.processes.add(process)
            told = False
            while process.poll() is None:
                if signals.received() and not told:
                    process.send_signal(signals.received())
                    told = True
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
            self.processes.discard(process)
        return process.returncode

    def end(self) -> None:
        """End all that runs where it stands: what has been told to stop before takes this for the second time."""
        for process in list(self.processes):
            process.terminate()


def _write_cell(output_dir: Path, cell: Cell) -> None:
    """Write a run's settings, or check that they are those that it has been started with."""
    file, new = output_dir / "cells" / f"{cell.name}.yaml", to_dict(cell.config)
    if not file.is_file():
        write_file(file, yaml.safe_dump(new, sort_keys=False))
        return
    old = to_dict(load_recipe(str(file)))  # settings that there were not yet have their defaults
    if changed := "; ".join(f"{key}: {old[key]!r} -> {new[key]!r}" for key in new if old[key] != new[key]):
        raise ConfigError(
            f"{file.parent.parent} was begun with other settings of {cell.name} ({changed}); go back to them, or name another "
            "--output-dir"
        )


def _run_cell(cell: Cell, size: Size, output_dir: Path, running: _Running) -> tuple[str, float]:
    """Train and evaluate one run in processes of its own: how it stands now, and the seconds that took."""
    start = time.monotonic()
    if signals.received():
        return WAITING, 0.0
    run, settings = output_dir / cell.name, str(output_dir / "cells" / f"{cell.name}.yaml")
    commands = []
    if not _trained(run):
        resume = bool(checkpoints(run))
        if run.exists() and not resume:
            with locked(run):  # nobody writes there
                shutil.rmtree(run)
        commands.append(["train", settings, *(["--resume"] if resume else [])])
    for task, own in size.evaluations.items():
        if not (run / f"evaluation-{task}.json").is_file():
            only = {} if cell.config.eval_on_start else {"only": "student"}
            commands.append(["evaluate", str(run), *flags({"task": task} | own | only)])
    state = DONE
    with (output_dir / "logs" / f"{cell.name}.log").open("a", encoding="utf-8") as log:
        for command in commands:
            if state == DONE and (code := running.run(command, log)):
                state = STOPPED if code in STOPPED_CODES else FAILED
    return state, time.monotonic() - start


def _trained(run: Path) -> bool:
    try:
        return "student after" in read_results(run / "evaluation.json")
    except DataError:
        return False


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as flags of a command line."""
    found = []
    for name, value in settings.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        found += [f"--{name.replace('_', '-')}", *map(str, values)]
    return found
