"""What a number in a table rests on: intervals over seeds and clips, paired differences, multiplicity, seeds needed.

Every draw comes from a generator with a key of its own; nothing here reads global random state.

A row's scores are an array (seeds, clips): clips are the same prompts, seeds and noises for every row and training seed, so the
two factors are crossed. Where a metric has no value a clip (a distance between sets) the array is (seeds, 1).
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf, isfinite, nan, sqrt

import numpy as np
from scipy import special  # not scipy.stats, which takes a second to import

CONFIDENCE = 0.95
POWER = 0.8
REPETITIONS = 4000
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided interval; `low`, `high` and `error` are nan where the values say nothing about the spread."""

    mean: float
    low: float
    high: float
    n: int  # seeds
    error: float = nan  # standard error of the mean
    dof: float = nan  # degrees of freedom of `error`

    @property
    def half(self) -> float:
        """Half the width, nan where there is no interval."""
        return (self.high - self.low) / 2

    @property
    def p(self) -> float:
        """Two-sided p of a mean of 0 (Student's t); nan where there is no interval, or none of the values differ.

        Few seeds of a coarse score may agree by chance: that is no certainty.
        """
        if not isfinite(self.error):
            return nan
        if self._still:
            return 1.0 if self.mean == 0 else nan
        return float(2 * special.stdtr(self.dof, -abs(self.mean) / self.error))

    def excludes(self, value: float) -> bool:
        """Whether the interval exists, has a width, and does not contain `value`."""
        return isfinite(self.low) and not self._still and not self.low <= value <= self.high

    @property
    def _still(self) -> bool:
        return self.error <= 1e-12 * abs(self.mean)  # but for rounding


def _interval(mean: float, error: float, dof: float, n: int, confidence: float) -> Interval:
    half = float(special.stdtrit(dof, (1 + confidence) / 2)) * error
    return Interval(mean, mean - half, mean + half, n, error, dof)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean of `values`, one a seed, with Student's t interval.

    Raises:
        ValueError: if there is no value, or one of them is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no value to average")
    if not np.isfinite(array).all():
        raise ValueError(f"cannot average values that are not finite: {array.tolist()}")
    mean, n = float(array.mean()), int(array.size)
    if n == 1:
        return Interval(mean, nan, nan, 1)
    return _interval(mean, float(array.std(ddof=1) / sqrt(n)), n - 1, n, confidence)


