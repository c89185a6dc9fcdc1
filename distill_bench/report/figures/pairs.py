"""Figures of one column of runs.csv against another, such as a score against cost."""

from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distill_bench.report.figures import canvas
from distill_bench.report.figures.looks import marker_sizes
from distill_bench.report.figures.marks import draw_references, log_from, mark_one, rows_across
from distill_bench.report.figures.study import Study, column_of, find_column, opened
from distill_bench.report.figures.style import COLOURS, QUIET, SMALL, STYLE
from distill_bench.report.labels import shortened
from distill_bench.report.results import Column, Results

BESIDE = 0.012  # gap between series with the same x, as a fraction of the axis
BESIDE_ALONE = 0.08  # gap if all points of the figure have the same x
WIDE = (5.4, 3.4)  # inches; leaves a margin for the labels of references


def score_by_axis(source: Path | Results | Study, score: Column | str) -> Figure | None:
    """Draw a score against the axis of the sweep; None without an axis."""
    study = opened(source)
    return against(study, study.axis, score, "series") if study.axis else None


@rc_context(STYLE)
def against(
    source: Path | Results | Study, x: Column | str, y: Column | str, group: str = "method"
) -> Figure | None:
    """Draw one column of runs.csv against another: one marker per row, one colour per group.

    Rows of a series are joined; their markers grow along the axis of the sweep. If x is the axis of
    the sweep, rows without a place on it are horizontal lines. References are grey: markers if they
    have both columns, lines if they have y only.

    Args:
        group: column of runs.csv that sets the colours, or "series".

    Returns:
        None if no finished run has both columns.

    Raises:
        PlotError: if runs.csv has no such column.
    """
    study = opened(source)
    x, y = column_of(study.results, x), column_of(study.results, y)
    if group != "series":
        group = find_column(study.results, group)
    points = study.pairs(x.name, y.name, group)
    if points.empty:
        return None
    on_axis = x.name == study.axis
    points["colour"] = _colours(study, points, group)
    figure = Figure(figsize=WIDE)
    axes = figure.subplots()
    across = rows_across(axes, study, y) if on_axis else []
    x_ends = [*points.x_low, *points.x_high] if x.headline else []
    canvas.set_limits(axes.xaxis, points.x, x_ends, log_from(x))
    canvas.set_limits(
        axes.yaxis, [*points.y, *across], [*points.y_low, *points.y_high], log_from(y)
    )
    if on_axis and points.x.nunique() <= canvas.MOST_TICKS:
        ticks = sorted(points.x.unique())
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    moved = False
    if not (x.headline or on_axis):
        apart = _side_by_side(axes, points)
        moved = not apart.equals(points.x)
        points["x"] = apart
    mark_one(axes, y)
    reference_entries, far = draw_references(axes, study, x, y)
    sizes = {} if on_axis else marker_sizes(study.places)
    _draw_points(axes, study, points, sizes)
    canvas.interval_bars(axes, points.x, points.y_low, points.y_high, points.colour)
    if x.headline:
        bars = (points.y, points.x_low, points.x_high, points.colour)
        canvas.interval_bars(axes, *bars, upright=False)
    axes.set_xlabel(canvas.titled(x, 48))
    axes.set_ylabel(canvas.titled(y, 34))
    notes = [
        _sizes_text(study) if len(sizes) > 1 else "",
        f"series of the same {x.title.lower()} stand side by side" if moved else "",
        canvas.wrapped(far, 88),
    ]
    figure.supxlabel("\n".join(filter(None, notes)), fontsize=SMALL, color=QUIET)
    entries = _entries(study, points, group, bool(across)) + reference_entries
    if len(entries) > 1 or group == "series":
        canvas.legend(figure, entries, title=group if group not in ("method", "series") else None)
    return figure


def _draw_points(axes: Axes, study: Study, points: pd.DataFrame, sizes: dict[str, float]) -> None:
    """Draw the markers of every series, joined in the order of the axis."""
    for (_, series), line in points.groupby(["group", "series"], sort=False):
        order = [(*study.places, "").index(place) for place in line.place] if sizes else line.x
        line = line.assign(order=order).sort_values("order")
        style = study.looks.styles[series] | {"color": line.colour.iloc[0]}
        axes.plot(line.x, line.y, **style | {"marker": ""})
        axes.scatter(
            line.x,
            line.y,
            s=[sizes.get(place, STYLE["lines.markersize"]) ** 2 for place in line.place],
            marker=style["marker"],
            edgecolors=style["color"],
            facecolors=style.get("markerfacecolor", style["color"]),
            zorder=2,
        )


def _side_by_side(axes: Axes, points: pd.DataFrame) -> pd.Series:
    """Shift x values so that series with the same x stand side by side."""
    low, high = axes.get_xlim()
    alike = points.groupby(points.x.round(6)).series
    rank = alike.transform(lambda series: pd.factorize(series)[0])
    middle = (alike.transform("nunique") - 1) / 2
    step = BESIDE if points.x.nunique() > 1 else BESIDE_ALONE
    return points.x + step * (high - low) * (rank - middle)


def _colours(study: Study, points: pd.DataFrame, group: str) -> pd.Series:
    """Colour of every point, by series or by another group."""
    own = points.series.map(study.looks.colour)
    groups = list(dict.fromkeys(points.group))
    first = own.groupby(points.group).first()
    if group == "series":
        return own
    if first.nunique() == len(groups):
        return points.group.map(first)
    palette = {value: COLOURS[i % len(COLOURS)] for i, value in enumerate(groups)}
    return points.group.map(palette)


def _entries(study: Study, points: pd.DataFrame, group: str, across: bool) -> list[Line2D]:
    """Legend entries: one per series or one per group."""
    unplaced = study.looks.unplaced if across else []
    if group == "series":
        return study.looks.legend([*points.series, *unplaced])
    entries = []
    for value, line in points.groupby("group", sort=False):
        style = study.looks.styles[line.series.iloc[0]] | {"color": line.colour.iloc[0]}
        entries.append(Line2D([], [], **style, label=shortened(str(value), 44)))
    return entries + study.looks.legend(unplaced)


def _sizes_text(study: Study) -> str:
    """Note that explains the marker sizes."""
    places = study.place_texts
    if len(places) > canvas.MOST_TICKS:
        places = [*places[:2], "...", places[-1]]
    return f"small to large markers: {study.axis_title} {', '.join(places)}"
