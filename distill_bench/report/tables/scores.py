"""Tables of a study as cells of text, shared by page, Markdown, LaTeX and terminal."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import floor, isfinite, log10, nan

import numpy as np

from distill_bench.report.labels import key_title, show_value, symbols
from distill_bench.report.results import COSTS, Column, Results
from distill_bench.report.rows import COST, Row
from distill_bench.report.stats import CONFIDENCE, Interval, clear_winner, mean_interval
from distill_bench.report.tables.differences import (
    MOST_ROWS,
    Difference,
    against_baseline,
    compared_pairs,
    comparisons,
)
from distill_bench.report.tables.plateau import plateau, plateau_caption
from distill_bench.sample.reference_kinds import ELSEWHERE

CAPTION = (
    "Mean ± half of the 95 % interval. Intervals are a bootstrap over training seeds and clips if "
    "the score has one value per clip, else Student's t over seeds; for references they are over "
    "clips. A row with one seed has no interval. Bold: the paired differences to all other rows "
    "exclude 0 at 95 % together, and no row lost a run."
)


def score_caption(results: Results) -> str:
    """Caption of `score_table`, with the symbols that the labels of its rows use."""
    explained = symbols(results.swept)
    caption = f"{CAPTION} {plateau_caption(results)}"
    return f"{caption} {explained}." if explained else caption


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    key: float = nan  # sort key; nan: sort by the text
    best: bool = False
    marks: tuple[int, ...] = ()  # numbers of footnotes


@dataclass(frozen=True)
class Table:
    """Column heads, and the cells of every row."""

    heads: list[str]
    lines: list[tuple[Row, list[Cell]]]


def score_table(results: Results, columns: Sequence[Column]) -> Table:
    """All rows at the end of training: count of runs, then the given columns."""
    best = {column.name: winner(results, column) for column in columns}
    heads = [*row_heads(results), "seeds", "plateau", *(column.heading for column in columns)]
    lines = []
    for row in results.rows:
        cells = [*_row_cells(results, row), Cell(row.count, row.done)]
        cells.append(Cell("—" if row.reference else plateau(results, row)))
        for column in columns:
            interval = results.interval(row, column.name)
            marks = tuple(results.marks(row, column.name))
            cell = _interval_cell(interval, row is best[column.name], marks)
            if interval and not row.reference and interval.n < row.done:
                cell = replace(cell, text=f"{cell.text} ({interval.n} of {row.done} seeds)")
            if row.role == ELSEWHERE and column in COSTS:
                cell = Cell("trained elsewhere")
            cells.append(cell)
        lines.append((row, cells))
    return Table(heads, lines)


def row_heads(results: Results) -> list[str]:
    """Heads of the columns that identify a row."""
    return ["method", key_title(results.axis)] if results.axis else ["method"]


def _row_cells(results: Results, row: Row) -> list[Cell]:
    if not results.axis:
        return [Cell(row.label)]
    return [
        Cell(row.series),
        Cell(show_value(row.at, results.axis), float(row.at) if row.at else nan),
    ]


def _interval_cell(
    interval: Interval | None, best: bool = False, marks: tuple[int, ...] = ()
) -> Cell:
    return Cell(show_interval(interval), interval.mean if interval else nan, best, marks)


@cache  # several tables ask for it
def winner(results: Results, column: Column) -> Row | None:
    """Return the row that is clearly best in a score, if any.

    No row wins if any row lost a run, because the surviving seeds are a biased sample.
    """
    rows = results.students
    scores = [row.by_seed(column.name) for row in rows]
    if any(len(of_row) < len(row.runs) for row, of_row in zip(rows, scores, strict=True)):
        return None
    place = clear_winner(scores, column.better, results.manifest["prompts"])
    return None if place is None else rows[place]


def footnotes_of(results: Results, table: Table) -> list[tuple[int, str]]:
    """Return the footnotes that a table's cells refer to, with their numbers."""
    marks = {mark for _, cells in table.lines for cell in cells for mark in cell.marks}
    texts = enumerate((text for text, _ in results.footnotes), 1)
    return [(number, text) for number, text in texts if number in marks]


def show_interval(interval: Interval | None, separator: str = " ± ", sign: str = "") -> str:
    """Format as `112.3 ± 4.0`, with two significant digits for the half width.

    Without an interval, the mean has three significant digits.
    """
    if interval is None:
        return "—"
    # a set scored against itself gives 0 up to rounding
    if abs(interval.mean) < 5e-7 and not interval.half >= 5e-7:
        return "0"
    # values that are equal up to rounding have no spread
    half = interval.half if interval.half > 1e-9 * abs(interval.mean) else nan
    scale = half if isfinite(half) else abs(interval.mean) / 10
    decimals = min(6, max(0, 1 - floor(log10(scale)))) if scale > 0 else 0
    mean = f"{interval.mean:{sign},.{decimals}f}"
    return f"{mean}{separator}{half:,.{decimals}f}" if half > 0 else mean


# --- at equal cost ---


def budget(results: Results, rows: Sequence[Row] | None = None) -> float | None:
    """Training cost at which rows are compared, in forward equivalents.

    The requested cost, else the largest that every finished run reaches, if any run is finished.
    Runs from whose students others start do not count among all students: they end before the
    others begin.

    Args:
        rows: the compared rows; None: all students.
    """
    if results.manifest["budget"] is not None:
        return results.manifest["budget"]
    initial = results.manifest.get("initial_runs", [])
    last = [row for row in results.students if not row.runs["run_id"].isin(initial).all()]
    costs = [float(row.scored[COST].min()) for row in rows or last]
    return min(filter(isfinite, costs), default=None)


