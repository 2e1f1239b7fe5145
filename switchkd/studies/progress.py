"""How far a study is, and how long it will take, from what lies in its folder: whoever runs it, and wherever.

Nothing here takes a lock or writes a file, so that looking stands in nobody's way. Of what grows, only what is new is read; an
evaluation that stands is read once.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from switchkd.base.errors import DataError
from switchkd.base.lock import LOCK, worker
from switchkd.base.plain import Lines, json_object
from switchkd.evaluation.results import EVALUATION, Evaluation, read_results
from switchkd.reports.steps import SCORE
from switchkd.studies.plan import LOGS, Cell, Size, joined
from switchkd.studies.study import DONE, FAILED, STOPPED, WAITING
from switchkd.training.records import CONFIG, METRICS

RUNNING = "running"
AFTER = "student after"
# A run's process says nothing and holds no lock while it loads the library, nor does one that was killed: so long it is believed.
STARTING_SECONDS = 120.0
UNFINISHED = 0.99  # the most that counts as done of a run that is being scored
_LOG_BYTES, _LOG_LINES = 8192, 15
_COMMAND = "$ switchkd "  # how a log's line begins that names what is run next


@dataclass(frozen=True)
class Standing:
    """How one run stands. ``share`` is from 0 to 1 of its budget, ``seconds`` what its training and scoring took so far, and
    ``loading`` what went before, None where nobody looked on.

    ``scored`` are the lines of metrics.jsonl that hold scores, ``evaluation`` is that of the trained student, and ``log`` the end
    of what a run printed that failed.
    """

    cell: Cell
    state: str
    share: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    scored: Lines = field(default_factory=list)
    evaluation: Evaluation | None = None
    log: str = ""
    loading: float | None = None


@dataclass(frozen=True)
class Progress:
    """How a study stands: its runs, whether a process works on it, and the seconds left, None while nothing is known of that."""

    cells: Sequence[Standing]
    live: bool
    left: float | None

    @property
    def share(self) -> float:
        """How much of all runs' budgets is spent."""
        return sum(each.share for each in self.cells) / len(self.cells)

    def counts(self) -> str:
        """How many runs are in which state, in words."""
        states = [each.state for each in self.cells]
        others = [f"{states.count(s)} {s}" for s in (RUNNING, FAILED, STOPPED, WAITING) if s in states]
        return ", ".join([f"{states.count(DONE)} of {len(states)} runs done", *others])

    def left_words(self) -> str:
        """How long it will take, in words."""
        if all(each.state == DONE for each in self.cells):
            return "all runs are done"
        if self.left is None:
            return "how long it will take is not known yet"
        if self.live:
            return f"{about(self.left)} left" if self.left else "nothing is left that this command still tries"
        return f"{about(self.left)} left once the same command goes on"


class Folder:
    """A study's folder, looked at again and again."""

    def __init__(self, grid: Sequence[Cell], size: Size, output_dir: Path, clock: Callable[[], float] = time.time):
        self.grid, self.output_dir, self._clock = grid, output_dir, clock
        self._evaluations = [f"{joined('evaluation', task)}.json" for task in size.evaluations]
        self._metrics = {cell.name: _Metrics(output_dir / cell.name / METRICS) for cell in grid}
        self._read: dict[str, tuple[tuple[int, int], Evaluation | None]] = {}
        self._begun: dict[str, float] = {}

    def look(self, jobs: int = 1) -> Progress:
        """How the study stands now, with ``jobs`` runs at a time or as many as are running."""
        live = bool(worker(self.output_dir))
        since = _changed(self.output_dir / LOCK) if live else 0.0
        cells = [self._standing(cell, live, since) for cell in self.grid]
        return Progress(cells, live, seconds_left(cells, jobs, live))

    def _standing(self, cell: Cell, live: bool, since: float) -> Standing:
        run, log = self.output_dir / cell.name, self.output_dir / LOGS / f"{cell.name}.log"
        metrics = self._metrics[cell.name]
        metrics.look()
        evaluation = self._evaluation(run)
        if evaluation and all((run / name).is_file() for name in self._evaluations):
            last = max(_changed(run / name) for name in (EVALUATION, *self._evaluations))
            scoring = max(0.0, last - _changed(run / METRICS))
            seconds, loading = metrics.seconds + scoring, self._loading(run)
            return Standing(cell, DONE, 1.0, metrics.tokens, seconds, metrics.scored, evaluation, loading=loading)
        share = UNFINISHED if evaluation else min(metrics.share, UNFINISHED)
        state, said = self._state(run, log, live, since)
        if state == RUNNING and not metrics.share:
            self._begun.setdefault(run.name, _changed(log))
        own = metrics.tokens, metrics.seconds, metrics.scored, evaluation, said
        return Standing(cell, state, share, *own, loading=self._loading(run))

    def _loading(self, run: Path) -> float | None:
        """Seconds from a run's beginning to its settings, which are written once the models are there; None if it was not seen
        to begin."""
        begun, there = self._begun.get(run.name), _changed(run / CONFIG)
        return there - begun if begun and there >= begun else None

    def _state(self, run: Path, log: Path, live: bool, since: float) -> tuple[str, str]:
        """How a run stands that is not done, and the end of its log if it failed."""
        if worker(run):
            return RUNNING, ""
        changed = _changed(log)
        if not changed or (live and changed < since):  # what ended before this command began is tried again
            return WAITING, ""
        said = _last_words(log)
        how = _ended(said)
        if not how:  # it is loading, or was killed
            how = STOPPED if not live else RUNNING if self._clock() - changed < STARTING_SECONDS else FAILED
        return how, "\n".join(said[-_LOG_LINES:]) if how == FAILED else ""

    def _evaluation(self, run: Path) -> Evaluation | None:
        """The evaluation of the trained student, None where there is none that can be read."""
        with suppress(OSError):
            file = (run / EVALUATION).stat()
            stamp = file.st_mtime_ns, file.st_size
            if self._read.get(run.name, ((0, 0), None))[0] != stamp:
                try:
                    found = read_results(run / EVALUATION).get(AFTER)
                    # The texts of all runs would be a hundred megabytes.
                    self._read[run.name] = stamp, found and replace(found, completions=(), questions=())
                except DataError:  # it is being written, or the run will say so itself
                    return None
            return self._read[run.name][1]
        return None


