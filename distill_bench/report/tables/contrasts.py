"""Estimates of the declared contrasts, with Holm's correction over these alone."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import isfinite, nan
from typing import Any

import numpy as np

from distill_bench.report.declarations import ADDED, CHANGED, FIRST, UNKNOWN
from distill_bench.report.results import COSTS, Column, Results
from distill_bench.report.rows import Row
from distill_bench.report.stats import CONFIDENCE, Interval, crossed_interval, holm, weighted_sum
from distill_bench.report.tables.differences import scores_at
from distill_bench.report.tables.scores import Cell, budget, show_interval, show_p

NOTES = {FIRST: "", ADDED: "added later", CHANGED: "changed later", UNKNOWN: "unknown"}


@dataclass(frozen=True)
class Estimate:
    """A contrast in one score, paired over the seeds that all its rows have."""

    contrast: Mapping[str, Any]  # entry of sweep.json
    column: Column
    interval: Interval | None  # None without a common seed
    expected: int  # seeds that all its rows are to have
    sd: float  # standard deviation of one seed's contrast
    clip_error: float  # part of the standard error that more seeds do not reduce
    level: float  # mean score of its rows
    p_holm: float = nan
    comparisons: int = 0  # estimates that Holm's correction is over

    @property
    def p(self) -> float:
        return self.interval.p if self.interval else nan

    @property
    def clear(self) -> bool:
        """True if p after Holm's correction is below 0.05."""
        return self.p_holm < 1 - CONFIDENCE

    @property
    def later(self) -> bool:
        """True if the contrast was added or changed after the first run."""
        return self.contrast["declared"] in (ADDED, CHANGED)

    @property
    def seeds(self) -> int:
        return self.interval.n if self.interval else 0


def estimates(results: Results) -> list[Estimate]:
    """Every contrast in each of its scores, in the order of the sweep file.

    Holm's correction of a contrast that was declared before the first run is over these contrasts
    alone; that of a contrast added or changed later is over all.
    """
    known = {column.name: column for column in [*results.columns, *COSTS]}
    drafts = [
        _estimate(results, contrast, known.get(name) or Column(name, name))
        for contrast in results.contrasts
        for name in contrast["scores"]
    ]
    first = iter(_corrected([estimate for estimate in drafts if not estimate.later]))
    return [estimate if estimate.later else next(first) for estimate in _corrected(drafts)]


def _corrected(family: Sequence[Estimate]) -> list[Estimate]:
    """The estimates with Holm's correction over them."""
    p_values = [estimate.p for estimate in family]
    count = sum(map(isfinite, p_values))
    return [
        replace(estimate, p_holm=p, comparisons=count)
        for estimate, p in zip(family, holm(p_values), strict=True)
    ]


def _estimate(results: Results, contrast: Mapping[str, Any], column: Column) -> Estimate:
    terms = contrast["terms"]
    rows = [_row_of(results, term["runs"]) for term in terms]
    seeds = [_seeds(results, term["runs"]) for term in terms]
    expected = set.intersection(*seeds)
    at_end = contrast["at"] == "end"
    cost = None if at_end else budget(results, rows)
    scores = [scores_at(row, column, cost) if at_end or cost else {} for row in rows]
    common = [s for s in scores[0] if s in expected and all(s in of_row for of_row in scores)]
    if not common:
        return Estimate(contrast, column, None, len(expected), nan, 0.0, nan)
    scores = [{seed: of_row[seed] for seed in common} for of_row in scores]
    values = weighted_sum([term["weight"] for term in terms], scores)
    lengths = {len(clips) for of_row in scores for clips in of_row.values()}
    interval = crossed_interval(values, clusters=results.clusters(lengths))
    sd = float(values.mean(1).std(ddof=1)) if len(common) > 1 else nan
    clip_variance = interval.error**2 - sd**2 / len(common) if values.shape[1] > 1 else 0.0
    clip_error = max(0.0, clip_variance) ** 0.5 if isfinite(clip_variance) else 0.0
    level = float(np.mean([of_row[seed].mean() for of_row in scores for seed in common]))
    return Estimate(contrast, column, interval, len(expected), sd, clip_error, level)


def _row_of(results: Results, runs: Sequence[str]) -> Row:
    return next(row for row in results.students if runs[0] in set(row.runs["run_id"]))


def _seeds(results: Results, runs: Sequence[str]) -> set[Hashable]:
    return set(results.runs.loc[results.runs["run_id"].isin(runs), "seed"])