def crossed_interval(
    values: np.ndarray,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
    seeds_vary: bool = True,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Mean of values (seeds, clips) with an interval from a stratified bootstrap over both factors.

    Seeds are resampled with the clips held, and clips (whole clusters of them) with the seeds held. The two variances, each times
    n / (n - 1) for the one that resampling loses, add up, and the quantile is Student's with Satterthwaite's degrees of freedom:
    percentiles of resamples of three seeds would cover 75 % instead of 95 %. Without clips this is Student's t over seeds.

    Args:
        seed: of the resamples, which all rows of one shape share; see `resampled_shares`.
        clusters: one label a clip; clips of one prompt are drawn together.
        seeds_vary: False for a row without a training seed (a reference): its clips alone make the interval. Otherwise one seed
            has no interval: clips say nothing of what another seed would give.
    """
    values = np.asarray(values, dtype=np.float64)
    seeds, clips = values.shape
    if clips == 1:
        return mean_interval(values[:, 0], confidence)
    if not np.isfinite(values).all():
        raise ValueError("cannot average values that are not finite")
    if seeds == 1 and seeds_vary:
        return Interval(float(values.mean()), nan, nan, 1)
    parts = [
        _resampled_variance(values.mean(1), None, seed),
        _resampled_variance(values.mean(0), clusters, seed),
    ]
    variance = sum(part for part, _ in parts)
    dof = variance**2 / sum(part**2 / dof for part, dof in parts if dof) if variance > 0 else 1.0
    return _interval(float(values.mean()), sqrt(variance), dof, seeds, confidence)


def _resampled_variance(
    values: np.ndarray, clusters: Sequence[Hashable] | None, seed: int
) -> tuple[float, int]:
    """Variance of the mean of `values` by resampling its clusters, unbiased, and its degrees of freedom."""
    labels = range(len(values)) if clusters is None else clusters
    place = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    if len(place) < 2:
        return 0.0, 0
    member = [place[label] for label in labels]
    shares = resampled_shares(len(place), seed)
    means = shares @ np.bincount(member, values) / (shares @ np.bincount(member))
    return float(means.var()) * len(place) / (len(place) - 1), len(place) - 1


@cache
def resampled_shares(n: int, seed: int, repetitions: int = REPETITIONS) -> np.ndarray:
    """How large a share each of n members has in each resample, (repetitions, n), from a generator of this key alone."""
    generator = np.random.default_rng([seed, n])
    return generator.multinomial(n, np.full(n, 1 / n), size=repetitions) / n


def paired(a: Mapping[Hashable, np.ndarray], b: Mapping[Hashable, np.ndarray]) -> np.ndarray:
    """a - b over the seeds that both have, (seeds, clips); of means where one of them has no or other clips.

    Raises:
        ValueError: if no seed is in both.
    """
    common = [seed for seed in a if seed in b]
    if not common:
        raise ValueError(f"no seed in common: {sorted(map(str, a))} and {sorted(map(str, b))}")
    if len({len(values) for row in (a, b) for values in row.values()}) == 1:
        return np.stack([a[seed] - b[seed] for seed in common])
    return np.array([[np.mean(a[seed]) - np.mean(b[seed])] for seed in common])


def losses(values: Mapping[Hashable, np.ndarray], better: str) -> dict[Hashable, np.ndarray]:
    """The same scores so that less is better; for "one" the distance of each seed's mean to 1, (1,).

    Raises:
        ValueError: for a direction that is none of "lower", "higher", "one".
    """
    match better:
        case "lower":
            return dict(values)
        case "higher":
            return {seed: -each for seed, each in values.items()}
        case "one":
            return {seed: np.array([abs(np.mean(each) - 1)]) for seed, each in values.items()}
    raise ValueError(f"no direction called {better!r}; known: lower, higher, one")


def clear_winner(
    rows: Sequence[Mapping[Hashable, np.ndarray]],
    better: str | None,
    clusters: Sequence[Hashable] | None = None,
) -> int | None:
    """Index of the row whose paired difference to every other row excludes 0, else None.

    The intervals are widened for the number of comparisons (Bonferroni), so that all of them hold at 95 % together.

    Args:
        rows: one mapping from seed to values (clips,) a row; empty rows cannot win and cannot be beaten.
        better: "lower", "higher", "one" (closer to 1), or None (no direction, hence no winner).
    """
    if better is None:
        return None
    each = [losses(row, better) for row in rows]
    means = [float(np.mean([v.mean() for v in row.values()])) if row else inf for row in each]
    rivals = [i for i, row in enumerate(each) if row]
    if len(rivals) < 2:
        return None
    best = min(rivals, key=means.__getitem__)
    confidence = 1 - (1 - CONFIDENCE) / (len(rivals) - 1)
    for other in rivals:
        if other == best:
            continue
        if not each[best].keys() & each[other].keys():
            return None
        difference = crossed_interval(
            paired(each[best], each[other]), clusters=clusters, confidence=confidence
        )
        if not (difference.excludes(0.0) and difference.mean < 0):
            return None
    return best


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values of one family; nan stays nan and does not count."""
    order = sorted((i for i, p in enumerate(p_values) if isfinite(p)), key=lambda i: p_values[i])
    adjusted, largest = [nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def power(seeds: int, sd: float, gap: float, confidence: float = CONFIDENCE) -> float:
    """Probability that a paired t test over `seeds` seeds sees a true difference `gap`; `sd` is of one seed's difference."""
    shift, critical = abs(gap) / sd * sqrt(seeds), special.stdtrit(seeds - 1, (1 + confidence) / 2)
    bounds = critical * _chi_quantiles(seeds - 1)
    return float(np.mean(special.ndtr(shift - bounds) + special.ndtr(-bounds - shift)))


@cache
def _chi_quantiles(dof: int) -> np.ndarray:
    """Two thousand equally likely values of sqrt(chi2 / dof): scipy's noncentral t fails for few degrees and large shifts."""
    return np.sqrt(2 * special.gammaincinv(dof / 2, (np.arange(2000) + 0.5) / 2000) / dof)


def seeds_needed(sd: float, gap: float, confidence: float = CONFIDENCE) -> int | None:
    """Fewest paired seeds that see a difference `gap` with 80 % power, None above a thousand; see `power`."""
    if not (isfinite(sd) and isfinite(gap)) or gap == 0:
        return None
    if sd == 0:
        return 2
    quantiles = special.ndtri((1 + confidence) / 2) + special.ndtri(POWER)
    fewest = max(
        2, int((quantiles * sd / gap) ** 2)
    )  # of a normal test, which needs no more than t's
    return next(
        (n for n in range(fewest, MOST_SEEDS + 1) if power(n, sd, gap, confidence) >= POWER), None
    )
