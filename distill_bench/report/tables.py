"""The tables of results/<name>, each a pure function of its data files: scores, equal cost, paired differences, seeds needed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor, isfinite, log10, nan, sqrt
from typing import Any

import numpy as np

from distill_bench.report.gather import write_csv
from distill_bench.report.results import COST, COSTS, Column, Results, Row, cells, show
from distill_bench.report.stats import (
    CONFIDENCE,
    Interval,
    clear_winner,
    crossed_interval,
    holm,
    losses,
    mean_interval,
    paired,
    seeds_needed,
)

GAPS = (0.05, 0.1, 0.25, 0.5)  # of the baseline's mean, in the table of seeds needed
CAPTION = (
    "Mean ± half of the 95 % interval: a bootstrap over training seeds and clips where clips have a score each, Student's t over "
    "seeds where not; references over clips; no interval where there is one seed. {bold} only where the paired difference to "
    "every other row excludes 0 at 95 % together and no run was lost."
)


def tables(results: Results) -> dict[str, str]:
    """The text of every table file by name."""
    headed = results.main + COSTS
    return {
        "table.csv": _table_csv(results),
        "equal_cost.csv": _equal_cost_csv(results),
        "differences.csv": _differences_csv(results),
        "equal_cost_differences.csv": _differences_csv(
            results, budget(results), at_equal_cost=True
        ),
        "seeds_needed.csv": _seeds_needed_csv(results),
        "table.md": _markdown(results),
        "table.tex": _tex(results, table(results, headed), "", CAPTION.format(bold="Bold")),
        "equal_cost.tex": _tex(
            results, equal_cost(results), "-equal-cost", equal_cost_caption(results)
        ),
    }


# --- cells ---


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table, and what it is sorted by."""

    text: str
    key: float = nan
    best: bool = False
    marks: tuple[int, ...] = ()  # footnotes


@dataclass(frozen=True)
class Table:
    """Heads and, for every row, its cells; the same for page, Markdown and LaTeX."""

    heads: list[str]
    lines: list[tuple[Row, list[Cell]]]


def table(results: Results, columns: Sequence[Column]) -> Table:
    """The rows with their counts and the given columns, at the end of training."""
    best = {column.column: _winner(results, column) for column in columns}
    heads = [*_row_heads(results), "seeds", *(column.heading for column in columns)]
    lines = []
    for row in results.rows:
        line = [*_row_cells(results, row), Cell(row.count, row.done)]
        for column in columns:
            interval = results.interval(row, column.column)
            marks = tuple(results.marks(row, column.column))
            cell = _cell(interval, row is best[column.column], marks)
            if interval and not row.reference and interval.n < row.done:
                cell = replace(cell, text=f"{cell.text} ({interval.n} of {row.done} seeds)")
            line.append(cell)
        lines.append((row, line))
    return Table(heads, lines)


def _row_heads(results: Results) -> list[str]:
    return ["method", results.axis] if results.axis else ["method"]


def _row_cells(results: Results, row: Row) -> list[Cell]:
    """Names sort as text, so they have no key."""
    if not results.axis:
        return [Cell(row.label)]
    return [
        Cell(row.series),
        Cell(show(row.at) if row.at else "—", float(row.at) if row.at else nan),
    ]


def _cell(interval: Interval | None, best: bool = False, marks: tuple[int, ...] = ()) -> Cell:
    return Cell(show_interval(interval), interval.mean if interval else nan, best, marks)


def _winner(results: Results, column: Column) -> Row | None:
    rows = results.students
    values = [row.by_seed(column.column) for row in rows]
    winner = clear_winner(values, column.better, _clusters(results, values))
    # where a row lost runs nobody wins: the seeds that survived are not a sample of all, and what is not there cannot be beaten
    whole = all(
        row.complete and len(found) == len(row.runs)
        for row, found in zip(rows, values, strict=True)
    )
    return rows[winner] if winner is not None and whole else None