def sides(results: Results, contrast: Mapping[str, Any]) -> str:
    """The contrast in words: "SGMD, ODE minus SGMD, renoise", by the labels of its rows."""
    if contrast.get("difference_of"):
        first, second = contrast["difference_of"]
        return f"({first}) − ({second})"
    parts = []
    for sign in (1, -1):
        terms = [term for term in contrast["terms"] if sign * term["weight"] > 0]
        labels = [_row_of(results, term["runs"]).label for term in terms]
        parts.append(labels[0] if len(labels) == 1 else f"mean of ({'; '.join(labels)})")
    return " − ".join(parts)


def contrast_heads(found: Sequence[Estimate]) -> list[str]:
    """Heads of the table of contrasts, with the number of comparisons of Holm's correction."""
    counts = sorted({estimate.comparisons for estimate in found})
    return [
        "contrast",
        "score",
        "seeds",
        "difference",
        f"p (Holm over {' or '.join(map(str, counts))})",
        "declared",
    ]


def contrast_cells(estimate: Estimate) -> list[Cell]:
    """One line of the table of contrasts; bold: p after Holm's correction is below 0.05."""
    contrast, count = estimate.contrast, str(estimate.seeds)
    named = contrast["at"] != "equal_cost" or "equal cost" in contrast["name"]
    at = "" if named else " (at equal cost)"
    if estimate.seeds < estimate.expected:
        count = f"{count}/{estimate.expected}"
    difference = estimate.interval.mean if estimate.interval else nan
    return [
        Cell(f"{contrast['name']}{at}"),
        Cell(estimate.column.title),
        Cell(count, estimate.seeds),
        Cell(show_interval(estimate.interval, sign="+"), difference, best=estimate.clear),
        Cell(show_p(estimate.p_holm), estimate.p_holm),
        Cell(NOTES[contrast["declared"]] or "before the runs"),
    ]


def contrast_lines(found: Sequence[Estimate]) -> list[list[Cell]]:
    """Lines of the table of contrasts, each contrast named in the first of its lines only."""
    lines = [contrast_cells(estimate) for estimate in found]
    for line, (before, estimate) in zip(lines[1:], pairwise(found), strict=True):
        if before.contrast is estimate.contrast:
            line[0] = Cell("")
    return lines


def by_contrast(found: Sequence[Estimate]) -> tuple[list[str], list[dict[str, Estimate]]]:
    """Titles of all scores, and for each contrast its estimates by the title of their score."""
    titles = list(dict.fromkeys(estimate.column.title for estimate in found))
    groups = groupby(found, key=lambda estimate: id(estimate.contrast))
    return titles, [{one.column.title: one for one in group} for _, group in groups]


def contrast_grid(found: Sequence[Estimate]) -> tuple[list[str], list[list[Cell]]]:
    """Heads and lines of a table with one line per contrast and one column per score.

    Bold: p after Holm's correction is below 0.05. A column says which contrasts were declared
    after the first run, if any was.
    """
    titles, contrasts = by_contrast(found)
    when = any(NOTES[estimate.contrast["declared"]] for estimate in found)
    lines = []
    for of_score in contrasts:
        cells = {title: contrast_cells(estimate) for title, estimate in of_score.items()}
        first = next(iter(cells.values()))
        counts = dict.fromkeys(line[2].text for line in cells.values())
        differences = [cells[title][3] if title in cells else Cell("—") for title in titles]
        lines.append([first[0], Cell(", ".join(counts)), *differences, *first[5:][:when]])
    return ["contrast", "seeds", *titles, *["declared"][:when]], lines


def contrasts_caption(results: Results) -> str:
    """Caption of the table of contrasts: how it is computed, and since when it is declared."""
    return (
        "Contrasts that the sweep file declares: the first rows minus the second, paired over the "
        "training seeds that all rows have, on the same prompts and noise; ± is half of the 95 % "
        "interval (bootstrap over seeds and clips if the score has one value per clip, else "
        "Student's t over seeds). p is of no difference, after Holm's correction over the "
        "contrasts and scores that were declared before the first run; for contrasts added or "
        f"changed later, over all. Bold: p is below 0.05. {declaration(results)} Every other "
        "comparison is exploratory."
    )


def declaration(results: Results) -> str:
    """Sentences on the sweep file at the first run, and on what changed since."""
    launch = results.manifest.get("launch")
    if launch is None:
        return (
            "The store has no record of the sweep file at its first run: it is unknown when these "
            "contrasts were declared."
        )
    text = f"Sweep file at the first launch ({launch['time']}): SHA-256 {launch['digest'][:12]}."
    if launch["last_digest"] != launch["digest"]:
        text += f" At the newest launch: {launch['last_digest'][:12]}."
    if launch["begun"]:
        text += (
            f" {launch['begun']} of its runs had begun before: it is unknown whether the contrasts "
            "were declared without knowing their scores."
        )
    if launch["dropped"]:
        text += f" Declared once, and no longer in the file: {', '.join(launch['dropped'])}."
    return text
