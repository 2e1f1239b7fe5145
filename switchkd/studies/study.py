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
from pathlib import Path
from typing import Any

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
    _write_settings(grid, size, output_dir)
    states, running = dict.fromkeys((cell.name for cell in grid), IN_USE), _Running(jobs)
    for wait in (False, True):  # what another process works on, such as one that a killed study left behind, comes last
        cells = [cell for cell in grid if states[cell.name] == IN_USE]
        with ThreadPoolExecutor(jobs) as pool:
            work = {pool.submit(_run_cell, cell, size, output_dir, running, wait): cell.name for cell in cells}
            try:
                for finished in as_completed(work):
                    name, (state, note, seconds) = work[finished], finished.result()
                    states[name] = state
                    if state != WAITING and (state != IN_USE or wait):
                        done(f"{name}: {state}{note}", seconds)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                running.end()
                raise
    return {name: state for name, state in states.items() if state != DONE}


class _Running:
    """The processes of a study that run now, each with its share of the cores."""

    def __init__(self, jobs: int):
        share = max(1, (os.cpu_count() or 1) // jobs)
        self.environment = environment(**({} if jobs == 1 else {"OMP_NUM_THREADS": str(share)}))
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


def _run_cell(cell: Cell, size: Size, output_dir: Path, running: _Running, wait: bool) -> tuple[str, str, float]:
    """Train and evaluate one run in processes of its own: how it stands now, a note on that, and the seconds that took.

    ``wait`` until another process that works in its folder is done.
    """
    start, note = time.monotonic(), ""
    run, log = output_dir / cell.name, output_dir / LOGS / f"{cell.name}.log"
    try:
        _until_free(run, wait)
        state = WAITING if signals.received() else _run_commands(_commands(cell, size, output_dir), log, running)
        if state == FAILED:
            _until_free(run, False)  # another process may have been quicker
            note = f", see {log}"
    except signals.Stopped:
        state = WAITING
    except InUseError as error:
        state, note = IN_USE, f": {error}"
    except DiskError as error:
        state, note = FAILED, f": {error}"
    return state, note, time.monotonic() - start


def _until_free(run: Path, wait: bool) -> None:
    if run.exists():
        with locked(run, wait):
            pass


def _commands(cell: Cell, size: Size, output_dir: Path) -> list[list[str]]:
    """What is left to do of a run."""
    run, settings = output_dir / cell.name, str(output_dir / CELLS / f"{cell.name}.yaml")
    commands = []
    if not trained(run):
        commands.append(["train", settings, *(["--resume"] if checkpoints(run) else [])])
    for task, own in size.evaluations.items():
        if not (run / f"evaluation-{task}.json").is_file():
            only = {} if cell.config.eval_on_start else {"only": "student"}
            commands.append(["evaluate", str(run), *flags({"task": task} | own | only)])
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
