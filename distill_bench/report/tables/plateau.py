"""Decides from the score curves of a row if its training has reached a plateau."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from distill_bench.report.results import Column, Results
from distill_bench.report.rows import Row
from distill_bench.report.stats import Interval, mean_interval

REACHED, MOVING, UNCLEAR, NOT_JUDGED = "reached", "moving", "unclear", "not judged"
RULE = {"window": 1 / 3, "tolerance": 1.0}  # of results that are older than the rule


@dataclass(frozen=True)
class Change:
    """Change of a score over the last part of training, over the seeds of a row."""

    column: Column
    interval: Interval | None  # of the mean change; None with fewer than two seeds
    noise: float  # standard deviation over seeds of the score at the end
    tolerance: float  # in units of the noise

    @property
    def verdict(self) -> str:
        """One of the four verdicts.

        `reached`: the interval lies within the tolerance. `moving`: it excludes 0, and the mean is
        outside. `unclear`: neither. `not judged`: without two seeds.
        """
        if self.interval is None:
            return NOT_JUDGED
        limit = self.tolerance * self.noise
        low, high = self.interval.low, self.interval.high
        if max(abs(low), abs(high)) <= limit:
            return REACHED
        if abs(self.interval.mean) > limit and (low > 0 or high < 0):
            return MOVING
        return UNCLEAR


def plateau(results: Results, row: Row) -> str:
    """The verdict on a row: `moving` if any headline score is, `reached` if all scores are."""
    verdicts = {change.verdict for change in changes(results, row)} - {NOT_JUDGED}
    if not verdicts:
        return NOT_JUDGED
    if MOVING in verdicts:
        return MOVING
    return UNCLEAR if UNCLEAR in verdicts else REACHED


@cache  # several tables and the page ask for it
def changes(results: Results, row: Row) -> list[Change]:
    """Change of every headline score over the window of the sweep's rule."""
    rule = RULE | (results.manifest.get("plateau") or {})
    return [
        _change(column, row.curves(column.name), rule["window"], rule["tolerance"])
        for column in results.headline
    ]


def _change(
    column: Column,
    curves: Mapping[Hashable, tuple[np.ndarray, np.ndarray]],
    window: float,
    tolerance: float,
) -> Change:
    """Largest mean change between an evaluated update of the window, or its start, and the end.

    The start alone would not show a score that first falls and then rises again.

    Args:
        curves: training seed -> evaluated student updates, ascending, and scores at them.
        window: share of the training, from its end. A curve that starts later is not judged.
        tolerance: in units of the standard deviation over seeds.
    """
    start = (1 - window) * max((updates[-1] for updates, _ in curves.values()), default=0.0)
    known = [c for c in curves.values() if c[0][0] <= start < c[0][-1]]
    if len(known) < 2:
        return Change(column, None, float("nan"), tolerance)
    last = [float(scores[-1]) for _, scores in known]
    places = {start, *(u for updates, _ in known for u in updates[:-1] if u > start)}
    moved = [
        mean_interval([end - float(np.interp(u, *c)) for end, c in zip(last, known, strict=True)])
        for u in sorted(places)
    ]
    largest = max(moved, key=lambda interval: abs(interval.mean))
    return Change(column, largest, float(np.std(last, ddof=1)), tolerance)


def plateau_caption(results: Results) -> str:
    """The rule in words, and the rows that are still moving."""
    rule = RULE | (results.manifest.get("plateau") or {})
    share, limit = rule["window"], rule["tolerance"]
    text = (
        f"Plateau: the largest change of each headline score over the last {share:.0%} of the "
        f"training, with its 95 % interval (Student's t over seeds), against {limit:g} times the "
        "standard deviation over seeds at the end. reached: every interval lies within; moving: "
        "for some score the interval excludes 0 and the mean lies outside; unclear: neither; not "
        "judged: fewer than two seeds, or no checkpoint was evaluated before that part."
    )
    moving = [row.label for row in results.students if plateau(results, row) == MOVING]
    return f"{text} Still moving: {'; '.join(moving)}." if moving else text
