"""Statistics of the tables: intervals over seeds and clips, paired differences, Holm, power.

The scores of a row are an array (seeds, clips). Clips have the same prompts, sampling seeds and
noise for every row and training seed, so the two factors are crossed. A metric without values per
clip, such as a distance between sets of clips, gives an array (seeds, 1).

Resampling uses generators with fixed keys; global random state is never read.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf, isfinite, nan, sqrt
from typing import Any

import numpy as np
from numpy.polynomial import Chebyshev
from scipy import special  # not scipy.stats, which takes a second to import

CONFIDENCE = 0.95
POWER = 0.8
REPETITIONS = 4000
MOST_SEEDS = 1000
FEW_SEEDS = 40  # up to which each number of seeds is its own root in `seeds_needed`
MOST_COVARIANCES = 500  # members of a bootstrap up to which covariances replace its resamples


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided interval.

    `low`, `high` and `error` are nan if the values do not determine the spread (one seed).
    """

    mean: float
    low: float
    high: float
    n: int  # seeds
    error: float = nan  # standard error of the mean
    dof: float = nan  # degrees of freedom of `error`

    @property
    def half(self) -> float:
        """Half the width; nan without an interval."""
        return (self.high - self.low) / 2

    @property
    def p(self) -> float:
        """Two-sided p-value for a true mean of 0 (Student's t); nan without an interval.

        Also nan if all values are equal but not 0: seeds of a coarse score can agree by chance.
        """
        if not isfinite(self.error):
            return nan
        if self._degenerate:
            return 1.0 if self.mean == 0 else nan
        return float(2 * special.stdtr(self.dof, -abs(self.mean) / self.error))

    def excludes(self, value: float) -> bool:
        """Return True if the interval exists, has a width, and does not contain `value`."""
        if not isfinite(self.low) or self._degenerate:
            return False
        return not self.low <= value <= self.high

    @property
    def _degenerate(self) -> bool:
        """True if all values are equal up to rounding."""
        return self.error <= 1e-12 * abs(self.mean)


def _interval(mean: float, error: float, dof: float, n: int, confidence: float) -> Interval:
    half = float(t_quantile(dof, confidence)) * error
    return Interval(mean, mean - half, mean + half, n, error, dof)


def t_quantile(dof: Any, confidence: float = CONFIDENCE) -> Any:
    """Half the width of Student's t interval in standard errors; `dof` may be an array."""
    return special.stdtrit(dof, (1 + confidence) / 2)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean of one value per seed, with Student's t interval.

    Raises:
        ValueError: if there is no value, or a value is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no value to average")
    if not np.isfinite(array).all():
        raise ValueError(f"cannot average values that are not finite: {array.tolist()}")
    mean = float(array.mean())
    n = int(array.size)
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
    """Mean of values (seeds, clips) with an interval from a bootstrap over both factors.

    Seeds are resampled with fixed clips, and clips (in clusters) with fixed seeds. Each variance is
    multiplied by n / (n - 1), since resampling n values underestimates it. The two are added.
    The quantile is Student's t with Satterthwaite's degrees of freedom: percentiles of resamples of
    three seeds would cover 75 % instead of 95 %. With one value per seed, the interval is Student's
    t over seeds.

    Args:
        seed: key of the resamples, see `resampled_shares`.
        clusters: one label per clip; clips with the same label (prompt) are drawn together.
        seeds_vary: False for a reference, which has no training seed: its interval is over clips.
            If True, a single seed gives no interval: clips do not show how seeds differ.

    Raises:
        ValueError: if a value is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    n, clips = values.shape
    if clips == 1:
        return mean_interval(values[:, 0], confidence)
    if not np.isfinite(values).all():
        raise ValueError("cannot average values that are not finite")
    if n == 1 and seeds_vary:
        return Interval(float(values.mean()), nan, nan, 1)
    parts = [
        _resampled_variance(values.mean(1), None, seed),
        _resampled_variance(values.mean(0), clusters, seed),
    ]
    variance = sum(part for part, _ in parts)
    dof = variance**2 / sum(part**2 / dof for part, dof in parts if dof) if variance > 0 else 1.0
    return _interval(float(values.mean()), sqrt(variance), dof, n, confidence)


def _resampled_variance(
    values: np.ndarray, clusters: Sequence[Hashable] | None, seed: int
) -> tuple[float, int]:
    """Return the unbiased variance of the mean over resampled clusters, and its dof."""
    labels = range(len(values)) if clusters is None else clusters
    place = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    if len(place) < 2:
        return 0.0, 0
    member = [place[label] for label in labels]
    sums, sizes = np.bincount(member, values), np.bincount(member)
    if len(place) <= MOST_COVARIANCES and len(set(sizes)) == 1:
        means = sums / sizes
        centred = means - means.mean()  # so that equal values have a variance of 0
        variance = max(0.0, float(centred @ _covariance(len(place), seed) @ centred))
    else:
        shares = resampled_shares(len(place), seed)
        variance = float((shares @ sums / (shares @ sizes)).var())
    return variance * len(place) / (len(place) - 1), len(place) - 1


@cache
def _covariance(n: int, seed: int) -> np.ndarray:
    """Covariances of the members' shares over `resampled_shares`, (n, n)."""
    shares = resampled_shares(n, seed)
    return np.cov(shares, rowvar=False, ddof=0)


