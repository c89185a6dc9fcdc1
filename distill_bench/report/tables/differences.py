"""Paired differences between rows, which share prompts, noise and training seeds."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite, nan, sqrt

import numpy as np

from distill_bench.report.results import Column, Results
from distill_bench.report.rows import COST, Row
from distill_bench.report.stats import (
    CONFIDENCE,
    Interval,
    crossed_interval,
    holm,
    losses,
    paired,
    seeds_needed,
)

GAPS = (0.05, 0.1, 0.25, 0.5)  # fractions of the baseline's mean, for the table of seeds needed
MOST_ROWS = 100  # rows up to which all pairs are compared: pairs grow with the square of the rows
Scores = Mapping[Hashable, np.ndarray]  # training seed -> values


@dataclass(frozen=True)
class Difference:
    """Row a minus row b in one column, over the seeds that both have."""

    column: Column
    a: Row
    b: Row
    interval: Interval | None  # None without a common seed
    p: float  # p-value of no difference; if 1 is best, of equal distance to 1
    favours: Row | None  # better row by sign only; see `p` for significance
    sd: float  # standard deviation of the difference over seeds

    @property
    def seeds(self) -> int:
        return self.interval.n if self.interval else 0

    @property
    def needed(self) -> int | None:
        """Seeds that detect a difference of this size with 80 % power."""
        return seeds_needed(self.sd, self.interval.mean) if self.interval else None


def differences(
    results: Results,
    column: Column,
    pairs: Sequence[tuple[Row, Row]],
    cost: float | None = None,
) -> list[Difference]:
    """Return a minus b for each pair (a, b).

    Args:
        cost: compare at this training cost, forward equivalents; None: at the end of training.
    """
    rows = dict.fromkeys(row for pair in pairs for row in pair)
    scores = {row: scores_at(row, column, cost) for row in rows}
    # distances to 1 have other differences than the scores
    lost = {row: losses(scores[row], "one") for row in rows} if column.better == "one" else scores
    return [
        _difference(results, column, a, b, (scores[a], scores[b]), (lost[a], lost[b]))
        for a, b in pairs
    ]


def scores_at(row: Row, column: Column, cost: float | None) -> Scores:
    """Scores of a row at the end of training (cost: None), or at a training cost."""
    if cost is None:
        return row.by_seed(column.name)
    # no clips between checkpoints: one value per seed
    return {seed: np.array([value]) for seed, value in row.at_cost(column.name, cost).items()}


def _difference(
    results: Results,
    column: Column,
    a: Row,
    b: Row,
    scores: tuple[Scores, Scores],
    lost: tuple[Scores, Scores],
) -> Difference:
    """Difference from the scores of a and b, and from their losses if 1 is best."""
    if not scores[0].keys() & scores[1].keys():
        return Difference(column, a, b, None, nan, None, nan)
    paired_values = paired(*scores)
    clips = paired_values.shape[1]
    clusters = results.clusters({clips}) if clips > 1 else None
    interval = crossed_interval(paired_values, clusters=clusters)
    sd = float(paired_values.mean(1).std(ddof=1)) if len(paired_values) > 1 else nan
    if not column.better:
        return Difference(column, a, b, interval, interval.p, None, sd)
    loss = interval  # negative: a is better
    if column.better == "one":
        loss = crossed_interval(paired(*lost))
    gain = loss.mean if column.better == "higher" else -loss.mean
    favours = a if gain > 0 else b if gain < 0 else None
    return Difference(column, a, b, interval, loss.p, favours, sd)


def compared_pairs(results: Results) -> list[tuple[Row, Row]]:
    """Pairs of student rows in differences.csv: all, or above MOST_ROWS those with the baseline.

    In pairs with the baseline, it comes second: it is subtracted.
    """
    rows, baseline = results.students, results.baseline
    if len(rows) > MOST_ROWS:
        return [(row, baseline) for row in rows if row is not baseline]
    return [(b, a) if a is baseline else (a, b) for i, b in enumerate(rows) for a in rows[i + 1 :]]


@cache  # tables, page and figures ask for the same
def against_baseline(
    results: Results, column: Column, baseline: Row, cost: float | None = None
) -> list[tuple[Difference, float]]:
    """Return every other student row minus the baseline, with its Holm-adjusted p-value."""
    pairs = [(row, baseline) for row in results.students if row is not baseline]
    family = differences(results, column, pairs, cost)
    return list(zip(family, holm([difference.p for difference in family]), strict=True))


def comparisons(family: Sequence[Difference]) -> int:
    """Number of differences with a p-value, for which Holm corrects."""
    return sum(isfinite(difference.p) for difference in family)


def verdict(difference: Difference, p: float) -> str:
    """Label of the row that is significantly better; "" if neither is."""
    significant = p < 1 - CONFIDENCE
    return difference.favours.label if difference.favours and significant else ""


def cost_ratio(a: Row, b: Row) -> float | None:
    """Training cost of row a divided by that of row b; None if either is unknown."""
    means = []
    for row in (a, b):
        costs = [float(values.mean()) for values in row.by_seed(COST).values()]
        means.append(np.mean(costs) if costs else nan)
    return float(means[0] / means[1]) if isfinite(means[0]) and means[1] > 0 else None


def spread_of_differences(results: Results, column: Column, baseline: Row) -> float | None:
    """Standard deviation of one seed's difference to the baseline, pooled over rows."""
    family = [difference for difference, _ in against_baseline(results, column, baseline)]
    known = [difference for difference in family if isfinite(difference.sd)]
    dof = sum(difference.seeds - 1 for difference in known)
    squares = sum((difference.seeds - 1) * difference.sd**2 for difference in known)
    return sqrt(squares / dof) if dof else None


def seeds_for_gaps(results: Results) -> list[tuple[Column, float, float, list[int | None]]]:
    """Return the seeds needed to detect differences of each size in GAPS, per headline score.

    Each entry is the column, the baseline's mean, the pooled standard deviation of one seed's
    difference to the baseline, and the number of seeds for each gap.
    """
    baseline = results.baseline
    lines = []
    for column in results.headline if baseline else []:
        interval = results.interval(baseline, column.name)
        sd = spread_of_differences(results, column, baseline)
        if interval and sd and interval.mean:
            needed = [seeds_needed(sd, gap * interval.mean) for gap in GAPS]
            lines.append((column, interval.mean, sd, needed))
    return lines
