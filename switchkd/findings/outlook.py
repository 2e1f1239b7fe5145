"""What further seeds would be worth: how wide the interval of a difference is now, how wide it would be, and what that takes.

The width of a paired difference has two parts, as in ``evaluation.statistics``: that of the held-out rows, which more seeds do not
shrink, and that of the training runs, Student's t times the spread of the seeds' differences over the root of their number. What
is expected takes the spread as it is now, so that it is a rough estimate itself, above all after two or three seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from switchkd.base.terminal import decimals, number
from switchkd.evaluation.statistics import Bootstrap, Estimate, Values, bootstrap, half_width, lower_is_better, verdict
from switchkd.reports.panels import SHARE, quantity
from switchkd.reports.steps import SCORE
from switchkd.reports.tables import Sheet, markdown_table, signed
from switchkd.studies.plan import Plan
from switchkd.studies.progress import Standing, about, expected_seconds

MOST_SEEDS = 5  # further ones that are looked at
FEWEST_SEEDS = 2  # that have a spread
MISSING = "–"


@dataclass(frozen=True)
class Outlook:
    """A method's score less the baseline's over the ``seeds`` that both have, and what more of them would make of it.

    ``difference`` is None with fewer than two seeds, of which nothing can be said. ``rows`` is the half-width of its 95 % interval
    that is of the held-out rows alone, ``expected`` the whole half-width by the number of further seeds, and ``seconds`` what one
    further seed of both methods takes, one run after the other.
    """

    method: str
    baseline: str
    score: str
    seeds: tuple[int, ...]
    seconds: float | None
    difference: Estimate | None = None
    rows: float = math.nan
    expected: Mapping[int, float] | None = None

    @property
    def now(self) -> float:
        """The half-width of the interval as it is."""
        return _half_width(self.difference) if self.difference else math.nan


def outlook(
    method: str,
    baseline: str,
    score: str,
    ours: Mapping[int, Values],
    theirs: Mapping[int, Values],
    seconds: float | None = None,
) -> Outlook:
    """What further seeds would be worth for ``score`` of ``ours`` less that of ``theirs``, by training seed.

    Raises:
        DataError: they are not of the same examples.
    """
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    if len(seeds) < FEWEST_SEEDS:
        return Outlook(method, baseline, score, seeds, seconds)
    found, rows = _measured(score, *(tuple((seed, runs[seed]) for seed in seeds) for runs in (ours, theirs)))
    spread = found.std or 0.0
    counts = {more: len(seeds) + more for more in range(1, MOST_SEEDS + 1)}
    expected = {more: float(half_width(rows, spread, n)) for more, n in counts.items()}
    return Outlook(method, baseline, score, seeds, seconds, found, rows, expected)


Paired = tuple[tuple[int, Values], ...]  # the runs of some training seeds


@lru_cache(maxsize=256)  # a page is written again and again, and resampling is what takes its time
def _measured(score: str, ours: Paired, theirs: Paired) -> tuple[Estimate, float]:
    """The difference, and the half-width of its interval that is of the rows alone: the runs are not resampled."""
    whole = bootstrap(score, dict(ours)) - bootstrap(score, dict(theirs))
    apart = [bootstrap(score, a) - bootstrap(score, b) for (_, a), (_, b) in zip(ours, theirs, strict=True)]
    replicates = np.mean([each.replicates for each in apart], axis=0)
    fixed_runs = Bootstrap(whole.mean, replicates, np.empty(0), (), whole.examples, whole.total)
    return whole.estimate(), _half_width(fixed_runs.estimate())


def _half_width(estimate: Estimate) -> float:
    if estimate.low is None or estimate.high is None:
        return math.nan
    return (estimate.high - estimate.low) / 2


# --- a study's ------------------------------------------------------------------------------------------------------


def outlooks(
    score: str,
    baseline: str,
    values: Mapping[str, Mapping[int, Values]],
    seconds: Mapping[str, float | None],
) -> list[Outlook]:
    """The outlook of each method but the ``baseline`` for runs of one group: ``values`` of the score by method and training seed,
    and the ``seconds`` that a run of each takes."""
    found = []
    for method, own in values.items():
        takes = seconds.get(method), seconds.get(baseline)
        if method != baseline:
            both = None if takes[0] is None or takes[1] is None else takes[0] + takes[1]
            found.append(outlook(method, baseline, score, own, values.get(baseline, {}), both))
    return found


def outlooks_of(plan: Plan, cells: Sequence[Standing]) -> list[Outlook]:
    """The same for the runs of one group as they stand in a study's folder; none while no run is scored."""
    if not (score := main_score(plan, cells)):
        return []
    values = {method: values_of(method, score, cells) for method in plan.methods}
    seconds = {each.cell.method: expected_seconds(each.cell, cells) for each in cells}
    return outlooks(score, plan.baseline or next(iter(plan.methods)), values, seconds)