@cache
def resampled_shares(n: int, seed: int, repetitions: int = REPETITIONS) -> np.ndarray:
    """Return the share of each of n members in each resample, (repetitions, n).

    The shares depend only on (n, seed), so all rows with n members get the same resamples.
    """
    generator = np.random.default_rng([seed, n])
    return generator.multinomial(n, np.full(n, 1 / n), size=repetitions) / n


def paired(a: Mapping[Hashable, np.ndarray], b: Mapping[Hashable, np.ndarray]) -> np.ndarray:
    """Return a - b over the common seeds, (seeds, clips).

    If a and b differ in their number of clips, the means over clips are subtracted, (seeds, 1).

    Raises:
        ValueError: if there is no common seed.
    """
    values = weighted_sum([1.0, -1.0], [a, b])
    if not len(values):
        raise ValueError(f"no seed in common: {sorted(map(str, a))} and {sorted(map(str, b))}")
    return values


def weighted_sum(
    weights: Sequence[float], rows: Sequence[Mapping[Hashable, np.ndarray]]
) -> np.ndarray:
    """Return the weighted sum of rows over their common seeds, (seeds, clips).

    If the rows differ in their number of clips, the means over clips are added, (seeds, 1).
    """
    shared = set(rows[0]).intersection(*rows[1:])
    common = [seed for seed in rows[0] if seed in shared]
    if len({len(values) for row in rows for values in row.values()}) > 1:
        rows = [{seed: row[seed].mean(keepdims=True) for seed in common} for row in rows]
    arrays = (np.array([row[seed] for seed in common]) for row in rows)
    return sum(weight * array for weight, array in zip(weights, arrays, strict=True))


def losses(values: Mapping[Hashable, np.ndarray], better: str) -> dict[Hashable, np.ndarray]:
    """Return scores as losses: lower is better.

    For "one" the loss is the distance of each seed's mean to 1, (1,).

    Raises:
        ValueError: if the direction is not "lower", "higher" or "one".
    """
    match better:
        case "lower":
            return dict(values)
        case "higher":
            return {seed: -scores for seed, scores in values.items()}
        case "one":
            return {seed: np.array([abs(np.mean(scores) - 1)]) for seed, scores in values.items()}
    raise ValueError(f"no direction called {better!r}; known: lower, higher, one")