def _clusters(results: Results, rows: Sequence[dict[str, np.ndarray]]) -> list[int] | None:
    prompts = results.about["prompts"]
    lengths = {len(values) for row in rows for values in row.values()}
    return prompts if prompts is not None and lengths == {len(prompts)} else None


def show_interval(interval: Interval | None, separator: str = " ± ", sign: str = "") -> str:
    """`112 ± 4`, with two significant digits of the half width; without a spread three digits of the value."""
    if interval is None:
        return "—"
    if (
        abs(interval.mean) < 5e-7 and not interval.half >= 5e-7
    ):  # of rounding, where a set is held against itself
        return "0"
    half = (
        interval.half if interval.half > 1e-9 * abs(interval.mean) else nan
    )  # equal up to rounding: no spread
    scale = half if isfinite(half) else abs(interval.mean) / 10
    decimals = min(6, max(0, 1 - floor(log10(scale)))) if scale > 0 else 0
    mean = f"{interval.mean:{sign},.{decimals}f}"
    return f"{mean}{separator}{half:,.{decimals}f}" if half > 0 else mean


# --- at equal cost ---


def budget(results: Results) -> float | None:
    """The cost of the equal-cost table: the one asked for, else the largest that every finished run reaches."""
    if results.about["budget"] is not None:
        return results.about["budget"]
    reached = [run.value(COST) for run in results.runs if run.scored]
    return min((cost for cost in reached if cost is not None), default=None)


def at_cost(row: Row, column: str, cost: float) -> dict[str, float]:
    """The row's scores at a cost, by seed."""
    found = {run.seed: run.at_cost(column, cost) for run in row.runs if run.scored}
    return {seed: value for seed, value in found.items() if value is not None}


def equal_cost(results: Results) -> Table:
    """Every row at one training cost: each run's score between its evaluated student updates."""
    cost = budget(results)
    heads = [
        *_row_heads(results),
        "seeds",
        "student updates",
        *(column.heading for column in results.main),
    ]
    lines = []
    for row in results.students:
        line = _row_cells(results, row)
        found = {
            column.column: at_cost(row, column.column, cost) if cost else {}
            for column in results.main
        }
        count = max(map(len, found.values()), default=0)
        reason = "" if count == len(row.runs) else f" ({_why_absent(row, count, cost)})"
        line.append(Cell(f"{count}/{len(row.runs)}{reason}" if reason else str(count), count))
        updates = at_cost(row, "student_updates", cost) if cost else {}
        line.append(
            _cell(
                Interval(float(np.mean(list(updates.values()))), nan, nan, len(updates))
                if updates
                else None
            )
        )
        line += [
            _cell(mean_interval(list(found[c.column].values())) if found[c.column] else None)
            for c in results.main
        ]
        lines.append((row, line))
    return Table(heads, lines)


def equal_cost_differences(results: Results) -> Table | None:
    """Every other row minus the baseline at that cost, bold where p after Holm is below 0.05; None where nothing compares."""
    cost, baseline = budget(results), results.baseline
    if cost is None or baseline is None or len(results.students) < 2:
        return None
    families = [against_baseline(results, column, baseline, cost) for column in results.main]
    lines = []
    for of_row in zip(*families, strict=True):
        row = of_row[0][0].a
        cells = [
            Cell(str(max(each.seeds for each, _ in of_row)), max(each.seeds for each, _ in of_row))
        ]
        for each, p in of_row:
            mean = each.interval.mean if each.interval else nan
            cells.append(
                Cell(show_interval(each.interval, sign="+"), mean, best=p < 1 - CONFIDENCE)
            )
        lines.append((row, [*_row_cells(results, row), *cells]))
    return Table(
        [*_row_heads(results), "seeds", *(column.heading for column in results.main)], lines
    )


