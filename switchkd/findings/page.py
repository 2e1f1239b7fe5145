"""``progress.html`` in a study's folder: how far it is, what came of it so far and what more seeds would be worth, while it runs.

The page loads nothing and runs no script. It is written whole, by one thread, which also moves the bar; what it shows is from the
folder alone, so that the runs know nothing of it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from switchkd.base.lock import worker
from switchkd.base.settings import to_dict
from switchkd.base.storage import write_file
from switchkd.base.terminal import complain, decimals, duration, number, percent, visible
from switchkd.evaluation.statistics import Estimate, Values, estimate
from switchkd.evaluation.statistics import score as mean_score
from switchkd.findings.outlook import MISSING, NOTE, main_score, outlook_sheet, outlook_words, outlooks_of, values_of
from switchkd.reports.curves import WIDTH, metric_panels, themed_svg
from switchkd.reports.page import rendered
from switchkd.reports.panels import draw, panel_notes
from switchkd.reports.steps import SCORE, Steps
from switchkd.reports.tables import Sheet, direction, score_words
from switchkd.studies.plan import LOGS, PAGE, Cell, Plan, Size
from switchkd.studies.progress import RUNNING, UNFINISHED, Folder, Progress, Standing
from switchkd.studies.study import DONE, FAILED

REFRESH_SECONDS = 20
LOOK_SECONDS = 2.0  # between two looks at the folder
# A page takes a second or two of one core, which the runs are then without: at most a fiftieth of the time goes into pages.
PAGE_SHARE = 0.02

Moved = Callable[[float, str], None]  # told the share of the work that is done, and in words how long is left


@contextmanager
def followed(
    plan: Plan, size: Size, grid: Sequence[Cell], output_dir: Path, jobs: int, moved: Moved, every: float = LOOK_SECONDS
) -> Iterator[None]:
    """While the block runs a study, tell ``moved`` how far it is and write its page; once more when the block ends.

    Nothing is written before this process has the folder's lock. What fails here is told of once, tried again, and ends no study.
    """
    ended, told, folder = threading.Event(), threading.Event(), Folder(grid, size, output_dir)

    def follow() -> None:
        begun, due = False, 0.0
        while True:
            last = ended.wait(every if begun else min(every, 0.1))
            try:
                begun = begun or _ours(output_dir)
                if begun:
                    progress = folder.look(jobs)
                    done = sum(each.state == DONE for each in progress.cells)
                    moved(progress.share, f"{progress.left_words()}, {done}/{len(grid)} runs")
                    if last or time.monotonic() >= due:
                        start = time.thread_time()
                        write_file(output_dir / PAGE, study_page(plan, progress, output_dir))
                        took = time.thread_time() - start
                        due = time.monotonic() + max(REFRESH_SECONDS, took / PAGE_SHARE)
            except Exception as error:  # of whatever kind: looking is never a reason to stop
                due = time.monotonic() + REFRESH_SECONDS
                if not told.is_set():
                    told.set()
                    complain(
                        f"warning: {output_dir / PAGE} could not be written ({type(error).__name__}: {error}); it is tried again, "
                        "and the study goes on"
                    )
            if last:
                return

    thread = threading.Thread(target=follow, name="study's page", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _ours(folder: Path) -> bool:
    """Whether this process has the lock of a folder."""
    owner = worker(folder)
    return bool(owner) and (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())


def study_page(plan: Plan, progress: Progress, output_dir: Path) -> str:
    """The page as HTML. It refreshes itself if a process works on the study."""
    cells = progress.cells
    groups = dict.fromkeys(each.cell.group for each in cells)
    failed = [each for each in cells if each.state == FAILED]
    return rendered(
        "study.html.j2",
        title=plan.title,
        share=percent(progress.share),
        width=100 * progress.share,
        left=progress.left_words(),
        counts=progress.counts(),
        now=time.strftime("%Y-%m-%d %H:%M:%S"),
        refresh=REFRESH_SECONDS if progress.live else 0,
        groups=[_group(plan, name, [each for each in cells if each.cell.group == name]) for name in groups],
        note=NOTE,
        failed=[
            {"name": each.cell.name, "log": f"{LOGS}/{each.cell.name}.log", "text": visible(each.log)}
            for each in failed
        ],
        path=str(output_dir),
    )


def _group(plan: Plan, name: str, cells: Sequence[Standing]) -> dict[str, Any]:
    """What the page shows of the runs that are compared with one another."""
    score = _main_score(plan, cells)
    seeds = list(dict.fromkeys(each.cell.config.seed for each in cells))
    found = outlooks_of(plan, cells)
    return {
        "name": name,
        "seeds": seeds,
        "grid": {method: _row(method, seeds, cells, score) for method in plan.methods},
        "scores": _score_sheet(plan, score, cells) if any(each.evaluation for each in cells) else None,
        "curve": _curve(plan, score, cells),
        "outlook": outlook_sheet(found) if found else None,
        "outlook_words": [outlook_words(each) for each in found],
    }


def _row(method: str, seeds: Sequence[int], cells: Sequence[Standing], score: str) -> list[dict[str, Any]]:
    own = {each.cell.config.seed: each for each in cells if each.cell.method == method}
    return [{"state": own[seed].state, "details": _details(own[seed], score)} for seed in seeds]


def _details(each: Standing, score: str) -> list[str]:
    """What stands under a run's state: how far it is, and its last score."""
    lines = []
    if each.state == DONE:
        lines.append(duration(each.seconds + (each.loading or 0.0)))
    elif each.share >= UNFINISHED:
        lines.append("being scored" if each.state == RUNNING else "not all is scored")
    elif each.tokens or each.state == RUNNING:
        lines.append(percent(each.share) if each.tokens else "loading")
    if each.evaluation and score in each.evaluation.scores:
        lines.append(f"{score} {number(mean_score(score, each.evaluation.scores[score]))}")
    elif each.scored and (last := each.scored[-1].get(SCORE + score)) is not None:
        lines.append(f"{score} {number(last)}")
    return lines