def clear_winner(
    rows: Sequence[Mapping[Hashable, np.ndarray]],
    better: str | None,
    clusters: Sequence[Hashable] | None = None,
) -> int | None:
    """Return the index of the row that is clearly better than every other row; None without one.

    The paired differences of the winner to all other rows exclude 0. Their intervals are widened
    for the number of comparisons (Bonferroni), so that all hold jointly at 95 %.

    Args:
        rows: per row, seed -> values (clips,). Empty rows neither win nor count as rivals.
        better: "lower", "higher", "one" (closer to 1), or None (no direction, so no winner).
        clusters: one label per clip, see `crossed_interval`; unused for a pair of other clips.
    """
    if better is None:
        return None
    row_losses = [losses(row, better) for row in rows]
    means = [float(np.mean([v.mean() for v in row.values()])) if row else inf for row in row_losses]
    rivals = [i for i, row in enumerate(row_losses) if row]
    if len(rivals) < 2:
        return None
    best = min(rivals, key=means.__getitem__)
    confidence = 1 - (1 - CONFIDENCE) / (len(rivals) - 1)
    for other in rivals:
        if other == best:
            continue
        if not row_losses[best].keys() & row_losses[other].keys():
            return None
        differences = paired(row_losses[best], row_losses[other])
        of_pair = clusters if clusters and len(clusters) == differences.shape[1] else None
        difference = crossed_interval(differences, clusters=of_pair, confidence=confidence)
        if not (difference.excludes(0.0) and difference.mean < 0):
            return None
    return best


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for one family of comparisons (Holm, 1979); nan is skipped."""
    order = sorted((i for i, p in enumerate(p_values) if isfinite(p)), key=lambda i: p_values[i])
    adjusted = [nan] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def power(seeds: float, sd: float, gap: float, confidence: float = CONFIDENCE) -> float:
    """Return the probability that a paired t test over `seeds` seeds detects a true difference.

    Args:
        sd: standard deviation of one seed's difference.
        gap: the true difference.
    """
    shift = abs(gap) / sd * sqrt(seeds)
    critical = t_quantile(seeds - 1, confidence)
    bounds = critical * _chi_quantiles(seeds - 1)
    return float(np.mean(special.ndtr(shift - bounds) + special.ndtr(-bounds - shift)))


@cache
def _chi_quantiles(dof: float) -> np.ndarray:
    """Return 2000 equally likely values of sqrt(chi2 / dof).

    Averaging over them replaces scipy's noncentral t, which fails for few degrees of freedom and
    large shifts.
    """
    return np.sqrt(2 * special.gammaincinv(dof / 2, (np.arange(2000) + 0.5) / 2000) / dof)


def seeds_needed(sd: float, gap: float, confidence: float = CONFIDENCE) -> int | None:
    """Return the fewest paired seeds that detect `gap` with 80 % power, None above a thousand.

    See `power` for the arguments.
    """
    if not (isfinite(sd) and isfinite(gap)) or gap == 0:
        return None
    if sd == 0:
        return 2
    quantiles = special.ndtri((1 + confidence) / 2) + special.ndtri(POWER)
    # A normal test needs no more seeds than the t test.
    fewest = max(2, int((quantiles * sd / gap) ** 2))
    counts = range(fewest, MOST_SEEDS + 1)
    return next((n for n in counts if abs(gap) / sd >= _detectable(n, confidence)), None)


def _detectable(seeds: int, confidence: float) -> float:
    """Smallest difference that seeds detect with 80 % power, in standard deviations of a seed's."""
    if seeds <= FEW_SEEDS:
        return _detectable_shift(seeds, confidence) / sqrt(seeds)
    return float(_shift_of_many(confidence)(1 / seeds)) / sqrt(seeds)


@cache
def _shift_of_many(confidence: float) -> Chebyshev:
    """`_detectable_shift` by 1 / seeds, which is smooth above FEW_SEEDS: 11 roots, not 960."""

    def shifts(inverse: np.ndarray) -> list[float]:
        return [_detectable_shift(1 / share, confidence) for share in inverse]

    return Chebyshev.interpolate(shifts, 10, domain=[1 / MOST_SEEDS, 1 / FEW_SEEDS])


@cache
def _detectable_shift(seeds: float, confidence: float) -> float:
    """Detectable difference in standard errors of the mean; `seeds` need not be whole."""
    from scipy import optimize  # takes half a second to import, and few commands need it

    def missing(shift: float) -> float:
        return power(seeds, 1.0, shift / sqrt(seeds), confidence) - POWER

    return optimize.brentq(missing, 0.0, 10 * t_quantile(seeds - 1, confidence))
