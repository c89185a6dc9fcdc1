"""Figure of the ways in which each student is sampled."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distill_bench.report.figures import canvas
from distill_bench.report.figures.every_row import line_panels
from distill_bench.report.figures.marks import log_from
from distill_bench.report.figures.study import Study, opened
from distill_bench.report.figures.style import COLOURS, DASHES, GROUND, MARKERS, QUIET, STYLE
from distill_bench.report.labels import SAMPLING, is_sampling, name_value
from distill_bench.report.results import Column, Results
from distill_bench.report.rows import Row


@rc_context(STYLE)
def samplings(source: Path | Results | Study) -> Figure | None:
    """Draw one panel per headline score: a line per student, a marker per way of sampling it.

    Markers are filled where a student is sampled as it was trained.

    Returns:
        None if no student is sampled in a further way.
    """
    study = opened(source)
    columns = [
        column
        for column in study.results.headline
        if any(
            study.results.interval(row, column.name)
            for rows in study.listed_ways.values()
            for row in rows
        )
    ]
    if not columns:
        return None
    names = _way_names(study)
    looks = {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(dict.fromkeys(names.values()))
    }
    figure, panels = line_panels(list(study.listed_ways), len(columns), study.axis)
    for axes, column in zip(panels, columns, strict=False):
        _panel(axes, study, column, {row: looks[name] for row, name in names.items()})
    entries = [Line2D([], [], **look, linestyle="none", label=name) for name, look in looks.items()]
    hollow = {"marker": "o", "color": QUIET, "markerfacecolor": GROUND, "linestyle": "none"}
    entries.append(Line2D([], [], **hollow, label="hollow: trained otherwise"))
    canvas.legend(figure, entries)
    return figure


def _panel(axes: Axes, study: Study, column: Column, looks: dict[Row, dict]) -> None:
    """Draw one score."""
    drawn = [
        (line, row, interval)
        for line, (trained, ways) in enumerate(study.listed_ways.items())
        for row in (trained, *ways)
        if (interval := study.results.interval(row, column.name))
    ]
    ends = [end for _, _, interval in drawn for end in (interval.low, interval.high)]
    canvas.set_limits(axes.xaxis, [one.mean for _, _, one in drawn], ends, log_from(column))
    if column.better == "one":
        axes.axvline(1, color=QUIET, linestyle=DASHES[2], zorder=0)
    for line, row, interval in drawn:
        face = {} if row.as_trained else {"markerfacecolor": GROUND}
        axes.plot(interval.mean, line, **looks[row] | face, linestyle="none")
    canvas.interval_bars(
        axes,
        [line for line, _, _ in drawn],
        [interval.low for _, _, interval in drawn],
        [interval.high for _, _, interval in drawn],
        [looks[row]["color"] for _, row, _ in drawn],
        upright=False,
    )
    axes.set_title(canvas.titled(column, 26))
    if axes.get_xscale() != "log":
        axes.locator_params("x", nbins=4)


def _way_names(study: Study) -> dict[Row, str]:
    """Words for how each row is sampled: the keys of sampling that differ within a student."""
    rows = {row: [row, *ways] for row, ways in study.listed_ways.items()}
    keys = [
        key
        for key in study.results.swept
        if is_sampling(key)
        and any(len({row.swept[key] for row in one}) > 1 for one in rows.values())
    ]
    return {
        row: ", ".join(
            filter(None, (name_value(key.removeprefix(SAMPLING), row.swept[key]) for key in keys))
        )
        for one in rows.values()
        for row in one
    }
