"""Figures of results/<name>, each one call on the folder; nothing is read but its data files.

    distill-bench plot results/NAME                                      every figure, into results/NAME/figures
    distill-bench plot results/NAME --x cost --y fvd --group method      any pair of columns

Needs no torch. Scores and methods are columns and values of runs.csv; none is known by name here.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distill_bench.report import canvas
from distill_bench.report.canvas import COLOURS, DASHES, GROUND, MARKERS, QUIET, SIZE, STYLE
from distill_bench.report.labels import name_value, parse_number, show_value
from distill_bench.report.results import COSTS, Column, Results, ResultsError, load
from distill_bench.report.rows import COST, Row
from distill_bench.report.run_views import runs_of, student_runs
from distill_bench.report.stats import Interval, mean_interval
from distill_bench.report.tables.differences import against_baseline, verdict
from distill_bench.sample.roles import FLOOR
from distill_bench.store.files import read_jsonl, write_bytes
from distill_bench.store.runs import sweep_name

MOST_KEYS = 6  # of the training log in one figure
UPDATES = Column("student_updates", "Student updates", "", None, False)


class PlotError(ValueError):
    """The files cannot be drawn; one line that says why."""


@dataclass(frozen=True)
class Drawing:
    """A figure with its place in the page."""

    name: str
    section: str
    about: str  # what it shows, for those who cannot see it
    draw: Callable[[], Figure | None]
    wide: bool = False


def plot(folder: Path, workers: int = 1) -> list[Path]:
    """Draw every figure into folder/figures as SVG and PNG, with index.jsonl in the page's order; returns the SVG paths."""
    listed = Path(folder) / "figures" / "index.jsonl"
    _load(folder)  # before what an earlier report drew goes
    for line in read_jsonl(listed):  # figures asked for one by one stay
        for suffix in (".svg", ".png"):
            listed.with_name(line["name"] + suffix).unlink(missing_ok=True)
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            parts = list(pool.map(_draw, [folder] * workers, range(workers), [workers] * workers))
    else:
        parts = [_draw(folder, 0, 1)]
    lines = [
        line
        for _, line in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
    ]
    write_bytes(listed, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return [listed.with_name(f"{line['name']}.svg") for line in lines]


def _draw(folder: Path, first: int, step: int) -> list[tuple[int, dict]]:
    """Draw every step-th figure; returns the index's lines with their places in it."""
    lines = []
    for place, drawing in enumerate(drawings(_load(folder))):
        figure = drawing.draw() if place % step == first else None
        if figure is not None:
            canvas.save(figure, folder, drawing.name)
            line = {
                "name": drawing.name,
                "section": drawing.section,
                "about": drawing.about,
                "wide": drawing.wide,
            }
            lines.append((place, line))
    return lines


def drawings(results: Results) -> Iterator[Drawing]:
    """Every figure of a sweep."""
    main, axis = results.headline, results.axis
    r = results
    titles = ", ".join(column.title for column in main)
    key = _key(results)
    band = "mean and 95 % interval"
    notes = [f"hollow: controls, run at one value of {axis} alone"] if key.controls else []
    if axis:
        alone = "dashed, hollow: rows to which it does not apply" if key.across else ""
        rest = "; ".join(
            filter(None, [band, "dots are runs, arrow heads intervals that go on", *notes, alone])
        )
        yield Drawing(
            "overview",
            "headline",
            f"{titles} against {axis}, one line a series: {rest}",
            lambda: overview(r),
            True,
        )
    for c in main:
        about = "; ".join(
            [f"{c.title} against training cost at the end of training: {band}", *notes]
        )
        yield Drawing(
            f"{c.name}_against_cost", "pareto", about, lambda c=c: score_against_cost(r, c)
        )
    distance = next((c for c in main if c.better == "lower"), None)
    for c in main if distance else []:
        if c is not distance:
            about = f"{c.title} against {distance.title}: {band}; diamonds are references"
            yield Drawing(
                f"{c.name}_against_{distance.name}",
                "pareto",
                about,
                lambda c=c: trade_off(r, distance, c),
            )
    for c in main:
        for x, name in ((UPDATES, "updates"), (COSTS[0], "cost")):
            about = f"{c.title} over {x.title.lower()}: mean of a row's runs, band: 95 % interval over seeds"
            about += (
                "; a cross is a run that collapsed"
                if any(run.status == "collapsed" for run in student_runs(r))
                else ""
            )
            yield Drawing(
                f"{c.name}_over_{name}", "curves", about, lambda c=c, x=x: curves(r, c, x), True
            )
    about = f"{titles}: {band} of every row; dots are runs, diamonds references"
    yield Drawing("every_row", "rows", about, lambda: every_row(r), True)
    if r.baseline:
        about = f"{titles}: paired difference of every row to {r.baseline.label} with its 95 % interval; filled where p (Holm) < 0.05"
        yield Drawing("differences", "differences", about, lambda: differences(r), True)
    about = "The training logs over student updates: mean over the runs of a row, and over bins where there are bins"
    yield Drawing("training", "diagnostics", about, lambda: training(r), True)
    for name in binned(results):
        about = f"{name.replace('_', ' ')} by bin: mean over the runs of a row and the last third of training"
        yield Drawing(
            f"{canvas.file_name(name)}_by_bin",
            "diagnostics",
            about,
            lambda name=name: by_bin(r, name),
            True,
        )


def _load(folder: Path | Results) -> Results:
    try:
        return folder if isinstance(folder, Results) else load(_folder(Path(folder)))
    except ResultsError as error:
        raise PlotError(str(error)) from error


def _folder(path: Path) -> Path:
    """The folder of results that a path means: itself, or where the runs.csv that it names lies."""
    return path.parent if path.name == "runs.csv" else path


# --- one figure a function: each takes the folder, or what `results.load` made of it ---


def overview(folder: Path | Results) -> Figure | None:
    """A panel a headline score against what the sweep varies: a line a series, its runs as dots; the view follows the runs.

    Series stand beside one another at each place of the axis, a control half a step beside the series that it varies. A row
    without a place is a dashed line across. A distance has the teacher against itself as its floor.
    """
    results = _load(folder)
    rows = [row for row in results.students if row.at]
    places = sorted({row.at for row in rows}, key=lambda at: parse_number(at) or 0.0)
    columns = [c for c in results.headline if any(results.interval(row, c.name) for row in rows)]
    if not columns or len(places) < 2:
        return None
    key = _key(results)
    with plt.rc_context(STYLE):
        wide = min(len(columns), 2)
        tall = -(-len(columns) // wide)
        figure, grid = plt.subplots(
            tall, wide, figsize=(3.7 * wide, 0.4 + 2.5 * tall), squeeze=False
        )
        for axes, column in zip(grid.flat, columns, strict=False):
            _dodged(axes, results, column, key, places)
            axes.set_title(canvas.wrapped(column.axis_label, 42))
            axes.set_xticks(range(len(places)), [show_value(at) for at in places])
            axes.set_xlim(-0.5, len(places) - 0.5)
            axes.grid(axis="x", visible=False)
        spare = list(grid.flat)[len(columns) :]
        for axes in spare:
            axes.set_axis_off()
        figure.supxlabel((results.axis or "").replace("_", " "), fontsize=STYLE["axes.labelsize"])
        canvas.legend(figure, key.entries, spare[0] if spare and len(key.entries) <= 12 else None)
    return figure


def _dodged(
    axes: Axes, results: Results, column: Column, key: "Key", places: Sequence[str]
) -> None:
    """Draw one score of `overview`."""
    rows = [
        (row, interval)
        for row in results.students
        if row.at and (interval := results.interval(row, column.name))
    ]
    lines = list(dict.fromkeys(key.base.get(row.series, row.series) for row, _ in rows))
    step = min(0.8, 0.16 * len(lines)) / max(len(lines), 1)
    series: dict[str, list[tuple[float, Interval]]] = {}
    seen, marks = _across(axes, results, column, key), []
    for row, interval in rows:
        slot = lines.index(key.base.get(row.series, row.series)) + (
            0.95 if row.series in key.base else 0.5
        )
        at, colour = (
            places.index(row.at) + step * (slot - len(lines) / 2),
            key.looks[row.series]["color"],
        )
        known = [float(values.mean()) for values in row.by_seed(column.name).values()]
        axes.plot(
            np.full(len(known), at),
            known,
            ".",
            color=colour,
            alpha=0.4,
            markersize=4.5,
            markeredgewidth=0,
        )
        series.setdefault(row.series, []).append((at, interval))
        marks.append((at, interval.low, interval.high, colour))
        seen += [*known, interval.mean]
    for label, found in series.items():
        found.sort(key=lambda pair: pair[0])
        axes.plot(
            *zip(*[(at, i.mean) for at, i in found], strict=True),
            **key.looks[label],
            linewidth=1.1,
            markersize=4,
        )
    seen += _floor(axes, results, column)
    canvas.view(
        axes.yaxis, seen, [end for _, low, high, _ in marks for end in (low, high)], _spread(column)
    )
    canvas.intervals(axes, marks)
    if column.better == "one":
        axes.axhline(1, color=QUIET, linestyle=":", linewidth=1.2, zorder=0)


def _floor(axes: Axes, results: Results, column: Column) -> list[float]:
    """A line where the teacher is against its own clips of other seeds, below which no distance means anything."""
    values = [
        next(runs_of(row)).value(column.name)
        for row in results.references
        if row.role == FLOOR and row.done
    ]
    floor = [value for value in values if value is not None and column.better == "lower"]
    for value in floor:
        axes.axhline(value, color=QUIET, linestyle=(0, (4, 3)), linewidth=0.8, zorder=0)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(
            "teacher against teacher",
            (1, value),
            xytext=(0, 2),
            ha="right",
            color=QUIET,
            fontsize=8,
            **place,
        )
    return floor


def score_by_axis(folder: Path | Results, column: Column | str) -> Figure | None:
    """A score against what the sweep varies, a line a series."""
    results = _load(folder)
    return (
        against(results, results.axis, _column(results, column), "series") if results.axis else None
    )


def score_against_cost(folder: Path | Results, column: Column | str) -> Figure | None:
    """A score at the end of training against what the training cost."""
    results = _load(folder)
    return against(results, COSTS[0], _column(results, column), "series")


def trade_off(folder: Path | Results, x: Column | str, y: Column | str) -> Figure | None:
    """One score against another, references as diamonds."""
    results = _load(folder)
    return against(results, _column(results, x), _column(results, y), "series")


@dataclass(frozen=True)
class Point:
    """The runs that differ in nothing but the seed, on one pair of columns."""

    group: str
    series: str
    note: str
    x: Interval
    y: Interval


def points(results: Results, x: str, y: str, group: str) -> list[Point]:
    """Mean and interval of both columns for every row of students, split by `group` where it is not of the row."""
    found = []
    for row in results.students:
        parts: dict[str, list] = {}
        labels = {run.run_id: show_value(run.line.get(group, "")) for run in runs_of(row)}
        for index, run_id in row.runs["run_id"].items():
            label = row.series if group == "series" else labels[run_id]
            parts.setdefault(label, []).append(index)
        for label, runs in parts.items():
            part = dataclasses.replace(row, runs=row.runs.loc[runs])
            pair = results.interval(part, x), results.interval(part, y)
            if None not in pair:
                found.append(
                    Point(
                        label,
                        row.series,
                        "" if x == results.axis else show_value(row.at) if row.at else "",
                        *pair,
                    )
                )
    return found


def against(
    folder: Path | Results, x: Column | str, y: Column | str, group: str = "method"
) -> Figure | None:
    """One column of runs.csv against another: a colour a group, a marker a row; rows that differ in the axis alone are joined.

    None where no finished run has both. Rows without a place on the sweep's axis are lines across it. References with both
    columns are diamonds, with `y` alone dashed lines; those far from the runs are named below.

    Raises:
        PlotError: for a column that runs.csv does not have.
    """
    results = _load(folder)
    x, y = _column(results, x), _column(results, y)
    group = group if group == "series" else find_column(results, group)
    found = points(results, x.name, y.name, group)
    if not found:
        return None
    key = _key(results)
    groups = list(dict.fromkeys(point.group for point in found))
    own = {point.group: key.looks[point.series]["color"] for point in reversed(found)}
    if len(set(own.values())) < len(groups):  # runs of one series are in several groups
        own = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(groups)}
    hues = {label: {"color": own[label]} for label in groups} if group != "series" else {}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=SIZE)
        handles, told, notes = [], set(), []
        for label, series in dict.fromkeys((point.group, point.series) for point in found):
            line = [point for point in found if (point.group, point.series) == (label, series)]
            line.sort(key=lambda point: parse_number(point.note) or point.x.mean)  # along the axis
            look = key.looks[series] | hues.get(label, {})
            axes.plot(
                [p.x.mean for p in line],
                [p.y.mean for p in line],
                **look,
                markersize=4.5,
                linewidth=1.1,
            )
            noted = (
                {line[0].note: line[0], line[-1].note: line[-1]}.values()
                if series not in key.base
                else ()
            )
            notes += [(point.note, (point.x.mean, point.y.mean), look["color"]) for point in noted]
            name = key.names.get(series, series)
            if (
                series not in key.base or label not in told
            ):  # a group of controls alone has an entry, too
                handles.append(
                    Line2D([], [], **look, label=name if name.startswith(label) else label)
                )
            told.add(label)
        across = _across(axes, results, y, key) if x.name == results.axis else []
        ends = [end for p in found for end in (p.y.low, p.y.high)]
        canvas.view(axes.yaxis, [*(p.y.mean for p in found), *across], ends, _spread(y))
        spread = [point.x.mean for point in found]
        canvas.view(
            axes.xaxis,
            spread,
            [end for p in found if x.headline for end in (p.x.low, p.x.high)],
            _spread(x),
        )
        canvas.annotate(axes, notes)
        if x.name == results.axis and len(set(spread)) <= 8:
            axes.set_xticks(
                sorted(set(spread)), [f"{value:g}" for value in sorted(set(spread))], minor=False
            )
            axes.minorticks_off()
        if y.better == "one":
            axes.axhline(1, color=QUIET, linestyle=":", linewidth=1.2, zorder=0)
        far = _references(axes, results, x, y)
        colours = [(hues.get(p.group) or key.looks[p.series])["color"] for p in found]
        canvas.intervals(
            axes, [(p.x.mean, p.y.low, p.y.high, c) for p, c in zip(found, colours, strict=True)]
        )
        if x.headline:
            canvas.intervals(
                axes,
                [(p.y.mean, p.x.low, p.x.high, c) for p, c in zip(found, colours, strict=True)],
                upright=False,
            )
        axes.set_xlabel(canvas.wrapped(x.axis_label, 48))
        axes.set_ylabel(canvas.wrapped(y.axis_label, 34))
        ends = f"at a line's ends: {results.axis}" if any(point.note for point in found) else ""
        figure.supxlabel("\n".join(filter(None, [ends, far])), fontsize=8, color=QUIET)
        if len(groups) > 1 or group == "series" or across:
            if group != "series":
                once = {str(handle.get_label()): handle for handle in reversed(handles)}
                handles = [*reversed(once.values()), *key.controls, *(key.across if across else ())]
            title = group if group not in ("method", "series") else None
            canvas.legend(figure, key.entries if group == "series" else handles, title=title)
    return figure


