"""A study: the runs of a plan, in a grid that can be stopped anywhere, each a process of its own.

Its folder of results holds

    cells/NAME.yaml   each run's settings, a recipe of its own; evaluations.yaml, those of the further evaluations
    NAME/             each run, NAME = [PAIR-][BUDGET-]METHOD-seedN
    logs/NAME.log     what it printed
    compare*.md …     the comparison, its figures, and study.md, which says what each method cost

One that fails takes no other with it. Nothing in the folder is ever taken away.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml

from switchkd.base import signals
from switchkd.base.errors import ConfigError, DataError, DiskError, InUseError
from switchkd.base.limits import command, environment
from switchkd.base.lock import locked
from switchkd.base.plain import read_yaml
from switchkd.base.settings import to_dict
from switchkd.base.storage import write_file, written
from switchkd.data.settings import DATE, today
from switchkd.evaluation.results import EVALUATION, read_results
from switchkd.studies.plan import CELLS, LOGS, Cell, Size
from switchkd.training.checkpoint import checkpoints
from switchkd.training.settings import load_recipe

# How a run stands: whole, ended by an error, ended by a signal, not begun since a signal came, another process's.
DONE, FAILED, STOPPED, WAITING, IN_USE = "done", "FAILED", "stopped", "waiting", "in use"
# Exit codes of a process that a signal ended: noted by itself, or by the system.
STOPPED_CODES = {code for number in signals.STOPPING for code in (128 + number, -number)}
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Run:
    """A run of a study as plain data, which any process that sees the study's folder can work on."""

    name: str
    folder: Path
    """Of the study."""
    evaluations: dict[str, list[str]]
    """The further evaluations by task, each as flags of `switchkd evaluate`."""

    @property
    def log(self) -> Path:
        return self.folder / LOGS / f"{self.name}.log"


class Outcome(NamedTuple):
    """How a run stands now, a note on that, and the seconds that were worked on it."""

    state: str
    note: str = ""
    seconds: float = 0.0


class Executor(Protocol):
    """What decides where the runs of a study are run, and how many at a time."""

    def __call__(self, runs: Sequence[Run], wait: bool, tell: Callable[[str, Outcome], None]) -> None:
        """Work on all of ``runs`` and ``tell`` of each by its name; returns when nothing runs any more.

        A run that another process works on is ``IN_USE`` and left, or waited for with ``wait``. Once a signal has come
        (``signals.received``), what runs is told to stop, and what has not been begun is ``WAITING``.
        """


def run_cells(
    grid: Sequence[Cell],
    size: Size,
    output_dir: Path,
    jobs: int,
    done: Callable[[str, float], None],
    executor: Executor | None = None,
) -> dict[str, str]:
    """Run what is not done yet and tell ``done`` of each; returns how those stand that are not done.

    A run that was stopped goes on from its newest checkpoint, or starts anew if it has none. Without an ``executor``, runs are
    processes of this machine, ``jobs`` at a time.

    Raises:
        Stopped: a signal came. It was passed on to what was running, and all of that has ended.
        InUseError: another process works in ``output_dir``.
    """
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    with signals.deferred(), locked(output_dir):
        _write_settings(grid, size, output_dir)
        left = _run_cells(grid, size, output_dir, executor or partial(_run_here, jobs), done)
        if number := signals.received():
            stop = signals.Stopped(number)
            stop.add_note("what was running has ended with a checkpoint; the same command goes on")
            raise stop
    return left


def _run_cells(
    grid: Sequence[Cell], size: Size, output_dir: Path, execute: Executor, done: Callable[[str, float], None]
) -> dict[str, str]:
    states = dict.fromkeys((cell.name for cell in grid), IN_USE)

    def tell(name: str, outcome: Outcome) -> None:
        states[name] = outcome.state
        if outcome.state != WAITING and (outcome.state != IN_USE or wait):
            done(f"{name}: {outcome.state}{outcome.note}", outcome.seconds)

    for wait in (False, True):  # what another process works on, such as one that a killed study left behind, comes last
        if runs := [_run_of(cell, size, output_dir) for cell in grid if states[cell.name] == IN_USE]:
            execute(runs, wait, tell)
    return {name: state for name, state in states.items() if state != DONE}


def _run_of(cell: Cell, size: Size, output_dir: Path) -> Run:
    only = {} if cell.config.eval_on_start else {"only": "student"}
    evaluations = {task: flags({"task": task} | own | only) for task, own in size.evaluations.items()}
    return Run(cell.name, output_dir, evaluations)


