"""Figures with one line per row of the table: scores, and differences to the baseline."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_bench.report.figures import canvas
from distill_bench.report.figures.marks import REACH, log_from
from distill_bench.report.figures.study import Study, opened
from distill_bench.report.figures.style import GROUND, QUIET, SMALL, STYLE
from distill_bench.report.labels import shortened, show_value
from distill_bench.report.results import Column, Results
from distill_bench.report.rows import Row
from distill_bench.report.tables.differences import against_baseline, verdict

LETTER = 0.075  # inches of a letter in a row's name
REFERENCE = {"marker": "d", "color": QUIET, "linestyle": "none"}


@rc_context(STYLE)
def every_row(source: Path | Results | Study) -> Figure | None:
    """Draw one panel per headline score: mean and interval of every row, its runs as dots below.

    References are diamonds. A reference far from the runs becomes a number at the border, so that
    it does not stretch the axis.
    """
    study = opened(source)
    shown = [*study.results.references, *study.listed]
    scores = {column: study.means(column.name, shown) for column in study.results.headline}
    scores = {column: rows for column, rows in scores.items() if rows.value.notna().any()}
    if not scores:
        return None
    figure, panels = line_panels(shown, len(scores), study.axis)
    for axes, (column, rows) in zip(panels, scores.items(), strict=False):
        _score_panel(axes, study, column, rows)
    return figure


def _score_panel(axes: Axes, study: Study, column: Column, rows: pd.DataFrame) -> None:
    """Draw one score of `every_row`."""
    rows = rows.assign(line=range(len(rows)))
    _dash(axes, rows[rows.value.isna()].line)
    rows = rows[rows.value.notna()]
    students, references = rows[~rows.reference], rows[rows.reference]
    runs = study.run_scores(column.name).merge(students[["label", "line", "series"]], on="label")
    dots = {"linestyle": "none", "marker": "o", "markersize": 2, "markeredgewidth": 0, "alpha": 0.5}
    for series, line in runs.groupby("series", sort=False):
        colour = study.looks.colour(series)
        axes.plot(line.score, line.line + 0.3, color=colour, zorder=1, **dots)
    for series, line in students.groupby("series", sort=False):
        axes.plot(line.value, line.line, **study.looks.styles[series] | {"linestyle": "none"})
    ends = [*students.low, *students.high]
    canvas.set_limits(axes.xaxis, [*runs.score, *students.value], ends, log_from(column))
    _draw_references(axes, references, bounded=not students.empty)
    colours = [study.looks.colour(series) for series in students.series]
    bars = (students.line, students.low, students.high, colours)
    canvas.interval_bars(axes, *bars, upright=False)
    axes.set_title(canvas.titled(column, 26))
    if axes.get_xscale() != "log":
        axes.locator_params("x", nbins=4)


def _draw_references(axes: Axes, references: pd.DataFrame, bounded: bool) -> None:
    """Draw the references of a panel; `bounded`: runs have set the limits of its axis."""
    reach = REACH[axes.get_xscale()]
    fractions = references.value.map(lambda value: canvas.axis_fraction(axes.xaxis, value))
    near = fractions.between(-reach, 1 + reach) | (not bounded)
    if bounded:
        canvas.extend_limits(axes.xaxis, list(references.value[near]))
    axes.plot(references.value[near], references.line[near], **REFERENCE)
    note = {"xycoords": ("axes fraction", "data"), "color": QUIET, "fontsize": SMALL}
    for row in references[~near].itertuples():
        number = canvas.brief(row.value)
        if fractions[row.Index] > 1:
            axes.annotate(f"{number} ▸", (0.98, row.line), ha="right", va="center", **note)
        else:
            axes.annotate(f"◂ {number}", (0.02, row.line), ha="left", va="center", **note)


@rc_context(STYLE)
def draw_differences(source: Path | Results | Study) -> Figure | None:
    """Draw one panel per headline score: the paired difference of every row to the baseline.

    Markers are filled where p after Holm's correction is below 0.05.
    """
    study = opened(source)
    baseline = study.results.baseline
    if baseline is None:
        return None
    others = [row for row in study.listed if row is not baseline]
    families = {}
    for column in study.results.headline:
        compared = against_baseline(study.results, column, baseline)
        family = [(difference, p) for difference, p in compared if difference.a in others]
        if any(difference.interval for difference, _ in family):
            families[column] = family
    if not families:
        return None
    figure, panels = line_panels(others, len(families), study.axis)
    for axes, (column, family) in zip(panels, families.items(), strict=False):
        axes.axvline(0, color=QUIET, linewidth=1)
        _dash(axes, [i for i, (difference, _) in enumerate(family) if difference.interval is None])
        lines = [
            (difference.a.series, bool(verdict(difference, p)), line, interval.mean, interval.half)
            for line, (difference, p) in enumerate(family)
            if (interval := difference.interval)
        ]
        names = ["series", "clear", "line", "mean", "half"]
        for (series, clear), marks in pd.DataFrame(lines, columns=names).groupby(names[:2]):
            style = study.looks.styles[series] | {"linestyle": "none", "capsize": 2.5}
            style["markerfacecolor"] = style["color"] if clear else GROUND
            halves = marks.half.fillna(0)
            axes.errorbar(marks["mean"], marks.line, xerr=halves, **style, elinewidth=1)
        axes.set_title(canvas.titled(column, 26))
        axes.locator_params("x", nbins=4)
    figure.supxlabel(f"difference to {baseline.label}")
    return figure


def line_panels(rows: Sequence[Row], count: int, axis: str) -> tuple[Figure, list[Axes]]:
    """Make `count` panels with one line per row; only the first row of a series has its name."""
    wide = canvas.panels_per_line(count)
    tall = -(-count // wide)
    labels = [
        _line_label(row, before, axis) for row, before in zip(rows, [None, *rows], strict=False)
    ]
    names = max(2.2, LETTER * max(map(len, labels)))
    figure = Figure(figsize=(names + 2.4 * wide, tall * (0.9 + 0.2 * len(rows))))
    panels = list(figure.subplots(tall, wide, sharey=True, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    name_lines(panels[:count], labels)
    return figure, panels


def name_lines(panels: Sequence[Axes], names: Sequence[str]) -> None:
    """Give panels that share their y axis a line per name, the first on top."""
    for axes in panels:
        axes.tick_params("y", length=0)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)


def _line_label(row: Row, before: Row | None, axis: str) -> str:
    """Series and place of a row; only the place if the row above has the same series."""
    series = shortened(row.series, 44)
    if not row.at:
        return series
    place = show_value(row.at, axis).rjust(4, "\u2007")  # figure spaces align the places
    repeated = before is not None and before.series == row.series
    return place if repeated else f"{series}  {place}"


def _dash(axes: Axes, lines: Sequence[int]) -> None:
    """Write a dash at the left border of lines without a value."""
    for line in lines:
        place = {"xycoords": ("axes fraction", "data")}
        axes.annotate("—", (0.02, line), **place, color=QUIET, va="center")