def main_score(plan: Plan, cells: Sequence[Standing]) -> str:
    """The score that a plan compares first: the one that it names, else the primary one of the task; "" before any evaluation."""
    return next(iter(plan.scores), "") or next((each.evaluation.primary for each in cells if each.evaluation), "")


def values_of(method: str, score: str, cells: Sequence[Standing]) -> dict[int, Values]:
    """A method's values of a score by training seed, of the runs that are scored."""
    return {
        each.cell.config.seed: each.evaluation.scores[score]
        for each in cells
        if each.cell.method == method and each.evaluation and score in each.evaluation.scores
    }


def outlook_sheet(found: Sequence[Outlook]) -> Sheet:
    """The outlooks of a group as a table."""
    first = found[0]
    more = [f"with {n} more" for n in range(1, MOST_SEEDS + 1)]
    header = ["method", "seeds", "difference", "± now", *more, "± of the rows alone", "one more seed of both"]
    rows = []
    for each in found:
        takes = MISSING if each.seconds is None else about(each.seconds)
        if each.difference is None or each.expected is None:
            rows.append([each.method, str(len(each.seeds)), *[MISSING] * (len(more) + 3), takes])
            continue
        widths = [each.now, *each.expected.values(), each.rows]
        places = decimals((each.now,), 2)
        shown = [number(width, 2, places) for width in widths]
        rows.append([each.method, str(len(each.seeds)), signed(each.difference.mean, places), *shown, takes])
    return Sheet(f"{first.score}, each method less {first.baseline}{_unit(first.score, ' (in {})')}", header, rows)


def outlook_words(each: Outlook) -> str:
    """What further seeds of a method would be worth, in a sentence or two."""
    against = f"{each.method} against {each.baseline}"
    if each.difference is None or each.expected is None or math.isnan(each.now):
        count = len(each.seeds)
        return f"{against}: with {count} seed{'s' * (count != 1)} in common nothing can be said of what more would be worth."
    gap, unit = each.difference.mean, _unit(each.score, " {}")
    places = decimals((each.now,), 2)

    def width(value: float) -> str:
        return f"±{number(value, 2, places)}"

    now = f"{against}: {signed(gap, places)} {width(each.now)}{unit} after {len(each.seeds)} seeds"
    if all(value >= 0.95 * each.now for value in each.expected.values()):
        return f"{now}. More seeds would hardly narrow that: {width(each.rows)} is of the held-out rows alone."
    told = verdict(each.difference, lower_is_better(each.score)) != "not distinguishable"
    enough = next((more for more, value in each.expected.items() if value < abs(gap)), None)
    more = 2 if told else enough or MOST_SEEDS
    takes = "" if each.seconds is None else f" ({about(more * each.seconds)})"
    narrowed = f"{more} more seed{'s' * (more != 1)}{takes} would narrow ±{number(each.now, 2, places)} to about "
    narrowed += width(each.expected[more]) + unit
    if told:
        return f"{now}, told apart from no difference already. {narrowed}."
    if enough:
        return f"{now}, not told apart. {narrowed}, enough to tell the difference if it stays as it is."
    rows = f"; {width(each.rows)} is of the held-out rows alone" if each.rows >= abs(gap) else ""
    return f"{now}, not told apart. {narrowed}, not enough to tell so small a difference{rows}."


def _unit(score: str, form: str) -> str:
    unit = quantity(SCORE + score)[1]
    return form.format("points" if unit == SHARE else unit) if unit else ""


NOTE = (
    "Half-widths of the 95 % interval of the paired difference: now as in the comparison, and as expected with more seeds if the "
    "seeds' differences go on to spread as they do. The part of the held-out rows stays, whatever the number of seeds. Of two or "
    "three seeds the spread is hardly known, and neither is what more would be worth."
)


def outlook_markdown(found: Sequence[Outlook]) -> str:
    """What the next seeds would be worth to the methods of one group, as a section in Markdown; "" where there is nothing to
    compare."""
    if not found:
        return ""
    title, header, rows = outlook_sheet(found)
    words = "\n".join(f"- {outlook_words(each)}" for each in found)
    return "\n\n".join(
        ["## What the next seeds would be worth", words, f"{title}:", markdown_table(header, rows), NOTE]
    )