def equal_cost_differences_caption(results: Results) -> str:
    counts = [
        comparisons([e for e, _ in against_baseline(results, c, results.baseline, budget(results))])
        for c in results.main
    ]
    return (
        f"Row minus {results.baseline.label} at {budget(results):,.6g} forward equivalents, paired by seed, Student's t over "
        f"seeds. Bold where p is below 0.05 after Holm over the rows of one score ({_range(counts)} comparisons a score). Every "
        "pair and every p, under this family and under that of all pairs of one score, is in equal_cost_differences.csv."
    )


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _why_absent(row: Row, count: int, cost: float | None) -> str:
    """Which runs have no score at the cost, and why."""
    states = [run.status for run in row.runs if not run.scored]
    parts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    bare = row.done - count
    firsts = [
        run.checkpoints[0][COST]
        for run in row.runs
        if run.scored and run.checkpoints and COST in run.checkpoints[0]
    ]
    if bare and cost and firsts and min(firsts) > cost:
        parts.append(f"{bare} first evaluated at {min(firsts):,.0f}")
    elif bare:
        parts.append(f"{bare} not evaluated around it")
    return ", ".join(parts)


def equal_cost_caption(results: Results) -> str:
    cost = budget(results)
    if cost is None:
        return "No finished run says what it cost."
    origin = (
        "as asked for"
        if results.about["budget"] is not None
        else "the largest that every finished run reaches"
    )
    return (
        f"All rows at a training cost of {cost:,.6g} forward equivalents, {origin}: each run's score on a straight line "
        "between its evaluated student updates. Mean ± half of the 95 % t interval over seeds."
    )


# --- differences ---


@dataclass(frozen=True)
class Difference:
    """Row a minus row b in one column, over the seeds that both have."""

    column: Column
    a: Row
    b: Row
    interval: Interval | None  # None where no seed is in both
    p: float  # of no difference; of equal distance to 1 where 1 is best
    favours: Row | None  # by sign alone; see `p`
    sd: float  # of one seed's difference

    @property
    def seeds(self) -> int:
        return self.interval.n if self.interval else 0

    @property
    def needed(self) -> int | None:
        """Seeds that see a difference of this size with 80 % power."""
        return seeds_needed(self.sd, self.interval.mean) if self.interval else None


def difference(
    results: Results, column: Column, a: Row, b: Row, cost: float | None = None
) -> Difference:
    """Paired: both rows were sampled on the same prompts, noise and training seeds; at the end of training, or at a cost."""
    mine, theirs = (
        row.by_seed(column.column) if cost is None else _cost_values(row, column, cost)
        for row in (a, b)
    )
    if not mine.keys() & theirs.keys():
        return Difference(column, a, b, None, nan, None, nan)
    values = paired(mine, theirs)
    clusters = _clusters(results, [mine, theirs]) if values.shape[1] > 1 else None
    interval = crossed_interval(values, clusters=clusters)
    sd = float(values.mean(1).std(ddof=1)) if len(values) > 1 else nan
    judged, favours = interval, None
    if column.better:
        judged = interval
        if column.better == "one":
            judged = crossed_interval(paired(losses(mine, "one"), losses(theirs, "one")))
        gain = judged.mean if column.better == "higher" else -judged.mean
        favours = a if gain > 0 else b if gain < 0 else None
    return Difference(column, a, b, interval, judged.p, favours, sd)


def _cost_values(row: Row, column: Column, cost: float) -> dict[str, np.ndarray]:
    """One value a seed: between student updates there are no clips, so the interval is Student's t over seeds."""
    return {seed: np.array([value]) for seed, value in at_cost(row, column.column, cost).items()}


def against_baseline(
    results: Results, column: Column, baseline: Row, cost: float | None = None
) -> list[tuple[Difference, float]]:
    """Every other student row minus the baseline, with p adjusted (Holm) for this family."""
    found = [
        difference(results, column, row, baseline, cost)
        for row in results.students
        if row is not baseline
    ]
    return list(zip(found, holm([each.p for each in found]), strict=True))


