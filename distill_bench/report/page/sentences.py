"""Findings of a study in words; no claim goes beyond the intervals in the tables."""

from collections import Counter
from collections.abc import Sequence
from math import isfinite

from distill_bench.report.results import Column, Results
from distill_bench.report.rows import Row
from distill_bench.report.tables.contrasts import estimates
from distill_bench.report.tables.differences import against_baseline, verdict
from distill_bench.report.tables.scores import score_table, show_interval

MOST_LISTED = 5  # contrasts or rows in a sentence; tables have all
BEST = {"lower": "Lowest", "higher": "Highest", "one": "Nearest to 1"}


def findings(results: Results) -> list[str]:
    """Write sentences on the declared contrasts, the headline scores, and missing runs."""
    table = score_table(results, results.headline)
    first = len(table.heads) - len(results.headline)
    sentences, prefix = _declared(results), "Exploratory: " if results.contrasts else ""
    for place, column in enumerate(results.headline, first):
        rows = [
            (row, cells[place])
            for row, cells in table.lines
            if not row.reference and isfinite(cells[place].key)
        ]
        if column.better and len(rows) > 1:
            row, cell = min(rows, key=lambda pair: _distance(column, pair[1].key))
            clearly = "clearly ahead" if cell.best else "not clearly ahead"
            sentences.append(
                f"{prefix}{BEST[column.better]} in {column.title}: {row.label} with {cell.text}, "
                f"{clearly} of every other row. {_against_baseline(results, column)}"
            )
    incomplete = [row for row in results.students if not row.complete]
    if incomplete:
        sentences.append(f"Rows that do not have all their runs: {_counts(incomplete)}.")
    return sentences


def _counts(rows: Sequence[Row]) -> str:
    """Runs of each row, or, if the rows are many, number of rows with the same runs."""
    if len(rows) <= MOST_LISTED:
        return "; ".join(f"{row.label} {row.count}" for row in rows)
    counts = Counter(row.count for row in rows)
    return "; ".join(f"{number} rows have {count}" for count, number in counts.items())


def _declared(results: Results) -> list[str]:
    """Sentence on the declared contrasts: how many are clear of 0, and a few by name."""
    found = estimates(results)
    if not found:
        return []
    clear = [
        f"{one.contrast['name']} in {one.column.title} {show_interval(one.interval, sign='+')}"
        for one in found
        if one.clear
    ]
    listed = f": {'; '.join(clear)}" if 0 < len(clear) <= MOST_LISTED else ""
    count = f"{len(clear)} of {len(found)} declared comparisons"
    return [f"{count} are clear of 0 after Holm's correction{listed}."]


def _distance(column: Column, value: float) -> float:
    """Sort key of a score; smaller is better."""
    return {"lower": value, "higher": -value, "one": abs(value - 1)}[column.better]


def _against_baseline(results: Results, column: Column) -> str:
    """Sentence with the number of rows clearly better and clearly worse than the baseline."""
    baseline = results.baseline
    family = against_baseline(results, column, baseline)
    verdicts = [(difference, verdict(difference, p)) for difference, p in family]
    better = sum(favoured == difference.a.label for difference, favoured in verdicts)
    worse = sum(favoured == baseline.label for _, favoured in verdicts)
    if better or worse:
        return (
            f"{better} of {len(family)} rows clearly better and {worse} clearly worse than the "
            f"baseline {baseline.label}."
        )
    unfinished = "" if baseline.done else ", which has no finished run"
    return f"No row is clearly better or worse than the baseline {baseline.label}{unfinished}."