class _Metrics:
    """What a metrics.jsonl that grows has said so far. A line that is cut short is read when it is whole, a broken one never."""

    def __init__(self, file: Path):
        self._file = file
        self._forget()

    def _forget(self) -> None:
        self.tokens, self.share, self.seconds = 0, 0.0, 0.0
        self.scored: Lines = []
        self._end, self._last = 0, b""

    def look(self) -> None:
        """Read what is new; all of it where a run that goes on has cut its file back."""
        with suppress(FileNotFoundError), self._file.open("rb") as file:
            file.seek(self._end - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._forget()
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._end, self._last = self._end + len(line), line
                with suppress(DataError, KeyError, TypeError):
                    self._take(json_object(line))

    def _take(self, line: dict[str, float]) -> None:
        tokens, share = int(line["num_tokens"]), float(line.get("progress", 0.0))
        self.seconds += line["seconds"] + line.get("seconds/evaluate", 0.0)
        self.tokens, self.share = tokens, share
        scores = {name: value for name, value in line.items() if name.startswith(SCORE)}
        if scores:
            self.scored.append({"step": line["step"], "num_tokens": tokens} | scores)


def _changed(file: Path) -> float:
    """When a file was last written to, in seconds; 0 where there is none."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _last_words(log: Path) -> list[str]:
    """The last lines that a run's newest command printed."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    begun = max((place for place, line in enumerate(lines) if line.startswith(_COMMAND)), default=-1)
    return lines[begun + 1 :]


def _ended(said: Sequence[str]) -> str:
    """How a command ended, by what it said; "" if it did not say."""
    if any(line.startswith(("error: ", "Traceback (most recent call last)")) for line in said):
        return FAILED
    return STOPPED if any(line.startswith(("stopped by ", "interrupted")) for line in said) else ""


# --- how long it will take ------------------------------------------------------------------------------------------


def seconds_left(cells: Sequence[Standing], jobs: int, live: bool) -> float | None:
    """Seconds until all is done with so many runs at a time, None while nothing is known.

    Runs are begun in the order of the grid, each as soon as there is room. What failed or was stopped is not tried again by a
    command that is still working (``live``).
    """
    running = [each for each in cells if each.state == RUNNING]
    others = [each for each in cells if each.state == WAITING or (not live and each.state in (FAILED, STOPPED))]
    free_at = [0.0] * max(jobs, len(running))
    for each in [*running, *others]:
        whole = expected_seconds(each.cell, cells)
        if whole is None:
            return None
        # What is left of its budget, or all that its like took beyond what it has: that holds the scoring at its end.
        spent = each.seconds + (each.loading or 0.0)
        heapq.heapreplace(free_at, free_at[0] + max(whole * (1 - each.share), whole - spent))
    return max(free_at)


def expected_seconds(cell: Cell, cells: Sequence[Standing]) -> float | None:
    """Seconds that a run takes: the median of those that are done of its method and group, else by the pace of what has begun of
    these, of its method, or of all, and what loading takes in the median of all; None where nothing has begun."""
    pace = _working_seconds(cell, cells)
    loading = [each.loading for each in cells if each.loading is not None]
    return None if pace is None else pace + (median(loading) if loading else 0.0)


def _working_seconds(cell: Cell, cells: Sequence[Standing]) -> float | None:
    method = [each for each in cells if each.cell.method == cell.method]
    alike = [each for each in method if each.cell.group == cell.group]
    if done := [each.seconds for each in alike if each.state == DONE]:
        return median(done)
    budget = cell.config.max_train_tokens
    for known in (alike, method, cells):
        spent = sum(each.tokens if budget else each.share for each in known)
        if spent:
            return sum(each.seconds for each in known) / spent * (budget or 1)
    return None


def about(seconds: float) -> str:
    """A time that is only roughly known, as people say it."""
    minutes = seconds / 60
    if minutes < 1:
        return "less than a minute"
    if minutes < 100:
        step = 5 if minutes >= 20 else 1
        return f"about {step * round(minutes / step)} min"
    if minutes < 36 * 60:
        hours, rest = divmod(10 * round(minutes / 10), 60)
        return f"about {hours} h{f' {rest} min' if rest else ''}"
    return f"about {minutes / (24 * 60):.1f} days"