def comparisons(found: Sequence[Difference]) -> int:
    """How many of the differences have a p: what Holm corrects for."""
    return sum(isfinite(each.p) for each in found)


def verdict(each: Difference, p: float) -> str:
    """The label of the row that the evidence favours, "" where it favours none."""
    return each.favours.label if each.favours and p < 1 - CONFIDENCE else ""


def cost_ratio(a: Row, b: Row, column: str) -> float | None:
    """How many times what b costs a costs."""
    mine, theirs = ([float(v.mean()) for v in row.by_seed(column).values()] for row in (a, b))
    return (
        float(np.mean(mine) / np.mean(theirs)) if mine and theirs and np.mean(theirs) > 0 else None
    )


def spread_of_differences(results: Results, column: Column, baseline: Row) -> float | None:
    """Standard deviation of one seed's difference to the baseline, pooled over rows."""
    rows = [each for each, _ in against_baseline(results, column, baseline) if isfinite(each.sd)]
    dof = sum(each.seeds - 1 for each in rows)
    return sqrt(sum((each.seeds - 1) * each.sd**2 for each in rows) / dof) if dof else None


def seeds_for_gaps(results: Results) -> list[tuple[Column, float, float, list[int | None]]]:
    """For each headline score: the baseline's mean, the pooled sd of differences, and the seeds that each of GAPS needs."""
    baseline = results.baseline
    lines = []
    for column in results.main if baseline else []:
        interval, sd = (
            results.interval(baseline, column.column),
            spread_of_differences(results, column, baseline),
        )
        if interval and sd and interval.mean:
            lines.append(
                (column, interval.mean, sd, [seeds_needed(sd, gap * interval.mean) for gap in GAPS])
            )
    return lines


# --- files ---


def _parts(name: str, interval: Interval | None) -> dict[str, Any]:
    if interval is None:
        return {}
    parts = {f"{name}_mean": _g(interval.mean), f"{name}_n": interval.n}
    return parts | (
        {f"{name}_low": _g(interval.low), f"{name}_high": _g(interval.high)}
        if isfinite(interval.low)
        else {}
    )


def _g(value: float | None) -> str:
    """Six digits: what a sum in another order does not change."""
    return "" if value is None or not isfinite(value) else f"{value:.6g}"


def _table_csv(results: Results) -> str:
    columns = results.columns + COSTS
    states = list(
        dict.fromkeys(["done", "collapsed", "failed", *(run.status for run in results.runs)])
    )
    parts = [
        f"{column.column}_{part}" for column in columns for part in ("mean", "low", "high", "n")
    ]
    header = [
        "label",
        "method",
        *results.about["swept"],
        "reference",
        "expected",
        *states,
        *parts,
        "clear_best",
    ]
    best = {column.column: _winner(results, column) for column in columns}
    lines = []
    for row in results.rows:
        line = dict(cells(row)) | {
            "label": row.label,
            "reference": int(row.reference),
            "expected": len(row.runs),
        }
        line |= {state: sum(run.status == state for run in row.runs) for state in states} | {
            "done": row.done
        }
        for column in columns:
            line |= _parts(column.column, results.interval(row, column.column))
        line["clear_best"] = " ".join(name for name, winner in best.items() if winner is row)
        lines.append(line)
    return write_csv(header, lines)


def _equal_cost_csv(results: Results) -> str:
    cost = budget(results)
    names = [column.column for column in results.main]
    parts = [
        f"{name}_{part}"
        for name in ["student_updates", *names]
        for part in ("mean", "low", "high", "n")
    ]
    lines = []
    for row in results.students if cost else []:
        line = dict(cells(row)) | {"label": row.label, COST: _g(cost), "expected": len(row.runs)}
        for name in ["student_updates", *names]:
            values = list(at_cost(row, name, cost).values())
            line |= _parts(name, mean_interval(values)) if values else {}
        lines.append(line)
    return write_csv(["label", "method", *results.about["swept"], COST, "expected", *parts], lines)


