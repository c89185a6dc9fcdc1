"""Intervals over seeds, paired differences and the bootstrap: what a number in a table rests on.

Every draw comes from a generator that the caller hands in; nothing here reads global random state.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan, sqrt

import numpy as np
from scipy import stats as distributions

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided interval; `low` and `high` are nan where one value says nothing about the spread."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half the width, nan where there is no interval."""
        return (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """Whether the interval exists and does not contain `value`."""
        return isfinite(self.low) and not self.low <= value <= self.high


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean of `values` with Student's t interval.

    Raises:
        ValueError: if there is no value, or one of them is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no value to average")
    if not np.isfinite(array).all():
        raise ValueError(f"cannot average values that are not finite: {array.tolist()}")
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, nan, nan, 1)
    quantile = distributions.t.ppf((1 + confidence) / 2, array.size - 1)
    half = float(quantile * array.std(ddof=1) / sqrt(array.size))
    return Interval(mean, mean - half, mean + half, int(array.size))


def paired_difference(a: Mapping[Hashable, float], b: Mapping[Hashable, float], confidence: float = CONFIDENCE) -> Interval:
    """Mean of a - b over the seeds that both have, with Student's t interval.

    Raises:
        ValueError: if no seed is in both.
    """
    common = [seed for seed in a if seed in b]
    if not common:
        raise ValueError(f"no seed in common: {sorted(map(str, a))} and {sorted(map(str, b))}")
    return mean_interval([a[seed] - b[seed] for seed in common], confidence)


def clear_winner(rows: Sequence[Mapping[Hashable, float]], better: str | None) -> int | None:
    """Index of the row whose paired difference to every other row excludes 0, else None.

    The intervals are widened for the number of comparisons (Bonferroni), so that all of them hold at 95 % together.

    Args:
        rows: one mapping from seed to value a row; empty rows cannot win and cannot be beaten.
        better: "lower", "higher", "one" (closer to 1), or None (no direction, hence no winner).
    """
    if better is None:
        return None
    losses = [{seed: _loss(value, better) for seed, value in row.items()} for row in rows]
    means = [float(np.mean(list(row.values()))) if row else inf for row in losses]
    rivals = [i for i, row in enumerate(losses) if row]
    if len(rivals) < 2:
        return None
    best = min(rivals, key=means.__getitem__)
    confidence = 1 - (1 - CONFIDENCE) / (len(rivals) - 1)
    for other in rivals:
        if other == best:
            continue
        if not losses[best].keys() & losses[other].keys():
            return None
        difference = paired_difference(losses[best], losses[other], confidence)
        if not (difference.excludes(0.0) and difference.mean < 0):
            return None
    return best


def _loss(value: float, better: str) -> float:
    match better:
        case "lower":
            return value
        case "higher":
            return -value
        case "one":
            return abs(value - 1)
    raise ValueError(f"no direction called {better!r}; known: lower, higher, one")


def bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    generator: np.random.Generator,
    repetitions: int = 1000,
    clusters: Sequence[Hashable] | None = None,
) -> np.ndarray:
    """The statistic on resamples of the rows of `values`, (repetitions,).

    Distances between sets of samples (Frechet) are biased by the duplicates in a resample: use the sd of the result for
    them, never its percentiles.

    Args:
        values: (N, ...), resampled along the first axis.
        clusters: one label a row; whole clusters are drawn (clips of one prompt are not independent).
    """
    values = np.asarray(values)
    if len(values) == 0:
        raise ValueError("no value to resample")
    if clusters is None:
        members = [np.array([i]) for i in range(len(values))]
    else:
        if len(clusters) != len(values):
            raise ValueError(f"{len(clusters)} cluster labels for {len(values)} values")
        folds: dict[Hashable, list[int]] = {}
        for i, label in enumerate(clusters):
            folds.setdefault(label, []).append(i)
        members = [np.array(fold) for fold in folds.values()]
    result = np.empty(repetitions)
    for repetition in range(repetitions):
        drawn = generator.integers(len(members), size=len(members))
        result[repetition] = statistic(values[np.concatenate([members[i] for i in drawn])])
    return result


def bootstrap_interval(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    generator: np.random.Generator,
    repetitions: int = 1000,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile interval of a statistic that resampling does not bias (a mean, a difference of means)."""
    drawn = bootstrap(values, statistic, generator, repetitions, clusters)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(statistic(np.asarray(values))), float(low), float(high), len(values))
