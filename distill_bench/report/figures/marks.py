"""Marks that several figures share: rows without a place, references, the line at 1."""

from itertools import cycle
from math import isnan

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from distill_bench.report.figures import canvas
from distill_bench.report.figures.study import Study
from distill_bench.report.figures.style import DASHES, QUIET
from distill_bench.report.results import Column
from distill_bench.sample.reference_kinds import COMPARED

FLOOR_LINE = {"color": QUIET, "linestyle": DASHES[1], "linewidth": 0.8}
REFERENCE_MARKERS = ["d", "*", "p", "h", "8"]
NO_BREAK = "\u00a0"
# fraction of its length by which an axis may grow for a reference, by scale
REACH = {"linear": 0.6, "log": 0.3}
MOST_REFERENCES = 14  # labels that fit into a margin


def log_from(column: Column) -> float:
    """Ratio of largest to smallest value above which the axis of a column is logarithmic."""
    return 30.0 if column.better in ("higher", "one") else 8.0


def mark_one(axes: Axes, column: Column) -> None:
    """Draw a dotted line at 1 if 1 is the best score."""
    if column.better == "one":
        axes.axhline(1, color=QUIET, linestyle=DASHES[2], zorder=0)


def rows_across(axes: Axes, study: Study, column: Column) -> list[float]:
    """Draw the rows without a place on the axis as lines with bands; returns their means."""
    rows = study.drawn_means(column.name)
    rows = rows[rows.place == ""]
    for row in rows.itertuples():
        style = study.looks.styles[row.series] | {"linestyle": DASHES[1], "clip_on": False}
        across = axes.get_yaxis_transform()
        line = {"markevery": [1], "label": row.series, "transform": across}
        axes.plot([0, 1], [row.value, row.value], **style, **line)
        if np.isfinite(row.low):
            band = {"color": style["color"], "alpha": 0.1, "linewidth": 0, "zorder": 0}
            axes.axhspan(row.low, row.high, **band)
    return list(rows.value)


def draw_references(axes: Axes, study: Study, x: Column, y: Column) -> tuple[list[Line2D], str]:
    """Draw the references that lie near the runs, and widen the axes for them.

    References with both columns are grey markers, one shape per role. References with y only are
    lines, labelled in the margin. Of more than MOST_REFERENCES, only the kinds that scores compare
    with are drawn.

    Returns:
        Legend entries of the markers, and a note on the references left out or too far away.
    """
    known = study.references(x.name, y.name)
    crowded = len(known) > MOST_REFERENCES
    references = known[known.label.isin(COMPARED)] if crowded else known
    near = _near(axes, references)
    lines, points = near[near.x.isna()], near[near.x.notna()]
    canvas.extend_limits(axes.xaxis, list(points.x))
    canvas.extend_limits(axes.yaxis, list(near.y))
    for value in lines.y:
        axes.axhline(value, color=QUIET, linestyle=DASHES[1], linewidth=0.6, alpha=0.7, zorder=0)
    canvas.margin_labels(axes, list(zip(lines.y, lines.label, strict=True)))
    roles = dict.fromkeys(row.role for row in study.results.references)
    markers = dict(zip(roles, cycle(REFERENCE_MARKERS)))
    entries = []
    for role, group in points.groupby("role", sort=False):
        style = {"color": QUIET, "marker": markers[role], "markersize": 6, "linestyle": "none"}
        axes.plot(group.x, group.y, **style, zorder=1)
        names = ", ".join(group.sort_values("x").label)  # from left to right
        label = names if names == role else f"{role}: {names}"
        entries.append(Line2D([], [], **style, label=canvas.wrapped(label, 64)))
    far = references.drop(near.index).sort_values("y")
    texts = [_coordinates(point.label, point.x, point.y) for point in far.itertuples()]
    notes = [
        f"{len(known) - len(references)} further references are in the table" if crowded else "",
        f"off the axes: {', '.join(texts)}" if texts else "",
    ]
    return entries, "; ".join(filter(None, notes))


def _near(axes: Axes, references: pd.DataFrame) -> pd.DataFrame:
    """References that fit if the axes grow by at most `REACH`."""
    inside = pd.Series(True, index=references.index)
    for axis, values in ((axes.xaxis, references.x), (axes.yaxis, references.y)):
        reach = REACH[axis.get_scale()]
        fraction = values.map(lambda value, axis=axis: canvas.axis_fraction(axis, value))
        inside &= fraction.isna() | fraction.between(-reach, 1 + reach)
    return references[inside]


def _coordinates(label: str, x: float, y: float) -> str:
    values = canvas.brief(y) if isnan(x) else f"({canvas.brief(x)}, {canvas.brief(y)})"
    return f"{label} {values}".replace(" ", NO_BREAK)