def _differences_csv(
    results: Results, cost: float | None = None, at_equal_cost: bool = False
) -> str:
    """Every pair of student rows, the baseline always subtracted; at the end of training, or all at one cost.

    Two families of comparisons, each of one column: `p_holm` (and `favours`) is over all pairs, `comparisons` of them;
    `p_holm_baseline` over the pairs with the baseline alone, as in table.md and report.html, `comparisons_baseline` of them.
    """
    header = [
        "column",
        "a",
        "b",
        "seeds",
        "expected",
        "difference",
        "low",
        "high",
        "p",
        "p_holm",
        "favours",
    ]
    header += [
        "comparisons",
        "p_holm_baseline",
        "comparisons_baseline",
        COST if at_equal_cost else "seeds_needed",
    ]
    rows, baseline, lines = results.students, results.baseline, []
    if at_equal_cost and cost is None:  # no run says what it cost
        return write_csv(header, [])
    pairs = [
        (a, b) if a is not baseline else (b, a) for i, b in enumerate(rows) for a in rows[i + 1 :]
    ]
    for column in results.main:
        found = [difference(results, column, a, b, cost) for a, b in pairs]
        to_baseline = [each for each in found if each.b is baseline]
        p_baseline, counts = (
            iter(holm([each.p for each in to_baseline])),
            (comparisons(found), comparisons(to_baseline)),
        )
        for each, p in zip(found, holm([each.p for each in found]), strict=True):
            expected = len({run.seed for run in each.a.runs} & {run.seed for run in each.b.runs})
            line = {
                "column": column.column,
                "a": each.a.label,
                "b": each.b.label,
                "seeds": each.seeds,
                "expected": expected,
            }
            if each.interval:
                line |= {
                    "difference": _g(each.interval.mean),
                    "low": _g(each.interval.low),
                    "high": _g(each.interval.high),
                }
            line |= {
                "p": _g(each.p),
                "p_holm": _g(p),
                "favours": verdict(each, p),
                "comparisons": counts[0],
            }
            line |= {COST: _g(cost)} if at_equal_cost else {"seeds_needed": each.needed}
            if each.b is baseline:
                line |= {"p_holm_baseline": _g(next(p_baseline)), "comparisons_baseline": counts[1]}
            lines.append(line)
    return write_csv(header, lines)


def _seeds_needed_csv(results: Results) -> str:
    header = [
        "column",
        "baseline",
        "mean",
        "sd_of_differences",
        *(f"gap_{gap:.0%}".rstrip("%") for gap in GAPS),
    ]
    lines = []
    for column, mean, sd, needed in seeds_for_gaps(results):
        counts = dict(zip(header[4:], needed, strict=True))
        about = {
            "column": column.column,
            "baseline": results.baseline.label,
            "mean": _g(mean),
            "sd_of_differences": _g(sd),
        }
        lines.append(about | counts)
    return write_csv(header, lines)