def _score_sheet(plan: Plan, score: str, cells: Sequence[Standing]) -> Sheet:
    """The score of each method over the seeds that are scored so far."""
    rows = []
    for method in plan.methods:
        values = values_of(method, score, cells)
        if not values:
            rows.append([method, MISSING, MISSING, MISSING, "0"])
            continue
        found = _estimated(score, tuple(values.items()))
        places = decimals((found.mean, found.low, found.high))
        written = partial(number, decimals=places)
        low, high = (MISSING if end is None else written(end) for end in (found.low, found.high))
        spread = number(found.std) if found.std is not None and len(values) > 1 else MISSING
        rows.append([method, written(found.mean), spread, f"{low} to {high}", str(len(values))])
    header = ["method", "mean", "spread over seeds", "95 % interval", "seeds"]
    return Sheet(f"{score}: {score_words(score)}; {direction(score)}.", header, rows)


@lru_cache(maxsize=256)
def _estimated(score: str, runs: tuple[tuple[int, Values], ...]) -> Estimate:
    """Resampling takes longer than all else on the page, and little changes from one page to the next."""
    return estimate(score, dict(runs))


def _curve(plan: Plan, score: str, cells: Sequence[Standing]) -> dict[str, str] | None:
    """The score along the way by the tokens that were learned from, a line a method: of its runs that are done, else of those that
    have begun."""
    runs: dict[str, Sequence[Steps]] = {}
    for method in plan.methods:
        own = [each for each in cells if each.cell.method == method and each.scored]
        own = [each for each in own if each.state == DONE] or own
        runs[method] = [Steps(each.scored, to_dict(each.cell.config), each.cell.name) for each in own]
    drawn = {method: own for method, own in runs.items() if own}
    if not any(SCORE + score in line for own in drawn.values() for run in own for line in run):
        return None
    panels = metric_panels(drawn, [SCORE + score], "num_tokens")
    words = f"{score} along the way, by the tokens learned from. {panel_notes(panels)}".strip()
    return {"svg": themed_svg(draw(panels, "", width=WIDTH), words), "words": words}


def _main_score(plan: Plan, cells: Sequence[Standing]) -> str:
    """The plan's main score; before the first evaluation, the one that its task probably has."""
    likely = (Steps(each.scored, to_dict(each.cell.config)).primary for each in cells)
    return main_score(plan, cells) or next(filter(None, likely), "")