def _across(axes: Axes, results: Results, y: Column, key: "Key") -> list[float]:
    """Draw the rows that have no place on the sweep's axis, each a line with its interval as a band; returns their means."""
    means = []
    for row in results.students:
        interval = None if row.at else results.interval(row, y.name)
        if interval is None:
            continue
        look = key.looks[row.series] | {"linestyle": DASHES[1], "markevery": [1], "clip_on": False}
        across = axes.get_yaxis_transform()
        axes.plot(
            [0, 1], [interval.mean] * 2, transform=across, **look, linewidth=1.3, label=row.series
        )
        half = canvas.half(interval)
        axes.axhspan(
            interval.mean - half,
            interval.mean + half,
            color=look["color"],
            alpha=0.1,
            linewidth=0,
            zorder=0,
        )
        means.append(interval.mean)
    return means


def _references(axes: Axes, results: Results, x: Column, y: Column) -> str:
    """Draw the references that lie near the runs, for which the axes give way; returns a sentence for the others."""
    sides = [axes.xaxis, axes.yaxis]
    views = [canvas.straight(side, side.get_view_interval()) for side in sides]
    reach = [
        (high - low) * (0.5 if side.get_scale() == "log" else 1.2)
        for (low, high), side in zip(views, sides, strict=True)
    ]
    far, lines, dots = [], [], []
    for row in results.references:
        at = [next(runs_of(row)).value(column.name) if row.done else None for column in (x, y)]
        if at[1] is None:
            continue
        where = [
            np.nan if value is None else canvas.straight(side, value)
            for value, side in zip(at, sides, strict=True)
        ]
        if any(
            w < low - r or w > high + r
            for w, (low, high), r in zip(where, views, reach, strict=True)
        ):
            far.append(
                f"{row.label} "
                + (
                    canvas.brief(at[1])
                    if at[0] is None
                    else f"({canvas.brief(at[0])}, {canvas.brief(at[1])})"
                )
            )
        elif at[0] is None:
            lines.append((at[1], row.label))
        else:
            dots.append((at, row.label))
    for i, side in enumerate(sides):
        near = [at[i] for at, _ in dots] + ([value for value, _ in lines] if i else [])
        canvas.give_way(side, near)
    for at, _ in dots:
        axes.plot(*at, marker="d", color=QUIET, markersize=6, linestyle="none", zorder=1)
    for value, _ in lines:
        axes.axhline(value, color=QUIET, linestyle=DASHES[1], linewidth=1, zorder=0)
    quiet = {"textcoords": "offset points", "color": QUIET, "fontsize": 8, "in_layout": False}
    for at, names in canvas.together(
        dots, lambda at: [canvas.share(side, value) for side, value in zip(sides, at, strict=True)]
    ):
        right = canvas.share(axes.xaxis, at[0]) > 0.6
        axes.annotate(
            canvas.few(names),
            at,
            xytext=(-6, -3) if right else (6, -3),
            ha="right" if right else "left",
            **quiet,
        )
    for value, names in canvas.together(
        sorted(lines), lambda value: [canvas.share(axes.yaxis, value)]
    ):
        axes.annotate(
            canvas.few(names),
            (1, value),
            xytext=(0, 2),
            ha="right",
            xycoords=("axes fraction", "data"),
            **quiet,
        )
    return canvas.wrapped("off the axis: " + ", ".join(far), 72) if far else ""