def _run_here(jobs: int, runs: Sequence[Run], wait: bool, tell: Callable[[str, Outcome], None]) -> None:
    """The executor that has processes of this machine, ``jobs`` at a time."""
    share = max(1, (os.cpu_count() or 1) // jobs)
    running = _Running({} if jobs == 1 else {"OMP_NUM_THREADS": str(share)})
    with ThreadPoolExecutor(jobs) as pool:
        work = {pool.submit(_work_on, run, running, wait): run.name for run in runs}
        try:
            for finished in as_completed(work):
                tell(work[finished], finished.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            running.end()
            raise


def work_on(run: Run, wait: bool, directory: str, variables: dict[str, str]) -> Outcome:
    """Do what is left of a run, in a process that has nothing else to do.

    Its commands are run in ``directory`` with these variables of the environment, and end when this process ends, however that
    happens.
    """
    running = _Running(variables, directory, signals.tied_to_this_process())
    with signals.deferred():
        try:
            return _work_on(run, running, wait)
        except BaseException:
            running.end()
            raise


class _Running:
    """The processes of a study that run now."""

    def __init__(
        self, variables: dict[str, str], directory: str | None = None, first: Callable[[], None] | None = None
    ):
        self.environment = environment(**variables)
        self.directory = directory
        self.first = first  # what a process does before anything else
        self.processes: set[subprocess.Popen[bytes]] = set()

    def run(self, arguments: Sequence[str], log: Path) -> int:
        """Run a command of switchkd and return its exit code; a signal that comes meanwhile is passed on to it."""
        with written(log), log.open("ab") as file:
            file.write(f"$ switchkd {shlex.join(arguments)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                command("switchkd.cli", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.directory,
                preexec_fn=self.first,
            )
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


def _write_settings(grid: Sequence[Cell], size: Size, output_dir: Path) -> None:
    """Write the settings of all runs and evaluations, or check that they are those that were begun with."""
    evaluations = output_dir / CELLS / "evaluations.yaml"
    files = {cell.name: output_dir / CELLS / f"{cell.name}.yaml" for cell in grid}
    # Settings that there were not yet have their defaults.
    begun = {name: to_dict(load_recipe(str(file))) for name, file in files.items() if file.is_file()}
    # All runs are of the day on which the study began.
    day = max((own[DATE] for own in begun.values()), default="") or today()
    new = {}
    for cell in grid:
        settings = begun.get(cell.name, {DATE: day})
        new[cell.name] = to_dict(cell.config)
        new[cell.name][DATE] = cell.config.template_date or settings[DATE]
        _refuse_changed(output_dir, cell.name, begun.get(cell.name, {}), new[cell.name])
    old = read_yaml(evaluations) if evaluations.is_file() else {}
    _refuse_changed(output_dir, "evaluations", old, old | size.evaluations)
    for folder in (CELLS, LOGS):
        with written(output_dir / folder):
            (output_dir / folder).mkdir(exist_ok=True)
    for name, settings in new.items():
        if name not in begun:
            write_file(files[name], yaml.safe_dump(settings, sort_keys=False))
    write_file(evaluations, yaml.safe_dump(old | size.evaluations, sort_keys=False))


def _refuse_changed(output_dir: Path, what: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    if changed := "; ".join(f"{key}: {old[key]!r} -> {new[key]!r}" for key in old if old[key] != new[key]):
        raise ConfigError(
            f"{output_dir} was begun with other settings of {what} ({changed}); go back to them, or name another --output-dir"
        )


def _work_on(run: Run, running: _Running, wait: bool) -> Outcome:
    """Train and evaluate one run in processes of its own; ``wait`` until another process that works in its folder is done."""
    start, note = time.monotonic(), ""
    try:
        _until_free(run, wait)
        state = WAITING if signals.received() else _run_commands(_commands(run), run.log, running)
        if state == FAILED:
            _until_free(run, False)  # another process may have been quicker
            note = f", see {run.log}"
    except signals.Stopped:
        state = WAITING
    except InUseError as error:
        state, note = IN_USE, f": {error}"
    except DiskError as error:
        state, note = FAILED, f": {error}"
    return Outcome(state, note, time.monotonic() - start)


def _until_free(run: Run, wait: bool) -> None:
    if (folder := run.folder / run.name).exists():
        with locked(folder, wait):
            pass


def _commands(run: Run) -> list[list[str]]:
    """What is left to do of a run."""
    folder, settings = run.folder / run.name, str(run.folder / CELLS / f"{run.name}.yaml")
    commands = []
    if not trained(folder):
        commands.append(["train", settings, *(["--resume"] if checkpoints(folder) else [])])
    for task, scoring in run.evaluations.items():
        if not (folder / f"evaluation-{task}.json").is_file():
            commands.append(["evaluate", str(folder), *scoring])
    return commands


def _run_commands(commands: Sequence[Sequence[str]], log: Path, running: _Running) -> str:
    for each in commands:
        if code := running.run(each, log):
            return STOPPED if code in STOPPED_CODES else FAILED
    return DONE


def trained(run: Path) -> bool:
    """Whether a run has come to its end, with scores that can be read."""
    try:
        return "student after" in read_results(run / EVALUATION)
    except DataError:
        return False


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as flags of a command line."""
    found = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            pairs = [part for item in value.items() for part in item] if isinstance(value, dict) else None
            values = pairs if pairs else value if isinstance(value, (list, tuple)) else [value]
            found += [f"--{flag}", *map(str, values)]
    return found