def equal_cost(results: Results) -> Table:
    """Student rows at one training cost; scores are interpolated between checkpoints."""
    cost = budget(results)
    columns = results.headline
    heads = [*row_heads(results), "seeds", "student updates"]
    heads += [column.heading for column in columns]
    lines = []
    for row in results.students:
        updates = _at_cost(row, "student_updates", cost)
        scores = [_at_cost(row, column.name, cost) for column in columns]
        count = max(map(len, scores), default=0)
        seeds = str(count)
        if count < len(row.runs):
            seeds += f"/{len(row.runs)} ({_why_absent(row, count, cost)})"
        mean = None
        if updates:
            mean = Interval(float(np.mean(list(updates.values()))), nan, nan, len(updates))
        cells = [*_row_cells(results, row), Cell(seeds, count), _interval_cell(mean)]
        for of_column in scores:
            interval = mean_interval(list(of_column.values())) if of_column else None
            cells.append(_interval_cell(interval))
        lines.append((row, cells))
    return Table(heads, lines)


def _at_cost(row: Row, column: str, cost: float | None) -> dict[Hashable, float]:
    return row.at_cost(column, cost) if cost else {}


def _why_absent(row: Row, count: int, cost: float | None) -> str:
    """Number of runs without a score at this cost, by reason."""
    reasons = [row.lost] if row.lost else []
    unevaluated = row.done - count
    points = row.checkpoints[row.checkpoints["run_id"].isin(row.scored["run_id"])]
    first = points.drop_duplicates("run_id")[COST].min()
    if unevaluated and cost and first > cost:
        reasons.append(f"{unevaluated} first evaluated at {first:,.0f}")
    elif unevaluated:
        reasons.append(f"{unevaluated} not evaluated around it")
    return ", ".join(reasons)


def equal_cost_caption(results: Results) -> str:
    """Caption of `equal_cost`."""
    cost = budget(results)
    if cost is None:
        return "No finished run has a training cost."
    origin = "the largest that every finished run reaches"
    if results.manifest.get("initial_runs"):
        origin += ", apart from runs from whose students others start"
    if results.manifest["budget"] is not None:
        origin = "as requested"
    return (
        f"All rows at a training cost of {cost:,.6g} forward equivalents, {origin}. Each run's "
        "score is interpolated linearly between its evaluated student updates. Mean ± half of the "
        "95 % interval (Student's t over seeds)."
    )


# --- differences ---


def equal_cost_differences(results: Results) -> Table | None:
    """Every other row minus the baseline at equal cost; None without rows to compare.

    Bold: p after Holm's correction is below 0.05.
    """
    cost = budget(results)
    baseline = results.baseline
    if cost is None or baseline is None or len(results.students) < 2:
        return None
    families = [against_baseline(results, column, baseline, cost) for column in results.headline]
    lines = []
    for by_column in zip(*families, strict=True):
        row = by_column[0][0].a
        seeds = max(difference.seeds for difference, _ in by_column)
        cells = [*_row_cells(results, row), Cell(str(seeds), seeds)]
        for difference, p in by_column:
            mean = difference.interval.mean if difference.interval else nan
            text = show_interval(difference.interval, sign="+")
            cells.append(Cell(text, mean, best=p < 1 - CONFIDENCE))
        lines.append((row, cells))
    heads = [*row_heads(results), "seeds", *(column.heading for column in results.headline)]
    return Table(heads, lines)


def equal_cost_differences_caption(results: Results) -> str:
    """Caption of `equal_cost_differences`."""
    cost = budget(results)
    counts = [
        comparisons([d for d, _ in against_baseline(results, column, results.baseline, cost)])
        for column in results.headline
    ]
    low, high = min(counts), max(counts)
    count = str(low) if low == high else f"{low} to {high}"
    return (
        f"Row minus {results.baseline.label} at {cost:,.6g} forward equivalents, paired by seed; "
        "Student's t over seeds. Bold: p is below 0.05 after Holm's correction over the rows of "
        f"one score ({count} comparisons per score). equal_cost_differences.csv has "
        f"{pairs_in_words(results)}, "
        "with p for these comparisons and for all pairs of one score."
    )


def pairs_in_words(results: Results) -> str:
    """The pairs that differences.csv has; see `compared_pairs`."""
    if len(results.students) > MOST_ROWS:
        return f"every pair with the baseline, as the sweep has more than {MOST_ROWS} rows"
    return "every pair"


def differences_caption(results: Results) -> str:
    """Caption of the differences to the baseline at the end of training."""
    pairs = len(compared_pairs(results))
    return (
        "Row minus baseline over the training seeds that both have, on the same prompts and noise. "
        "p is after Holm's correction over the comparisons of one score with the baseline; the "
        "head of the column gives their number. A row is favoured if p is below 0.05. "
        f"differences.csv has {pairs_in_words(results)}: its p_holm and favours are corrected over "
        "all pairs of one score, up to "
        f"{pairs:,}, and so are stricter; its p_holm_baseline is the p shown here."
    )


def holm_head(family: Sequence[tuple[Difference, float]]) -> str:
    """Heading of a column of p-values, with the number of comparisons."""
    return f"p (Holm over {comparisons([difference for difference, _ in family])})"


def show_p(p: float) -> str:
    """Format a p-value; "—" if there is none."""
    if not isfinite(p):
        return "—"
    if p < 0.001:
        return "<0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
