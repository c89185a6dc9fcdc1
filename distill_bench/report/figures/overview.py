"""Overview figure: every headline score against the axis of the sweep."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distill_bench.report.figures import canvas
from distill_bench.report.figures.looks import Looks
from distill_bench.report.figures.marks import FLOOR_LINE, log_from, mark_one, rows_across
from distill_bench.report.figures.study import Study, opened
from distill_bench.report.figures.style import STYLE
from distill_bench.report.results import Column

SLOT = 0.16  # offset between neighbouring series, in units of the distance between two places


@rc_context(STYLE)
def overview(results: Path | Study) -> Figure | None:
    """Draw one panel per headline score: mean and interval of every row, its runs as dots.

    Series stand side by side at each place of the axis; a control is half a step right of the line
    with the same colour. A row without a place is a horizontal line. For a distance, a dashed line
    marks the floor: the teacher against its own clips of other seeds.

    Returns:
        None if the sweep has no axis, or fewer than two places on it.
    """
    study = opened(results)
    columns = [c for c in study.results.headline if study.placed(c.name).value.notna().any()]
    if not columns or len(study.places) < 2:
        return None
    wide = min(len(columns), 2)
    tall = -(-len(columns) // wide)
    figure = Figure(figsize=(3.7 * wide, 0.4 + 2.5 * tall))
    panels = list(figure.subplots(tall, wide, squeeze=False).flat)
    for axes, column in zip(panels, columns, strict=False):
        _panel(axes, study, column)
    for axes in panels[len(columns) :]:
        axes.set_axis_off()
    figure.supxlabel(study.axis_title)
    entries = study.looks.legend(row.series for row in study.drawn)
    if any(study.floor(column) is not None for column in columns):
        entries.append(Line2D([], [], **FLOOR_LINE, label="floor: teacher against its other seeds"))
    spare = panels[len(columns)] if len(panels) > len(columns) and len(entries) <= 12 else None
    canvas.legend(figure, entries, spare)
    return figure


def _panel(axes: Axes, study: Study, column: Column) -> None:
    """Draw one score."""
    looks, rows = study.looks, study.placed(column.name)
    offsets = _offsets(looks, list(dict.fromkeys(rows.series)))
    at = rows.place.map(study.places.index) + rows.series.map(offsets)
    rows = rows.assign(x=at.astype(float), colour=rows.series.map(looks.colour))
    runs = study.run_scores(column.name).merge(rows[["label", "x", "colour"]], on="label")
    dots = {"linestyle": "none", "marker": "o", "markersize": 2.4, "markeredgewidth": 0}
    for colour, line in runs.groupby("colour", sort=False):
        axes.plot(line.x, line.score, color=colour, alpha=0.4, zorder=1, **dots)
    for series, line in rows.groupby("series", sort=False):
        line = line.sort_values("x")
        axes.plot(line.x, line.value, **looks.styles[series])
    shown = [*runs.score, *rows.value, *rows_across(axes, study, column)]
    if (floor := study.floor(column)) is not None:
        axes.axhline(floor, **FLOOR_LINE, zorder=0)
        shown.append(floor)
    canvas.set_limits(axes.yaxis, shown, [*rows.low, *rows.high], log_from(column))
    canvas.interval_bars(axes, rows.x, rows.low, rows.high, rows.colour)
    mark_one(axes, column)
    axes.set_title(canvas.titled(column, 46))
    canvas.category_ticks(axes.xaxis, study.place_texts)
    axes.set_xlim(-0.5, len(study.places) - 0.5)
    axes.grid(axis="x", visible=False)


def _offsets(looks: Looks, series: Sequence[str]) -> dict[str, float]:
    """Horizontal offset of each series from its place on the axis."""
    lines = list(dict.fromkeys(looks.line_of.get(name, name) for name in series))
    step = min(SLOT, 0.8 / len(lines))
    middle = (len(lines) - 1) / 2
    shift = {name: 0.45 if name in looks.line_of else 0.0 for name in series}
    line = {name: lines.index(looks.line_of.get(name, name)) for name in series}
    return {name: step * (line[name] + shift[name] - middle) for name in series}
