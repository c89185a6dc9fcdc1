"""Scores during training."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_bench.report.figures import canvas
from distill_bench.report.figures.marks import log_from
from distill_bench.report.figures.study import UPDATES, Study, column_of, opened
from distill_bench.report.figures.style import SIZE, STYLE
from distill_bench.report.results import Column, Results
from distill_bench.report.rows import SCORED
from distill_bench.report.stats import t_quantile


@rc_context(STYLE)
def curves(source: Path | Results | Study, score: Column | str, x: Column | str) -> Figure | None:
    """Draw a score at the evaluated checkpoints over student updates or cost.

    One panel for each of `study.panels`. Lines are means over the finished runs of a row, bands
    their 95 % intervals over seeds (none for controls), crosses the last scores of collapsed runs.

    Returns:
        None if no run was evaluated before its end.
    """
    study = opened(source)
    score, x = column_of(study.results, score), column_of(study.results, x)
    points = study.checkpoints(x.name, score.name)
    if points.empty or points.groupby("run_id").size().max() < 2:
        return None
    panels = study.panels
    points = points[points.place.isin(list(panels))]
    wide = min(2, len(panels))
    tall = -(-len(panels) // wide)
    figure = Figure(figsize=(SIZE[0] if wide == 1 else 7.6, 0.5 + 2.3 * tall))
    grid = list(figure.subplots(tall, wide, sharey=True, squeeze=False).flat)
    means = _means(points)
    for axes, (place, title) in zip(grid, panels.items(), strict=False):
        _draw_means(axes, study, means[means.place == place])
        _draw_collapses(axes, study, points[points.place == place])
        axes.set_title(title)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    banded = means[~means.series.isin(list(study.looks.line_of))]
    ends = [*banded.low, *banded.high]
    canvas.set_limits(grid[0].yaxis, canvas.drawn_values(grid), ends, log_from(score))
    for axes, place in zip(grid, panels, strict=False):
        _draw_bands(axes, study, banded[banded.place == place])
    for axes in grid:
        axes.locator_params("x", nbins=5)
    figure.supxlabel(x.axis_label)
    figure.supylabel(canvas.titled(score, 28 if tall == 1 else 60))
    canvas.legend(figure, study.looks.legend(points.series))
    return figure


def _means(points: pd.DataFrame) -> pd.DataFrame:
    """Means and intervals at the checkpoints that every finished run of a row has.

    Columns: series, place, x, value, low, high.
    """
    runs = points[points.status.isin(SCORED)].groupby(["series", "place", UPDATES.name])
    frame = runs.agg(
        x=("x", "mean"),
        value=("y", "mean"),
        sd=("y", "std"),
        n=("y", "size"),
        of=("finished", "max"),
    ).reset_index()
    frame = frame[frame.n == frame.of]
    half = t_quantile(frame.n - 1) * frame.sd / np.sqrt(frame.n)
    frame = frame.assign(low=frame.value - half, high=frame.value + half)
    order = {series: i for i, series in enumerate(dict.fromkeys(points.series))}
    return frame.sort_values(
        ["series", "x"], key=lambda c: c.map(order) if c.name == "series" else c
    )


def _draw_means(axes: Axes, study: Study, means: pd.DataFrame) -> None:
    for series, line in means.groupby("series", sort=False):
        points = (line.x.to_numpy(), line.value.to_numpy())
        axes.plot(*points, **study.looks.styles[series], markersize=4)


def _draw_collapses(axes: Axes, study: Study, points: pd.DataFrame) -> None:
    for _, run in points[points.status == "collapsed"].groupby("run_id"):
        last = run.iloc[-1]
        colour = study.looks.colour(last.series)
        axes.plot(last.x, last.y, marker="x", color=colour, markersize=7, linestyle="none")


def _draw_bands(axes: Axes, study: Study, means: pd.DataFrame) -> None:
    """Draw intervals, clipped to the limits: a logarithmic axis cannot show ends below 0."""
    bottom, top = axes.get_ylim()
    ends = {side: means[side].fillna(means.value).clip(bottom, top) for side in ("low", "high")}
    for series, line in means.assign(**ends).groupby("series", sort=False):
        place = (line[key].to_numpy() for key in ("x", "low", "high"))
        axes.fill_between(*place, color=study.looks.colour(series), alpha=0.12, linewidth=0)
