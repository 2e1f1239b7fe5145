"""How sure a score is: means, percentile bootstrap intervals, paired differences and rank correlation.

Shapes: S sampling seeds, N examples, R training runs, B bootstrap resamples. Randomness is keyed: equal input, equal interval.

What is resampled is the examples, all with the same key: two scores on the same examples always see the same resamples,
which is what makes a difference paired. Where a method was trained with several seeds, its runs are resampled too (Davison
and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from switchkd.base.errors import DataError

Array: TypeAlias = NDArray[np.float64]

RESAMPLES = 2000
FEW_EXAMPLES = 30  # a score over fewer says little, and is marked wherever it is shown
CONFIDENCE = 0.95
_EXAMPLES, _RUNS = 0, 1  # streams of the keyed randomness
_CHUNK = 1 << 20  # resampled examples held at a time

# By how a score's name begins: what its weighted mean goes through to become the score. Others stay as they are.
TRANSFORMS: dict[str, Callable[[Array], Array]] = {"perplexity": np.exp}
# By how a score's name begins: True where lower is better, None where neither end is. Elsewhere higher is better.
LOWER_IS_BETTER: dict[str, bool | None] = {
    "forward_kl": True,
    "own_forward_kl": True,
    "perplexity": True,
    "length": None,
    "eos": None,
}


@dataclass(frozen=True, eq=False)
class Values:
    """What one model scored: ``values`` [S, N] of each example under each sampling seed, ``weights`` [N] or None for equal ones.

    The score is Σ_i w_i · mean_s v_si / Σ_i w_i. An example of weight 0 has no part, whatever its value.

    Raises:
        DataError: shapes that do not fit, a negative weight, or a value that is no number where its weight is not 0.
    """

    values: Array
    weights: Array | None = None

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        if values.ndim != 2 or not values.size:
            raise DataError(f"values must be a list of examples for each sampling seed, got shape {values.shape}")
        weights = np.ones(values.shape[1]) if self.weights is None else np.asarray(self.weights, dtype=np.float64)
        if weights.shape != values.shape[1:]:
            raise DataError(f"{values.shape[1]} examples have weights of shape {weights.shape}; give one weight each")
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise DataError(f"weights must be finite and at least 0, got {weights.min()} to {weights.max()}")
        values = np.where(weights > 0, values, 0.0)
        if len(bad := np.unique(np.nonzero(~np.isfinite(values))[1])):
            raise DataError(
                f"{len(bad)} of {values.shape[1]} examples have a value that is no finite number, the first at index {bad[0]}; "
                "an example without a value has weight 0"
            )
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "weights", weights)

    def only(self, inside: NDArray[np.bool_]) -> "Values":
        """The same with the examples outside ``inside`` [N] left without weight."""
        return Values(self.values, np.where(inside, np.asarray(self.weights), 0.0))


# One run, or the runs of one method by training seed.
Runs: TypeAlias = Values | Mapping[int, Values]


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of two, and how sure it is.

    ``mean`` is NaN where no example has weight. ``std`` is the standard deviation (ddof 1) over training runs where there are
    several, else over sampling seeds; None with one. ``low`` and ``high`` are the 95 % interval; None with fewer than two
    ``examples`` of weight, which say nothing about others.
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None
    examples: int

    @property
    def few(self) -> bool:
        """Whether it is over so few examples that it is shown with a mark."""
        return 0 < self.examples < FEW_EXAMPLES

    def to_json(self) -> dict[str, Any]:
        """Plain values, None in place of NaN and infinities, which JSON has not."""
        return {k: v if v is None or np.isfinite(v) else None for k, v in asdict(self).items()}


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """A score with its resamples. The difference of two on the same examples is paired, resample by resample.

    ``replicates`` [B] are the score on the resamples; ``units`` are the scores of the training runs, or of the sampling seeds
    of the only run; ``seeds`` the training seeds where there are several.
    """

    mean: float
    replicates: Array = field(repr=False)
    units: Array
    seeds: tuple[int, ...]
    examples: int
    total: int

    def __sub__(self, other: "Bootstrap") -> "Bootstrap":
        if (self.total, len(self.replicates)) != (other.total, len(other.replicates)):
            raise DataError(
                f"{self.total} and {other.total} examples cannot be paired; both scores need the same examples"
            )
        return self.less_apart(other)

    def less_apart(self, other: "Bootstrap") -> "Bootstrap":
        """The difference to a score on other examples, which was resampled with another key. Runs of one seed stay a pair."""
        with np.errstate(invalid="ignore"):  # inf - inf, of perplexities
            mean, replicates = self.mean - other.mean, self.replicates - other.replicates
            paired = self.seeds == other.seeds and len(self.units) == len(other.units)
            units = self.units - other.units if paired else np.empty(0)
        return Bootstrap(mean, replicates, units, self.seeds, min(self.examples, other.examples), self.total)

    def estimate(self) -> Estimate:
        """The mean, and the percentile interval of the resamples."""
        std = low = high = None
        tail = (1 - CONFIDENCE) / 2
        with np.errstate(invalid="ignore"):  # inf - inf, of perplexities
            if len(self.units) > 1:
                std = float(np.std(self.units, ddof=1))
                std = std if std > 1e-12 * abs(self.mean) else 0.0  # else it is of rounding alone
            # A resample may hold no example of weight; it then says nothing.
            said = self.replicates[~np.isnan(self.replicates)]
            if self.examples >= 2 and said.size:
                low, high = map(float, np.quantile(said, (tail, 1 - tail)))
        return Estimate(float(self.mean), std, low, high, self.examples)


def bootstrap(name: str, runs: Runs, seed: int = 0, resamples: int = RESAMPLES) -> Bootstrap:
    """Resample the examples of the score ``name``, and the runs where there are several.

    The score of several runs is the mean of theirs. Runs are drawn with a key made of their training seeds, so that methods
    trained with the same seeds are paired in those too. Two or three runs know little of the spread between them, and plain
    resampling would show less than there is: how far the drawn runs are from all runs is stretched by sqrt(R / (R - 1)) and
    by Student's t over the normal quantile ("expanded percentile", Hesterberg, What Teachers Should Know about the Bootstrap,
    The American Statistician 69, 2015). It remains a rough estimate.
    """
    by_seed = {0: runs} if isinstance(runs, Values) else dict(sorted(runs.items()))
    if not by_seed or len({run.values.shape[1] for run in by_seed.values()}) != 1:
        raise DataError(
            f"the runs of one method need the same examples, got {[r.values.shape for r in by_seed.values()]}"
        )
    weights_NR = np.stack([np.asarray(run.weights) for run in by_seed.values()], axis=1)
    values_NR = np.stack([run.values.mean(axis=0) for run in by_seed.values()], axis=1)
    total, count = values_NR.shape
    scores_BR = np.concatenate([
        _score(name, counts_BN @ (weights_NR * values_NR), counts_BN @ weights_NR)
        for counts_BN in _resampled_examples(total, seed, resamples)
    ])  # fmt: skip
    units = _score(name, (weights_NR * values_NR).sum(axis=0), weights_NR.sum(axis=0))
    mean, replicates = float(units.mean()), scores_BR.mean(axis=1)
    if count > 1:
        rng = np.random.default_rng(np.random.SeedSequence((seed, _RUNS, *by_seed)))
        picked_B = units[rng.integers(0, count, (resamples, count))].mean(axis=1)
        replicates = replicates + _stretch(count) * (picked_B - mean)
    else:
        [run] = by_seed.values()
        units = _score(name, run.values @ weights_NR[:, 0], weights_NR.sum())
    examples = int((weights_NR > 0).any(axis=1).sum())
    return Bootstrap(mean, replicates, units, tuple(by_seed) if count > 1 else (), examples, total)


def score(name: str, values: Values) -> float:
    """The score ``name`` alone."""
    weights = np.asarray(values.weights)
    return float(_score(name, values.values.mean(axis=0) @ weights, weights.sum()))


def estimate(name: str, runs: Runs, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The score ``name`` of a model, or of a method's runs by training seed, with its 95 % bootstrap interval."""
    return bootstrap(name, runs, seed, resamples).estimate()