def _markdown(results: Results) -> str:
    parts = [results.question] if results.question else []
    found = table(results, results.main + COSTS)
    parts += ["## At the end of training", _markdown_table(found), CAPTION.format(bold="Bold")]
    parts += [f"[{i}] {text}." for i, text in _notes(results, found)]
    parts += [f"Note: {note}." for note in results.about["notes"]]
    parts += ["## At equal cost", _markdown_table(equal_cost(results)), equal_cost_caption(results)]
    baseline, apart = results.baseline, equal_cost_differences(results)
    if apart:
        parts += [f"## At equal cost: difference to {baseline.label}", _markdown_table(apart)]
        parts += [equal_cost_differences_caption(results)]
    for column in results.main if baseline and len(results.students) > 1 else []:
        found = against_baseline(results, column, baseline)
        lines = [["row", "seeds", "difference", holm_head(found), "favours", "cost"]]
        for each, p in found:
            ratio = cost_ratio(each.a, baseline, COST)
            lines.append(
                [
                    each.a.label,
                    str(each.seeds),
                    show_interval(each.interval, sign="+"),
                    show_p(p),
                    verdict(each, p) or "neither",
                    f"{ratio:.2f} x" if ratio else "—",
                ]
            )
        parts += [f"## {column.heading}: difference to {baseline.label}", _pipes(lines)]
    if baseline and len(results.students) > 1:
        parts.append(differences_caption(results))
    parts.append(
        "From "
        + ", ".join(f"{key} {value}" for key, value in results.about["provenance"].items())
        + "."
    )
    return "\n\n".join(parts) + "\n"


def holm_head(found: Sequence[tuple[Difference, float]]) -> str:
    """The head of a column of p, which names its family."""
    return f"p (Holm over {comparisons([each for each, _ in found])})"


def differences_caption(results: Results) -> str:
    pairs = len(results.students) * (len(results.students) - 1) // 2
    return (
        "Row minus baseline over the training seeds that both have, on the same prompts and noise. p is after Holm over the rows "
        "of one score, each against the baseline: as many as the head of its column says. A row is favoured where p is below "
        "0.05. Every pair is in differences.csv: its p_holm and favours are after Holm over all pairs of one score, up to "
        f"{pairs:,}, and so stricter; its p_holm_baseline is the p here."
    )


def show_p(p: float) -> str:
    return (
        "—" if not isfinite(p) else "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
    )


def _notes(results: Results, found: Table) -> list[tuple[int, str]]:
    """The footnotes that cells of a table have, with their numbers on the page."""
    marks = {mark for _, line in found.lines for cell in line for mark in cell.marks}
    return [(i, text) for i, (text, _) in enumerate(results.footnotes, 1) if i in marks]


def _markdown_table(found: Table) -> str:
    lines = [found.heads]
    for _, line in found.lines:
        texts = [f"**{cell.text}**" if cell.best else cell.text for cell in line]
        lines.append(
            [
                text + "".join(f" [{m}]" for m in cell.marks)
                for text, cell in zip(texts, line, strict=True)
            ]
        )
    return _pipes(lines)


def _pipes(lines: Sequence[Sequence[str]]) -> str:
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(
        "| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in rows
    )


_TEX = {
    "\\": r"\textbackslash{}",
    "—": "--",
    "±": r"$\pm$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "→": r"$\rightarrow$",
    "²": r"$^2$",
    "·": r"$\cdot$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
} | {c: "\\" + c for c in "&%$#_{}"}


def tex(text: str) -> str:
    """Plain text as LaTeX."""
    return "".join(_TEX.get(c, c) for c in text)


TEX_PARTS = 45  # lines of tabulars that share a float
TEX_WIDTH = 337.0  # pt: the text of `article`, less what the widths below may lack
TEX_GAP = 6.0  # pt between columns