def curves(folder: Path | Results, column: Column | str, x: Column | str) -> Figure | None:
    """A score over student updates or cost at the evaluated checkpoints, a panel a place on the axis, bands over seeds.

    None where no run was evaluated before its end.
    """
    results = _load(folder)
    column, x = _column(results, column), _column(results, x)
    panels = _panels(results)
    if not any(len(run.checkpoints) > 1 for run in student_runs(results)):
        return None
    wide = min(2, len(panels))
    tall = -(-len(panels) // wide)
    with plt.rc_context(STYLE):
        size = (SIZE[0] if wide == 1 else 7.6, 0.5 + 2.3 * tall)
        figure, grid = plt.subplots(tall, wide, figsize=size, sharey=True, squeeze=False)
        key, bands = _key(results), []
        for axes, (title, rows) in zip(grid.flat, panels, strict=False):
            for row in rows:
                found = _curve(axes, row, column.name, x.name, key.looks[row.series])
                bands += [(axes, row, *found)] if found and row.series not in key.base else []
            axes.set_title(title)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        ends = [end for *_, means in bands for each in means for end in (each.low, each.high)]
        canvas.view(grid[0][0].yaxis, canvas.drawn(grid.flat), ends, _spread(column))
        bottom, top = grid[0][0].get_ylim()
        for (
            axes,
            row,
            places,
            means,
        ) in bands:  # within the view: a logarithmic axis has no place for what is below 0
            low, high = (
                [
                    np.clip(b if isfinite(b) else m.mean, bottom, top)
                    for m, b in zip(means, bs, strict=True)
                ]
                for bs in ([m.low for m in means], [m.high for m in means])
            )
            axes.fill_between(
                places, low, high, color=key.looks[row.series]["color"], alpha=0.12, linewidth=0
            )
        figure.supxlabel(x.axis_label, fontsize=STYLE["axes.labelsize"])
        figure.supylabel(
            canvas.wrapped(column.axis_label, 28 if tall == 1 else 60),
            fontsize=STYLE["axes.labelsize"],
        )
        canvas.legend(figure, key.entries)
    return figure


def _curve(
    axes: Axes, row: Row, column: str, x: str, look: dict
) -> tuple[list[float], list[Interval]] | None:
    """Draw the means of a row's runs; returns their places and intervals."""
    at: dict[float, list[tuple[float, float]]] = {}
    for run in runs_of(row):
        for point in run.checkpoints if run.scored else ():
            if x in point and column in point:
                at.setdefault(point["student_updates"], []).append((point[x], point[column]))
    whole = {updates: pairs for updates, pairs in sorted(at.items()) if len(pairs) == row.done}
    places = [float(np.mean([place for place, _ in pairs])) for pairs in whole.values()]
    means = [mean_interval([value for _, value in pairs]) for pairs in whole.values()]
    if whole:
        axes.plot(places, [each.mean for each in means], **look, linewidth=1.2, markersize=4)
    for run in runs_of(row):
        known = [point for point in run.checkpoints if x in point and column in point]
        if run.status == "collapsed" and known:
            axes.plot(
                known[-1][x],
                known[-1][column],
                marker="x",
                color=look["color"],
                markersize=7,
                linestyle="none",
            )
    return (places, means) if whole else None


def every_row(folder: Path | Results) -> Figure | None:
    """A panel a headline score: every row's mean with its 95 % interval, its runs as dots."""
    results = _load(folder)
    columns = [
        c for c in results.headline if any(results.interval(row, c.name) for row in results.rows)
    ]
    if not columns:
        return None
    looks, wide = _key(results).looks, canvas.abreast(len(columns))
    tall = -(-len(columns) // wide)
    with plt.rc_context(STYLE):
        size = (2.2 + 2.4 * wide, tall * (0.9 + 0.2 * len(results.rows)))
        figure, grid = plt.subplots(tall, wide, figsize=size, sharey=True, squeeze=False)
        for axes, column in zip(grid.flat, columns, strict=False):
            references, marks = [], []
            for place, row in enumerate(results.rows):
                interval = results.interval(row, column.name)
                if interval is None:
                    axes.annotate(
                        "—",
                        (0.02, place),
                        xycoords=("axes fraction", "data"),
                        color=QUIET,
                        va="center",
                    )
                elif row.reference:
                    references.append((place, interval.mean))
                else:
                    look = looks[row.series] | {"linestyle": "none"}
                    axes.plot(interval.mean, place, **look)
                    marks.append((place, interval.low, interval.high, look["color"]))
                    known = [float(values.mean()) for values in row.by_seed(column.name).values()]
                    axes.plot(
                        known,
                        np.full(len(known), place + 0.3),
                        ".",
                        color=look["color"],
                        alpha=0.5,
                        markersize=3,
                    )
            seen = [
                float(value) for line in axes.lines for value in np.asarray(line.get_xdata(), float)
            ]
            canvas.view(
                axes.xaxis,
                seen,
                [end for _, low, high, _ in marks for end in (low, high)],
                _spread(column),
            )
            _reference_dots(axes, references, bool(seen))
            canvas.intervals(axes, marks, upright=False)
            axes.set_title(canvas.wrapped(column.axis_label, 26))
            if axes.get_xscale() != "log":
                axes.locator_params("x", nbins=4)
            axes.set_yticks(range(len(results.rows)), [_tick(row) for row in results.rows])
        for axes in list(grid.flat)[len(columns) :]:
            axes.set_visible(False)
        grid[0][0].set_ylim(len(results.rows) - 0.4, -0.6)
        if results.axis:
            figure.supxlabel(_beside(results).strip("\n"), fontsize=STYLE["axes.labelsize"])
    return figure


def _reference_dots(axes: Axes, references: Sequence[tuple[int, float]], bounded: bool) -> None:
    """Diamonds for the references; one far from the runs is a number at the border, so that the runs keep the axis."""
    near, reach = [], 0.5 if axes.get_xscale() == "log" else 1
    for row, value in references:
        share = canvas.share(axes.xaxis, value)
        if bounded and not -reach <= share <= 1 + reach:
            side, align = (0.98, "right") if share > 1 else (0.02, "left")
            text = f"{canvas.brief(value)} ▸" if share > 1 else f"◂ {canvas.brief(value)}"
            place = ("axes fraction", "data")
            axes.annotate(
                text, (side, row), xycoords=place, color=QUIET, fontsize=8, ha=align, va="center"
            )
        else:
            near.append((value, row))
    if bounded:
        canvas.give_way(axes.xaxis, [value for value, _ in near])
    for place in near:
        axes.plot(*place, marker="d", color=QUIET)


def differences(folder: Path | Results) -> Figure | None:
    """A panel a headline score: the paired difference of every row to the baseline with its interval."""
    results = _load(folder)
    baseline = results.baseline
    families = (
        {c: against_baseline(results, c, baseline) for c in results.headline} if baseline else {}
    )
    families = {
        c: found for c, found in families.items() if any(each.interval for each, _ in found)
    }
    if not families:
        return None
    others = [row for row in results.students if row is not baseline]
    looks, wide = _key(results).looks, canvas.abreast(len(families))
    tall = -(-len(families) // wide)
    with plt.rc_context(STYLE):
        size = (2.2 + 2.4 * wide, tall * (0.9 + 0.2 * len(others)))
        figure, grid = plt.subplots(tall, wide, figsize=size, sharey=True, squeeze=False)
        for axes, (column, found) in zip(grid.flat, families.items(), strict=False):
            axes.axvline(0, color=QUIET, linewidth=1)
            for place, (each, p) in enumerate(found):
                if each.interval is None:
                    axes.annotate(
                        "—",
                        (0.02, place),
                        xycoords=("axes fraction", "data"),
                        color=QUIET,
                        va="center",
                    )
                    continue
                look = looks[each.a.series] | {"linestyle": "none"}
                look["markerfacecolor"] = look["color"] if verdict(each, p) else GROUND
                axes.errorbar(
                    each.interval.mean,
                    place,
                    xerr=canvas.half(each.interval),
                    **look,
                    capsize=2.5,
                    elinewidth=1,
                )
            axes.set_title(canvas.wrapped(column.axis_label, 26))
            axes.locator_params("x", nbins=4)
            axes.set_yticks(range(len(others)), [_tick(row) for row in others])
        for axes in list(grid.flat)[len(families) :]:
            axes.set_visible(False)
        grid[0][0].set_ylim(len(others) - 0.4, -0.6)
        figure.supxlabel(
            f"difference to {baseline.label}{_beside(results)}", fontsize=STYLE["axes.labelsize"]
        )
    return figure


def training(folder: Path | Results) -> Figure | None:
    """Quantities of the training logs over student updates, a line of panels each: means over bins first, then what most log."""
    results = _load(folder)
    count: dict[str, set[str]] = {}
    for row in results.students:
        for key in {key for run in runs_of(row) for line in run.training for key in line}:
            count.setdefault(key, set()).add(row.method)
    clock = {UPDATES.name, COST, "seconds", "rate"}
    keys = sorted(
        (key for key in count if key not in clock and "/" not in key),
        key=lambda key: (-len(count[key]), key),
    )
    over_bins = [name for name in binned(results) if _numeric(_bins(results, name))]
    return _panel_grid(results, [*over_bins, *keys][:MOST_KEYS], UPDATES.axis_label, _training_line)


def _training_line(axes: Axes, row: Row, key: str, look: dict) -> None:
    at: dict[float, list[float]] = {}
    for run in runs_of(row):
        for line in run.training:
            values = [
                value for name, value in line.items() if name == key or name.startswith(f"{key}/")
            ]
            if values:
                at.setdefault(line[UPDATES.name], []).append(float(np.mean(values)))
    every = sorted(
        updates for updates, values in at.items() if len(values) == max(map(len, at.values()))
    )
    axes.plot(
        every, [np.mean(at[updates]) for updates in every], **(look | {"marker": ""}), linewidth=1.1
    )


def binned(results: Results) -> list[str]:
    """Names that are logged by bin, as `name/bin`."""
    keys = {
        key for run in student_runs(results) for line in run.training for key in line if "/" in key
    }
    return sorted({key.partition("/")[0] for key in keys})


def _bins(results: Results, name: str) -> list[str]:
    """The keys of a name in the order of their bins."""
    keys = {
        key
        for run in student_runs(results)
        for line in run.training
        for key in line
        if key.startswith(f"{name}/")
    }
    return sorted(keys, key=lambda key: (_first_number(key), key))


def _first_number(key: str) -> float:
    match = re.search(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", key.partition("/")[2])
    return float(match[0]) if match else np.inf


def _numeric(bins: Sequence[str]) -> bool:
    return all(isfinite(_first_number(key)) for key in bins)


def by_bin(folder: Path | Results, name: str) -> Figure | None:
    """What is logged as `name/bin`, over its bins late in training, a panel a place on the axis; lines where bins are numbers."""
    results = _load(folder)
    bins = _bins(results, name)
    if not bins:
        return None
    labels = [key.partition("/")[2].replace("/", ", ") for key in bins]
    shared = os.path.commonprefix(labels) if _numeric(bins) and len(bins) > 1 else ""
    unit = shared.rstrip("-.0123456789")  # "sigma_" of sigma_0.1, sigma_0.9
    labels = [label.removeprefix(unit) for label in labels]

    def line(axes: Axes, row: Row, _: str, look: dict) -> None:
        values = [_late_mean(row, key) for key in bins]
        style = look if _numeric(bins) else look | {"linestyle": "none"}
        axes.plot(
            [i for i, v in enumerate(values) if isfinite(v)],
            [v for v in values if isfinite(v)],
            **style,
            linewidth=1.1,
        )
        if len(bins) > 1 and max(map(len, labels)) > 3:
            axes.set_xticks(
                range(len(bins)), labels, rotation=40, ha="right", rotation_mode="anchor"
            )
        else:
            axes.set_xticks(range(len(bins)), labels)

    return _panel_grid(results, [name], unit.strip("_ ") or ("bin" if _numeric(bins) else ""), line)


def _logs(row: Row, key: str) -> bool:
    """Whether a row's runs log a key, or it by bin."""
    return any(
        name == key or name.startswith(f"{key}/")
        for run in runs_of(row)
        for line in run.training
        for name in line
    )


def _late_mean(row: Row, key: str) -> float:
    """Mean over runs and the last third of their logs."""
    means = []
    for run in runs_of(row):
        values = [
            line[key]
            for line in run.training
            if key in line and line[UPDATES.name] * 1.5 >= run.training[-1][UPDATES.name]
        ]
        means += [float(np.mean(values))] if values else []
    return float(np.mean(means)) if means else nan


def _panel_grid(
    results: Results,
    keys: Sequence[str],
    x_title: str,
    line: Callable[[Axes, Row, str, dict], None],
) -> Figure | None:
    """A line of panels a key, a panel a place on the axis where any of them is logged, a line a series."""
    if not keys:
        return None
    panels, series = _panels(results), _key(results)
    panels = [
        (title, rows)
        for title, rows in panels
        if any(_logs(row, key) for row in rows for key in keys)
    ]
    with plt.rc_context(STYLE):
        size = (max(SIZE[0], 0.5 + 2.2 * len(panels)), 0.7 + 1.8 * len(keys))
        figure, grid = plt.subplots(
            len(keys), len(panels), figsize=size, sharey="row", sharex=True, squeeze=False
        )
        for i, (key, line_of_axes) in enumerate(zip(keys, grid, strict=True)):
            for axes, (title, rows) in zip(line_of_axes, panels, strict=True):
                for row in rows:
                    line(axes, row, key, series.looks[row.series])
                axes.set_title(title if i == 0 else "")
            canvas.view(line_of_axes[0].yaxis, canvas.drawn(line_of_axes))
            line_of_axes[0].set_ylabel(canvas.wrapped(key.replace("_", " "), 20))
        figure.supxlabel(x_title, fontsize=STYLE["axes.labelsize"])
        canvas.legend(figure, series.entries)
    return figure


# --- what figures share ---


def _column(results: Results, name: Column | str) -> Column:
    if isinstance(name, Column):
        return name
    known = {column.name: column for column in [*results.columns, *COSTS, UPDATES]}
    if name not in known and any(
        row.done for row in results.rows
    ):  # else runs.csv has no scores yet
        name = find_column(results, name)
    return known.get(name) or Column(
        name, name.rpartition(".")[2].replace("_", " "), "", None, False
    )


@dataclass(frozen=True)
class Key:
    """How every series looks, the same in every figure, and what a legend says of it."""

    looks: dict[str, dict]
    names: dict[str, str]  # of the lines: without the settings that tell no two of them apart
    base: dict[
        str, str
    ]  # the line that a control, or a row without a place on the axis, varies; it has that line's colour
    lines: list[Line2D]
    controls: list[Line2D]
    across: list[Line2D]

    @property
    def entries(self) -> list[Line2D]:
        return [*self.lines, *self.controls, *self.across]


def _key(results: Results) -> Key:
    """A colour and marker a line; hollow and dotted for a control, which differs from a line in settings, at one place alone."""
    rows = {row.series: row for row in reversed(results.students)}
    rows = {row.series: rows[row.series] for row in results.students}
    places = Counter(row.series for row in results.students if row.at)
    base, apart = {}, {}
    for label, row in sorted(rows.items(), key=lambda item: not item[1].at) if places else ():
        if places[label] > 1:
            continue
        ways = {}
        for other in rows.values():
            differing = [
                k
                for k, value in row.swept.items()
                if k != results.axis and value != other.swept.get(k)
            ]
            setting = all(
                parse_number(row.swept[k]) is not None or row.swept[k] in ("True", "False")
                for k in differing
            )
            if other.method == row.method and other.series not in base and (setting or not row.at):
                ways |= (
                    {other.series: differing} if places[other.series] > (1 if row.at else 0) else {}
                )
        if ways:
            base[label] = min(ways, key=lambda line: len(ways[line]))
            apart |= {(k, row.swept[k]): None for k in ways[base[label]] if row.at}
    lines = [label for label in rows if label not in base]
    stems = {label: " ".join(word for word in label.split() if "=" not in word) for label in lines}
    rests = {label: label.removeprefix(stems[label]).strip() for label in lines}
    names = {
        label: stem if list(stems.values()).count(stem) == 1 else label
        for label, stem in stems.items()
    }
    dashes = dict(zip(dict.fromkeys(rests.values()), DASHES, strict=False))
    # more lines than colours: a colour for what they are and a dash for their settings, if that is few
    split = len(lines) > len(COLOURS) >= len(set(stems.values())) and len(
        set(rests.values())
    ) <= len(DASHES)
    hues = list(dict.fromkeys((stems if split else names).values()))
    looks = {}
    for label in lines:
        i = hues.index((stems if split else names)[label])
        line = dashes[rests[label]] if split else DASHES[i // len(COLOURS) % len(DASHES)]
        line = line if places[label] or not places else DASHES[1]
        looks[label] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": line,
        }
    for label, line in base.items():
        looks[label] = looks[line] | {
            "markerfacecolor": GROUND,
            "linestyle": DASHES[2] if rows[label].at else DASHES[1],
        }
    quiet: dict[str, Any] = {"color": QUIET}
    once = {stems[label] if split else names[label]: looks[label] for label in reversed(lines)}
    handles = [
        Line2D(
            [],
            [],
            **once[name] | ({"linestyle": "-"} if split else {}),
            label=canvas.short(name, 44),
        )
        for name in hues
    ]
    handles += (
        [Line2D([], [], **quiet, linestyle=dash, label=rest) for rest, dash in dashes.items()]
        if split
        else []
    )
    keys = list(dict.fromkeys(k for k, _ in apart))
    said = (
        name_value(*next(iter(apart)))
        if len(apart) == 1
        else "another " + " or ".join(k.rpartition(".")[2] for k in keys)
    )
    hollow = quiet | {"marker": "o", "markerfacecolor": GROUND, "linestyle": DASHES[2]}
    controls = [Line2D([], [], **hollow, label=f"hollow: {said}")] if apart else []
    across = [
        Line2D([], [], **looks[label], label=canvas.short(label, 44))
        for label in base
        if not rows[label].at
    ]
    return Key(looks, names, base, handles, controls, across)


def _panels(results: Results) -> list[tuple[str, list[Row]]]:
    """The students' rows by their place on the axis."""
    places: dict[str, list[Row]] = {}
    for row in results.students:
        places.setdefault(row.at, []).append(row)
    ordered = sorted(places.items(), key=lambda item: parse_number(item[0]) or 0.0)
    return [
        (
            name_value(results.axis or "", at)
            or (f"without {results.axis}" if results.axis else ""),
            rows,
        )
        for at, rows in ordered
    ]


def _spread(column: Column) -> float:
    """The ratio of largest to smallest from which a column is drawn on a logarithmic axis."""
    return 30.0 if column.better in ("higher", "one") else 8.0


def _beside(results: Results) -> str:
    return f"\nbeside the names: {results.axis}" if results.axis else ""


def _tick(row: Row) -> str:
    """A row's name where its place on the axis must not be cut off."""
    return (
        f"{canvas.short(row.series, 34)}  {show_value(row.at)}"
        if row.at
        else canvas.short(row.series, 34)
    )


# --- command line ---


def find_column(results: Results, name: str) -> str:
    """The column of runs.csv that a name or its unambiguous beginning or part means; headline scores come first.

    Raises:
        PlotError: if none or several are meant.
    """
    known = list(results.runs) if results.rows else []
    headline = [column.name for column in results.headline]
    tests: list[Callable[[str], bool]] = [
        lambda c: c == name,
        lambda c: c in headline and c.startswith(name),
        lambda c: c.startswith(name) or c.rpartition(".")[2] == name,
        lambda c: name in c,
    ]
    for test in tests:
        found = [column for column in known if test(column)]
        if len(found) == 1:
            return found[0]
        if found:
            raise PlotError(f"{name!r} could be any of {', '.join(found)}")
    raise PlotError(f"no column called {name!r} in runs.csv; known: {', '.join(known)}")


def draw_pair(folder: Path, x: str, y: str, group: str = "method") -> Path:
    """Draw one column of runs.csv against another, by names or their beginnings; returns the SVG's path.

    Raises:
        PlotError: for an unknown column, or where no finished run has both.
    """
    results = _load(folder)
    x, y = find_column(results, x), find_column(results, y)
    group = group if group == "series" else find_column(results, group)
    figure = against(results, x, y, group)
    if figure is None:
        raise PlotError(f"no finished run has both {x} and {y} as numbers")
    return canvas.save(
        figure,
        folder,
        f"{canvas.file_name(y)}_against_{canvas.file_name(x)}_by_{canvas.file_name(group)}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: all figures of a results folder, or one."""
    parser = argparse.ArgumentParser(
        prog="distill-bench plot", description="figures of a sweep's results"
    )
    parser.add_argument(
        "results", type=Path, help="folder with runs.csv, or a sweep's YAML or name"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="where the results of a named sweep lie"
    )
    parser.add_argument("--x", help="column of runs.csv, or its beginning (default: cost)")
    parser.add_argument("--y", help="draw this column alone")
    parser.add_argument(
        "--group", help="a line for each value of this column; `series`: each kind of row"
    )
    options = parser.parse_args(argv)
    if options.y is None and (options.x or options.group):
        parser.error("--x and --group draw one figure, of the column that --y names")
    folder = _folder(options.results)
    folder = folder if folder.is_dir() else options.out / sweep_name(options.results)
    try:
        workers = min(4, os.cpu_count() or 1)
        pair = options.y and (options.x or "cost", options.y, options.group or "method")
        for path in [draw_pair(folder, *pair)] if pair else plot(folder, workers):
            print(path)
    except PlotError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{parser.prog}: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