def difference(name: str, a: Runs, b: Runs, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The score ``name`` of ``a`` less that of ``b``, on the same resampled examples (and runs, if trained with equal seeds)."""
    return (bootstrap(name, a, seed, resamples) - bootstrap(name, b, seed, resamples)).estimate()


def t_interval(values: Sequence[float]) -> Estimate:
    """The mean of one value a training run, such as the difference of two runs of one seed, with its 95 % interval by Student's t.

    ``examples`` are the runs. The interval is None with fewer than two.
    """
    runs = np.asarray(values, dtype=np.float64)
    mean, count = float(runs.mean()), len(runs)
    if count < 2:
        return Estimate(mean, None, None, None, count)
    std = float(runs.std(ddof=1))
    half = float(t_quantile(count) * std / np.sqrt(count))
    return Estimate(mean, std, mean - half, mean + half, count)


def t_quantile(runs: int | NDArray[np.int64]) -> Any:
    """How many standard errors of a mean over so many runs its 95 % interval reaches to each side, by Student's t."""
    from scipy.special import stdtrit  # slow to import

    return stdtrit(runs - 1, (1 + CONFIDENCE) / 2)


def half_width(of_rows: Any, spread: float, runs: Any) -> Any:
    """Half of the 95 % interval over so many ``runs``: the part of the rows, which runs do not shrink, and that of the runs, whose
    differences have the standard deviation ``spread``."""
    return np.hypot(of_rows, t_quantile(runs) * spread / np.sqrt(runs))


def gap_closed(name: str, before: Values, after: Values, teacher: Values) -> Estimate | None:
    """Which share of the way from ``before`` to ``teacher`` a student has gone who now scores ``after``; 1 is all of it.

    None where the teacher is not told apart from ``before`` as the better one: there is then no way to speak of.
    """
    b, a, t = (bootstrap(name, each) for each in (before, after, teacher))
    gap, gone = t - b, a - b
    if verdict(gap.estimate(), lower_is_better(name)) != "better":
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = gone.replicates / gap.replicates
    return Bootstrap(
        gone.mean / gap.mean, shares, np.empty(0), (), min(gap.examples, gone.examples), gap.total
    ).estimate()


def by_example(name: str, values: Values) -> Array:
    """The score ``name`` of each example alone ``[S, N]``, NaN where one has no part in it."""
    found = np.where(np.asarray(values.weights) > 0, values.values, np.nan)
    return next((f(found) for prefix, f in TRANSFORMS.items() if name.startswith(prefix)), found)


def lower_is_better(name: str) -> bool | None:
    """Whether a lower score of that name is the better one; None where neither is."""
    return next((lower for prefix, lower in LOWER_IS_BETTER.items() if name.startswith(prefix)), False)


def verdict(estimate: Estimate, lower_is_better: bool | None) -> str:
    """What an estimated difference says: better, worse (or higher, lower), or not distinguishable if 0 is in the interval."""
    low, high = estimate.low, estimate.high
    if low is None or high is None or not (low > 0 or high < 0):
        return "not distinguishable"
    if lower_is_better is None:
        return "higher" if low > 0 else "lower"
    return "better" if (low > 0) != lower_is_better else "worse"


def spearman(x: Sequence[float] | Array, y: Sequence[float] | Array) -> float:
    """Spearman's rank correlation of two series, ties given their mean rank; NaN for a constant series or one with NaN."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise DataError(f"a rank correlation needs two series of one length, got shapes {a.shape} and {b.shape}")
    if any((series == series[:1]).all() for series in (a, b)):  # constant, or empty
        return float("nan")
    from scipy.stats import spearmanr  # takes a second to import

    return float(spearmanr(a, b).statistic)


def _resampled_examples(total: int, seed: int, resamples: int) -> Iterator[Array]:
    """How often each resample holds each example: ``[B, N]`` counts, in chunks of resamples."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, _EXAMPLES)))
    rows = max(1, _CHUNK // total)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        picked = rng.integers(0, total, (size, total)) + total * np.arange(size)[:, None]
        yield np.bincount(picked.ravel(), minlength=size * total).reshape(size, total).astype(np.float64)


def _score(name: str, weighted: Array, weight: Array) -> Array:
    """The score from weighted sums and sums of weights; NaN where there is no weight, inf where a perplexity overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        means = weighted / weight
        return next((f(means) for prefix, f in TRANSFORMS.items() if name.startswith(prefix)), means)


def _stretch(runs: int) -> float:
    """What the spread of resampled means of ``runs`` runs lacks of an interval's: sqrt(R / (R - 1)) · t / z."""
    from scipy.special import ndtri  # needed for several runs alone, and slow to import

    return float(np.sqrt(runs / (runs - 1)) * t_quantile(runs) / ndtri((1 + CONFIDENCE) / 2))