def _tex(results: Results, found: Table, label: str, caption: str) -> str:
    """Tabulars at a legible size: columns that the width of `article` does not hold follow below, under the same names."""
    heads = [_tex_head(text) for text in found.heads]
    lines = [[_tex_cell(cell) for cell in line] for _, line in found.lines]
    names = len(_row_heads(results))
    widths = [
        max(map(_tex_width, [*head.split(r"\\"), *(line[i] for line in lines)]))
        for i, head in enumerate(heads)
    ]
    parts: list[list[int]] = [[]]
    for i in range(names, len(heads)):
        if (
            parts[-1]
            and sum(widths[k] + TEX_GAP for k in [*range(names), *parts[-1], i]) > TEX_WIDTH
        ):
            parts.append([])
        parts[-1].append(i)
    rule = [
        i and not row.reference and found.lines[i - 1][0].reference
        for i, (row, _) in enumerate(found.lines)
    ]
    tabulars = []
    for part in parts:
        chosen = [*range(names), *part]
        shown = [f"{' & '.join(heads[i] for i in chosen)} \\\\", r"\midrule"]
        for line, ruled in zip(lines, rule, strict=True):
            shown += [r"\midrule"] * bool(ruled and len(shown) > 2)
            if any(line[i] != "--" for i in part):  # references cost nothing
                shown.append(f"{' & '.join(line[i] for i in chosen)} \\\\")
        form = "l" * names + "r" * len(part)
        tabulars.append(
            "\n".join(
                [
                    rf"\begin{{tabular}}{{{form}}}",
                    r"\toprule",
                    *shown,
                    r"\bottomrule",
                    r"\end{tabular}",
                ]
            )
        )
    together = len(parts) * len(lines) <= TEX_PARTS
    floats = ["\n\\par\\medskip\n".join(tabulars)] if together else tabulars
    notes = [f"{i}: {text}." for i, text in _notes(results, found)]
    name = re.sub("[^A-Za-z0-9]+", "-", results.name) + label
    whole = (
        rf"\caption{{{tex(' '.join([results.question, caption, *notes]).strip())}}}"
        + f"\n\\label{{tab:{name}}}\n"
    )
    captions = [whole] + [rf"\caption{{Table~\ref{{tab:{name}}}, continued.}}" + "\n"] * (
        len(floats) - 1
    )
    comments = [
        f"{key}: {value}" for key, value in results.about["provenance"].items()
    ] + results.about["notes"]
    head = "\n".join(f"% {text}" for text in [*_TEX_HINTS, *comments])
    size = f"\\footnotesize\n\\setlength{{\\tabcolsep}}{{{TEX_GAP / 2:g}pt}}\n"
    size += "\\renewcommand{\\arraystretch}{0.9}\n" * (
        len(lines) > 40
    )  # a page of article holds them and the caption
    return (
        head
        + "\n"
        + "".join(
            f"\\begin{{table}}\n\\centering\n{size}{above}\\smallskip\n{body}\n\\end{{table}}\n"
            for above, body in zip(captions, floats, strict=True)
        )
    )


_TEX_HINTS = (
    r"needs \usepackage{booktabs} and nothing else",
    r"columns are laid out for the text width of article, the further ones below under the same names; on a wider page, or in",
    r"\begin{landscape} of \usepackage{pdflscape}, tabulars can be joined",
)


def _tex_cell(cell: Cell) -> str:
    text = tex(cell.text).replace(" $\\pm$ ", r"\,$\pm$\,")
    text = rf"\textbf{{{text}}}" if cell.best else text
    return text + (f"$^{{{','.join(map(str, cell.marks))}}}$" if cell.marks else "")


def _tex_head(text: str) -> str:
    """A heading broken into lines of about a dozen letters."""
    lines = [""]
    for word in re.findall(r"\S+?_|\S+", text):  # also after underscores
        glue = "" if lines[-1].endswith("_") else " "
        if lines[-1] and len(lines[-1] + glue + word) > 13:
            lines.append(word)
        else:
            lines[-1] += (glue if lines[-1] else "") + word
    shown = [tex(line) for line in lines]
    return shown[0] if len(shown) == 1 else r"\shortstack{" + r"\\".join(shown) + "}"


def _tex_width(text: str) -> float:
    """About how wide LaTeX text is in pt at footnotesize, where a digit is 4.25."""
    plain = re.sub(r"\\(shortstack|textbf)\{|\\,|[{}$^]", "", text)
    plain = re.sub(r"\\[a-z]+", "m", plain).replace("\\", "")
    return sum(
        2.4 if c in "., filt[]" else 3.5 if c in "cers-" else 6.7 if c in "mwMWG=" else 4.25
        for c in plain
    )
