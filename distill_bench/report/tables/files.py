"""The table files of `results/<name>` as text: CSV for machines, Markdown and LaTeX for readers."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import pandas as pd

from distill_bench.report.csv_files import cells, csv_text
from distill_bench.report.results import COSTS, Results
from distill_bench.report.rows import COST, Row
from distill_bench.report.stats import Interval, holm, mean_interval
from distill_bench.report.tables.contrasts import estimates, sides
from distill_bench.report.tables.differences import (
    GAPS,
    compared_pairs,
    comparisons,
    differences,
    seeds_for_gaps,
    verdict,
)
from distill_bench.report.tables.latex import latex_contrasts, latex_table
from distill_bench.report.tables.markdown import markdown
from distill_bench.report.tables.plateau import changes, plateau
from distill_bench.report.tables.scores import (
    budget,
    equal_cost,
    equal_cost_caption,
    score_caption,
    score_table,
    winner,
)
from distill_bench.sample.reference_kinds import STUDENT

PARTS = ("mean", "low", "high", "n")  # of an interval, in CSV files


def table_files(results: Results) -> dict[str, str]:
    """Return the text of each table file, by file name. It depends only on the data files."""
    scores = score_table(results, results.headline + COSTS)
    at_cost = equal_cost(results)
    caption = equal_cost_caption(results)
    return _contrast_files(results) | {
        "table.csv": csv_text(_score_frame(results)),
        "equal_cost.csv": csv_text(_equal_cost_frame(results)),
        "differences.csv": csv_text(_difference_frame(results)),
        "equal_cost_differences.csv": csv_text(_equal_cost_difference_frame(results)),
        "plateau.csv": csv_text(_plateau_frame(results)),
        "seeds_needed.csv": csv_text(_seeds_needed_frame(results)),
        "table.md": markdown(results, scores, at_cost),
        "table.tex": latex_table(results, scores, "", score_caption(results)),
        "equal_cost.tex": latex_table(results, at_cost, "-equal-cost", caption),
    }


def _contrast_files(results: Results) -> dict[str, str]:
    """contrasts.csv and contrasts.tex, if the sweep declares contrasts."""
    found = estimates(results)
    if not found:
        return {}
    lines = []
    for estimate in found:
        contrast, interval = estimate.contrast, estimate.interval
        line = {
            "contrast": contrast["name"],
            "column": estimate.column.name,
            "at": contrast["at"],
            "rows": sides(results, contrast),
            "seeds": estimate.seeds,
            "expected": estimate.expected,
            "p": _six_digits(estimate.p),
            "p_holm": _six_digits(estimate.p_holm),
            "comparisons": estimate.comparisons,
            "sd": _six_digits(estimate.sd),
            "declared": contrast["declared"],
            "since": contrast["since"],
        }
        if interval:
            line["difference"] = _six_digits(interval.mean)
            line["low"], line["high"] = _six_digits(interval.low), _six_digits(interval.high)
        lines.append(line)
    header = "contrast column at rows seeds expected difference low high p p_holm comparisons sd"
    return {
        "contrasts.csv": csv_text(cells(lines, [*header.split(), "declared", "since"])),
        "contrasts.tex": latex_contrasts(results, found),
    }


# --- CSV ---


def _score_frame(results: Results) -> pd.DataFrame:
    """Mean and interval of every score and cost per row, with the number of runs per state."""
    columns = results.columns + COSTS
    states = results.runs.loc[results.runs["role"] == STUDENT, "status"]
    states = list(dict.fromkeys(["done", "collapsed", "failed", *states]))
    best = {column.name: winner(results, column) for column in columns}
    lines = []
    for row in results.rows:
        counts = row.runs["status"].value_counts()
        line = _identity(row) | {"reference": int(row.reference)}
        line |= {state: counts.get(state, 0) for state in states} | {"done": row.done}
        line["plateau"] = "" if row.reference else plateau(results, row)
        for column in columns:
            line |= _interval_parts(column.name, results.interval(row, column.name))
        line["clear_best"] = " ".join(name for name, top in best.items() if top is row)
        lines.append(line)
    header = ["label", "method", *results.swept, "reference", "expected", *states, "plateau"]
    header += _part_names([column.name for column in columns])
    return cells(lines, [*header, "clear_best"])


def _equal_cost_frame(results: Results) -> pd.DataFrame:
    """Mean and interval of every headline score per row at one training cost."""
    cost = budget(results)
    names = ["student_updates", *(column.name for column in results.headline)]
    lines = []
    for row in results.students if cost else []:
        line = _identity(row) | {COST: _six_digits(cost)}
        for name in names:
            scores = row.at_cost(name, cost)
            line |= _interval_parts(name, mean_interval(list(scores.values()))) if scores else {}
        lines.append(line)
    header = ["label", "method", *results.swept, COST, "expected"]
    return cells(lines, header + _part_names(names))


def _difference_frame(results: Results) -> pd.DataFrame:
    """Differences of all pairs of student rows at the end of training."""
    lines = _difference_lines(results, None)
    return cells(lines, _difference_header("seeds_needed"))


def _equal_cost_difference_frame(results: Results) -> pd.DataFrame:
    """Differences of all pairs of student rows at one training cost."""
    cost = budget(results)
    lines = _difference_lines(results, cost) if cost is not None else []
    return cells([line | {COST: _six_digits(cost)} for line in lines], _difference_header(COST))


def _difference_header(last: str) -> list[str]:
    header = "column a b seeds expected difference low high p p_holm favours comparisons"
    return [*header.split(), "p_holm_baseline", "comparisons_baseline", last]


def _difference_lines(results: Results, cost: float | None) -> list[dict[str, Any]]:
    """Describe the pairs of `compared_pairs`.

    Holm's correction is per score, for two families of comparisons. `p_holm` and `favours` are over
    all of them (`comparisons` pairs). `p_holm_baseline` is over the pairs with the baseline
    (`comparisons_baseline` pairs), as in table.md and on the page.
    """
    pairs, baseline = compared_pairs(results), results.baseline
    seeds = {row: set(row.runs["seed"]) for row in results.students}
    lines = []
    for column in results.headline:
        family = differences(results, column, pairs, cost)
        to_baseline = [difference for difference in family if difference.b is baseline]
        p_baseline = iter(holm([difference.p for difference in to_baseline]))
        adjusted = holm([difference.p for difference in family])
        count, count_baseline = comparisons(family), comparisons(to_baseline)
        for difference, p in zip(family, adjusted, strict=True):
            a, b, interval = difference.a, difference.b, difference.interval
            line = {
                "column": column.name,
                "a": a.label,
                "b": b.label,
                "seeds": difference.seeds,
                "expected": len(seeds[a] & seeds[b]),
                "p": _six_digits(difference.p),
                "p_holm": _six_digits(p),
                "favours": verdict(difference, p),
                "comparisons": count,
                "seeds_needed": difference.needed,
            }
            if interval:
                line["difference"] = _six_digits(interval.mean)
                line["low"] = _six_digits(interval.low)
                line["high"] = _six_digits(interval.high)
            if b is baseline:
                line["p_holm_baseline"] = _six_digits(next(p_baseline))
                line["comparisons_baseline"] = count_baseline
            lines.append(line)
    return lines


def _plateau_frame(results: Results) -> pd.DataFrame:
    """Change of every headline score over the last part of training, per row, with a verdict."""
    lines = [
        {
            "label": row.label,
            "column": change.column.name,
            "seeds": change.interval.n if change.interval else 0,
            "change": _six_digits(change.interval.mean) if change.interval else "",
            "low": _six_digits(change.interval.low) if change.interval else "",
            "high": _six_digits(change.interval.high) if change.interval else "",
            "noise": _six_digits(change.noise),
            "tolerance": change.tolerance,
            "verdict": change.verdict,
        }
        for row in results.students
        for change in changes(results, row)
    ]
    header = "label column seeds change low high noise tolerance verdict"
    return cells(lines, header.split())


def _seeds_needed_frame(results: Results) -> pd.DataFrame:
    """Seeds needed to detect a difference of each size in GAPS, per headline score."""
    gaps = [f"gap_{gap:.0%}".rstrip("%") for gap in GAPS]
    lines = []
    for column, mean, sd, needed in seeds_for_gaps(results):
        line = {
            "column": column.name,
            "baseline": results.baseline.label,
            "mean": _six_digits(mean),
            "sd_of_differences": _six_digits(sd),
        }
        lines.append(line | dict(zip(gaps, needed, strict=True)))
    return cells(lines, ["column", "baseline", "mean", "sd_of_differences", *gaps])


def _identity(row: Row) -> dict[str, Any]:
    """Cells that identify a row, and the number of its runs."""
    return row.keys | {"label": row.label, "expected": len(row.runs)}


def _part_names(columns: Sequence[str]) -> list[str]:
    return [f"{column}_{part}" for column in columns for part in PARTS]


def _interval_parts(column: str, interval: Interval | None) -> dict[str, Any]:
    if interval is None:
        return {}
    return {
        f"{column}_mean": _six_digits(interval.mean),
        f"{column}_low": _six_digits(interval.low),
        f"{column}_high": _six_digits(interval.high),
        f"{column}_n": interval.n,
    }


def _six_digits(value: float) -> str:
    """Format with six digits, which do not depend on the order of summation; "" for nan."""
    return f"{value:.6g}" if isfinite(value) else ""
