"""The claims of a plan, judged by the runs of its study.

What a claim compares are *sides*: a method in a group, on some rows, at some point of its training. Scores of the evaluation at
the end are compared row by row, by a bootstrap over rows and runs; what is measured along the way is one number a run, and
compared by Student's t over the training seeds. In both, runs of one seed are a pair. A claim holds where the whole 95 % interval
is on its side of 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from switchkd.base.errors import DataError, nearest
from switchkd.base.lock import locked
from switchkd.base.plain import read_yaml
from switchkd.base.settings import from_dict, to_dict
from switchkd.base.storage import write_file, written
from switchkd.evaluation import statistics
from switchkd.evaluation.statistics import Array, Bootstrap, Estimate, bootstrap, half_width, t_interval
from switchkd.findings.collected import Collected, Run
from switchkd.reports.compare import check_comparable, check_teachers
from switchkd.reports.steps import ELAPSED, SCORE, differences, unlike
from switchkd.studies.plan import ALL, CELLS, FALLS, SHORT, Claim, Plan, Size, groups_of, is_about, joined

HOLDS, OPPOSITE, NO_GAIN, CANNOT_TELL = "holds", "the opposite holds", "no gain of the claimed size", "cannot tell"
NOT_RUN, NOT_JUDGED = "not run yet", "not judged"
CLAIMS = "claims.yaml"  # beside the settings of the runs
WINDOW = 0.1  # of a run's tokens: a metric of the steps is its mean over the steps of so long a stretch
MOST_SEEDS = 1000  # that are worth naming
# Metrics of the steps of which less is better; those of scores are known by `evaluation.statistics`.
_LOWER_STEPS = ("seconds", "loss", "switch/divergence")


class Side(NamedTuple):
    """What is measured of one method."""

    method: str
    group: str
    rows: str
    at: float


@dataclass(frozen=True)
class Judgement:
    """What a claim comes to for one pair of methods and one group.

    ``difference`` is the first of ``means`` less the second, as they are: where lower is better, a gain is negative. The two are
    the scores of ``better`` and ``than``; of a change, those at its end and its beginning; of a claim that is held against a
    group or rows, the differences here and there. ``claimed`` is the size that the plan expects, in the score's unit and with its
    sign, None if it names none. ``seeds_to_tell`` is about how many seeds would tell where these cannot, None if no number is
    known. ``lacking`` are the runs that are not done, and ``remark`` says why there is no verdict, or what to know of it.
    """

    claim: str
    better: str
    than: str
    group: str
    verdict: str
    score: str = ""
    lower: bool = False
    means: tuple[float, float] | None = None
    difference: Estimate | None = None
    claimed: float | None = None
    seeds: tuple[int, ...] = ()
    seeds_to_tell: int | None = None
    lacking: tuple[str, ...] = ()
    remark: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"difference": self.difference and self.difference.to_json()}


def judge(plan: Plan, size: Size, collected: Collected) -> list[Judgement]:
    """Every claim of the plan that is about this size: a judgement for each method of ``than`` and each group."""
    return [
        _Case(name, claim, than, group, size, collected).judged()
        for name, claim in plan.claims.items()
        if is_about(claim, size)
        for than in claim.than or ("",)
        for group in claim.groups or [group for group, *_ in groups_of(size) if not claim.against or group != claim.against]
    ]  # fmt: skip


def is_lower(score: str) -> bool:
    """Whether less of a score, or of a metric of the steps, is better."""
    return score.startswith(_LOWER_STEPS) or bool(statistics.lower_is_better(score.removeprefix(SCORE)))


@dataclass(frozen=True)
class _Case:
    """A claim for one pair of methods and one group."""

    name: str
    claim: Claim
    than: str
    group: str
    size: Size
    collected: Collected

    def judged(self) -> Judgement:
        who = self.name, self.claim.better, self.than, self.group
        known: dict[str, Any] = {"seeds": self.seeds, "lacking": self.lacking}
        if len(self.seeds) < 2:
            alone = "one training seed says nothing of others; the size needs two at least"
            return Judgement(
                *who, NOT_RUN if self.lacking else NOT_JUDGED, remark="" if self.lacking else alone, **known
            )
        known |= {"score": self.score, "lower": self.sign < 0}
        try:
            means, base, difference = self._along() if self.claim.along else self._by_rows()
            if not np.isfinite([np.nan if end is None else end for end in (difference.low, difference.high)]).all():
                raise DataError("fewer than two rows have a value that is a number")
        except DataError as error:
            return Judgement(*who, NOT_JUDGED, remark=str(error), **known)
        claimed = self.sign * self.claim.expected * abs(base) or None
        verdict = verdict_of(difference, self.sign, claimed)
        seeds = seeds_to_tell(difference, len(self.seeds), claimed) if verdict == CANNOT_TELL and claimed else None
        known |= {"means": means, "difference": difference, "claimed": claimed, "seeds_to_tell": seeds}
        return Judgement(*who, verdict, remark=self._remark(), **known)

    # --- what is compared ---

    @cached_property
    def gain(self) -> list[Side]:
        """What is compared: the first, or the first less the second."""
        own = Side(self.claim.better, self.group, self.claim.rows, self.claim.at)
        others = [own._replace(method=self.than)] if self.than else []
        return [own, *others, *([own._replace(at=self.claim.since)] if self.claim.change else [])]

    @cached_property
    def less(self) -> list[Side]:
        """The same in what it is held against; [] where it is held against nothing."""
        if self.claim.against:
            return [side._replace(group=self.claim.against) for side in self.gain]
        rows = self.claim.against_rows
        return [side._replace(rows=rows) for side in self.gain] if rows else []

    @cached_property
    def runs(self) -> dict[tuple[str, str], dict[int, Run]]:
        """The runs of each method and group by training seed, of those seeds that all of them have."""
        found = {
            (side.method, side.group): {run.seed: run for run in self.collected.of(side.group, side.method)}
            for side in (*self.gain, *self.less)
        }
        common = sorted(set.intersection(*(set(own) for own in found.values())))
        return {which: {seed: own[seed] for seed in common} for which, own in found.items()}

    def runs_of(self, side: Side) -> dict[int, Run]:
        return self.runs[side.method, side.group]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.runs_of(self.gain[0]))

    @property
    def lacking(self) -> tuple[str, ...]:
        """The runs of the plan that the claim needs and that are not done."""
        done = {run.name for run in self.collected.runs}
        wanted = (joined(group, method, f"seed{seed}") for seed in self.size.seeds for method, group in self.runs)
        return tuple(name for name in wanted if name not in done)

    @cached_property
    def score(self) -> str:
        """The score, with `eval/` before it if it is one along the way."""
        first = self.runs_of(self.gain[0])[self.seeds[0]]
        if not self.claim.along:
            return self.claim.score or first.results[self.claim.task].student.primary
        return self.claim.score if self.claim.of_steps else SCORE + (self.claim.score or first.steps.primary)

    @property
    def sign(self) -> int:
        """1 where the claim is that the difference is above 0, -1 where it is below."""
        lower = self.claim.change == FALLS if self.claim.change else is_lower(self.score)
        return -1 if lower else 1

    # --- how it is measured ---

    def _along(self) -> tuple[tuple[float, float], float, Estimate]:
        """The two means, what the claimed size is a share of, and the difference with its interval over the seeds."""
        for sides in (self.gain, self.less):
            runs = [run for side in sides for run in self.runs_of(side).values()]
            for run in runs[1:]:
                if found := differences(runs[0].steps, run.steps, self.score):
                    raise DataError(
                        f"{self.score} is not measured alike in {runs[0].name} and {run.name}: {'; '.join(found)}"
                    )
        gain, less = (
            [np.array([value_at(run, self.score, side.at) for run in self.runs_of(side).values()]) for side in sides]
            for sides in (self.gain, self.less)
        )
        means, base = _means([float(own.mean()) for own in gain], [float(own.mean()) for own in less])
        own, *other = (sides[0] - sides[1] if len(sides) == 2 else sides[0] for sides in filter(None, (gain, less)))
        return means, base, t_interval((own - sum(other)).tolist())

    def _by_rows(self) -> tuple[tuple[float, float], float, Estimate]:
        """The same of the evaluation at the end, with the interval over rows and runs."""
        results = [
            [run.results[self.claim.task] for side in sides for run in self.runs_of(side).values()]
            for sides in (self.gain, self.less)
        ]
        for found in filter(None, results):
            check_comparable(found)
            check_teachers(found, [self.score])
        rows = [{n: found[0].student.made_with[n] for n in ("ids", "data sha256")} for found in filter(None, results)]
        same_rows = not unlike(rows[0], rows[-1])
        gain = [self._resampled(side) for side in self.gain]
        less = [self._resampled(side, key=0 if same_rows else 1) for side in self.less]
        means, base = _means([each.mean for each in gain], [each.mean for each in less])
        own, *other = (sides[0] - sides[1] if len(sides) == 2 else sides[0] for sides in filter(None, (gain, less)))
        for each in other:
            own = own - each if same_rows else own.less_apart(each)
        return means, base, own.estimate()

    def _resampled(self, side: Side, key: int = 0) -> Bootstrap:
        values = {}
        for seed, run in self.runs_of(side).items():
            student = run.results[self.claim.task].student
            if self.score not in student.scores:
                raise DataError(f"{run.name} has no score {self.score!r}{nearest(self.score, student.scores)}")
            # A reference's tokens are what the perplexity weighs its row by.
            lengths = np.asarray(student.scores["perplexity"].weights)
            values[seed] = student.scores[self.score].only(inside(lengths, side.rows))
        return bootstrap(self.score, values, key)

    def _remark(self) -> str:
        on = {
            str([[each.get(name) for name in ("device", "threads", "processes")] for each in run.conditions])
            for own in self.runs.values()
            for run in own.values()
        }
        if self.score != "seconds" or len(on) == 1:
            return ""
        return "the runs were not all on the same device, with the same threads and processes, which moves seconds"


def _means(gain: Sequence[float], less: Sequence[float]) -> tuple[tuple[float, float], float]:
    """The two figures that are compared, and that which a claimed size is a share of."""
    if not less:
        return (gain[0], gain[1]), gain[1]
    if len(gain) == 1:
        return (gain[0], less[0]), less[0]
    return (gain[0] - gain[1], less[0] - less[1]), gain[1]


def value_at(run: Run, metric: str, at: float) -> float:
    """A metric of a run when it had trained on the share ``at`` of its tokens.

    A score along the way lies on the line between the evaluations before and after; seconds are those of training until then; any
    other metric is its mean over the steps of the WINDOW that ends there.

    Raises:
        DataError: the run has no such value there.
    """
    steps, last = run.steps, run.steps[-1]["num_tokens"]
    budget = min(steps.settings.get("max_train_tokens") or last, last)
    here = at * budget
    own = [line for line in steps if (ELAPSED if metric == "seconds" else metric) in line]
    if not own:
        raise DataError(
            f"{run.name} has no {metric}" + (", which needs eval_steps" if metric.startswith(SCORE) else "")
        )
    tokens = np.array([line["num_tokens"] for line in own], dtype=np.float64)
    if metric == "seconds":
        return float(np.interp(here, [0.0, *tokens], [0.0, *(line[ELAPSED] for line in own)]))
    values = np.array([line[metric] for line in own], dtype=np.float64)
    if metric.startswith(SCORE):
        if not tokens[0] <= here <= tokens[-1]:
            raise DataError(
                f"{run.name} was evaluated from {tokens[0]:,.0f} to {tokens[-1]:,.0f} tokens, not at {here:,.0f}"
            )
        return float(np.interp(here, tokens, values))
    near = (here - WINDOW * budget < tokens) & (tokens <= here)
    if not near.any():
        since = max(here - WINDOW * budget, 0)
        raise DataError(f"{run.name} has no step with {metric} between {since:,.0f} and {here:,.0f} tokens")
    return float(values[near].mean())


def inside(lengths: Array, rows: str) -> Any:
    """Which rows are meant ``[N]``: all, or the third with the shortest or longest references, and those as long as its last.

    Raises:
        DataError: the references are so alike that a row would be both short and long.
    """
    if rows == ALL:
        return np.ones(len(lengths), dtype=bool)
    ordered = np.sort(lengths)
    third = max(len(ordered) // 3, 1)
    short, long = ordered[third - 1], ordered[-third]
    if not short < long:
        raise DataError(f"there are no short and long references: at least a third of them has {short:.0f} tokens")
    return lengths <= short if rows == SHORT else lengths >= long


# --- what it comes to ---------------------------------------------------------------------------------------------


def verdict_of(difference: Estimate, sign: int, claimed: float | None) -> str:
    """What an interval says of a claim that the difference lies on the side of ``sign``, and is as large as ``claimed``."""
    low, high = ends(difference, sign)
    if low > 0 or high < 0:
        return HOLDS if low > 0 else OPPOSITE
    return NO_GAIN if claimed is not None and abs(claimed) > high else CANNOT_TELL


def ends(difference: Estimate, sign: int) -> tuple[float, float]:
    """The ends of an interval, turned so that a gain is above 0."""
    assert difference.low is not None and difference.high is not None
    low, high = sorted((sign * difference.low, sign * difference.high))
    return low, high


def seeds_to_tell(difference: Estimate, seeds: int, claimed: float) -> int | None:
    """About how many seeds make the interval so narrow that 0 and the claimed size cannot both be inside.

    The part of the interval that is due to the runs shrinks with their number; what is due to the rows stays. None if more than
    MOST_SEEDS would be needed.
    """
    low, high = ends(difference, 1)
    spread = difference.std or 0.0
    of_runs = half_width(0.0, spread, seeds)
    of_rows = np.sqrt(max(((high - low) / 2) ** 2 - of_runs**2, 0.0))
    more = np.arange(seeds + 1, MOST_SEEDS + 1)
    enough = more[2 * half_width(of_rows, spread, more) < abs(claimed)]
    return int(enough[0]) if len(enough) else None


# --- claims as they were when the study began ---------------------------------------------------------------------


def register(plan: Plan, output_dir: Path) -> None:
    """Write the claims of the plan into the folder of a study that begins. One that has begun keeps those that it began with."""
    folder = output_dir / CELLS
    if (folder / CLAIMS).is_file():
        return
    began_without = folder.is_dir() and any(folder.iterdir())  # with a version that knew no claims
    claims = {} if began_without else {name: to_dict(claim) for name, claim in plan.claims.items()}
    with locked(output_dir), written(folder):
        folder.mkdir(exist_ok=True)
        write_file(folder / CLAIMS, yaml.safe_dump(claims, sort_keys=False))


def registered(output_dir: Path) -> dict[str, Any]:
    """The claims that a study began with, as plain values by name."""
    file = output_dir / CELLS / CLAIMS
    return read_yaml(file) if file.is_file() else {}


def changes(plan: Plan, begun: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The claims that are not those that the study began with, by name, and what of them."""
    then = {name: from_dict(Claim, claim, f"claim {name} of the study") for name, claim in begun.items()}
    for name, claim in plan.claims.items():
        if name not in then:
            yield name, "added after the study began"
        elif claim != then[name]:
            now, before = to_dict(claim), to_dict(then[name])
            which = "; ".join(f"{each}: {before[each]!r} -> {now[each]!r}" for each in now if now[each] != before[each])
            yield name, f"changed after the study began ({which})"
    for name, claim in then.items():
        if name not in plan.claims:
            yield name, f"taken out after the study began: {claim.says}"
