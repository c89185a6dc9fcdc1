"""Figures of results/<name>, each one call on the folder; nothing is read but its data files.

    python -m distill_bench.plot results/NAME                                      every figure, into results/NAME/figures
    python -m distill_bench.plot results/NAME --x cost --y fvd --group method      any pair of columns

Needs no torch. Scores and methods are columns and values of runs.csv; none is known by name here.
"""

import argparse
import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from PIL import Image  # noqa: E402

from distill_bench.results import COST, COSTS, Column, Results, ResultsError, Row, load, number, say, show  # noqa: E402
from distill_bench.stats import Interval, mean_interval  # noqa: E402
from distill_bench.store import read_jsonl, write_bytes  # noqa: E402
from distill_bench.tables import against_baseline, verdict  # noqa: E402

# The page maps these four inks to its own, light or dark; see report.INK.
TEXT, RULE, QUIET, GROUND = "#1b1f24", "#d5dae0", "#59636e", "#fefefe"
# Okabe and Ito, 2008: told apart with any colour vision; yellow is left out, too pale for a line on white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", TEXT]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "h"]
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": QUIET,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": TEXT,
    "axes.labelsize": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "figure.facecolor": "none",
    "font.size": 9.5,
    "grid.color": RULE,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.markersize": 5,
    "path.simplify_threshold": 0.5,
    "savefig.dpi": 100,
    "svg.fonttype": "none",
    "svg.hashsalt": "distill_bench",
    "text.color": TEXT,
    "xtick.color": QUIET,
    "xtick.labelcolor": TEXT,
    "ytick.color": QUIET,
    "ytick.labelcolor": TEXT,
}
SIZE = (4.8, 3.7)  # inches; legible unscaled on a phone
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


def plot(folder: Path) -> list[Path]:
    """Draw every figure into folder/figures as SVG and PNG, with index.jsonl in the page's order; returns the SVG paths."""
    results, paths, index = _load(folder), [], []
    listed = Path(folder) / "figures" / "index.jsonl"
    for line in read_jsonl(listed):  # of an earlier report; figures asked for one by one stay
        for suffix in (".svg", ".png"):
            listed.with_name(line["name"] + suffix).unlink(missing_ok=True)
    for drawing in drawings(results):
        figure = drawing.draw()
        if figure is not None:
            paths.append(_save(figure, folder, drawing.name))
            line = {"name": drawing.name, "section": drawing.section, "about": drawing.about, "wide": drawing.wide}
            index.append(json.dumps(line) + "\n")
    write_bytes(listed, "".join(index).encode())
    return paths


def drawings(results: Results) -> Iterator[Drawing]:
    """Every figure of a sweep."""
    main, axis = results.main, results.axis
    r = results
    titles = ", ".join(column.title for column in main)
    band = "mean and 95 % interval over seeds"
    if axis:
        rest = "dots are runs; hollow: rows at one place of it; dashed: at none"
        about = f"{titles} against {axis}, one line a method: {band}; {rest}"
        yield Drawing("overview", "headline", about, lambda: overview(r), True)
    for c in main:
        about = f"{c.title} against training cost at the end of training: {band}"
        yield Drawing(f"{c.column}_against_cost", "pareto", about, lambda c=c: score_against_cost(r, c))
    distance = next((c for c in main if c.better == "lower"), None)
    for c in main if distance else []:
        if c is not distance:
            about = f"{c.title} against {distance.title}; diamonds are references"
            yield Drawing(f"{c.column}_against_{distance.column}", "pareto", about, lambda c=c: trade_off(r, distance, c))
    for c in main:
        for x, name in ((UPDATES, "updates"), (COSTS[0], "cost")):
            about = f"{c.title} over {x.title.lower()}: mean of a row's runs, bands over seeds; a cross is a run that collapsed"
            yield Drawing(f"{c.column}_over_{name}", "curves", about, lambda c=c, x=x: curves(r, c, x), True)
    about = f"{titles}: mean and 95 % interval of every row; dots are runs"
    yield Drawing("every_row", "rows", about, lambda: every_row(r), True)
    if r.baseline:
        about = (
            f"{titles}: paired difference of every row to {r.baseline.label} with its 95 % interval; filled where p (Holm) < 0.05"
        )
        yield Drawing("differences", "differences", about, lambda: differences(r), True)
    about = "The training logs over student updates: mean over the runs of a row, and over bins where there are bins"
    yield Drawing("training", "diagnostics", about, lambda: training(r), True)
    for name in binned(results):
        about = f"{name.replace('_', ' ')} by bin: mean over the runs of a row and the last third of training"
        yield Drawing(f"{_file_name(name)}_by_bin", "diagnostics", about, lambda name=name: by_bin(r, name), True)


def _load(folder: Path | Results) -> Results:
    try:
        return folder if isinstance(folder, Results) else load(Path(folder))
    except ResultsError as error:
        raise PlotError(str(error)) from error


# --- one figure a function: each takes the folder, or what `results.load` made of it ---


def overview(folder: Path | Results) -> Figure | None:
    """A panel a headline score against what the sweep varies: a line a series, its runs as dots; the view follows the runs.

    Series stand beside one another at each place of the axis. One that has a single place is hollow and has the colour of the
    series that it varies, if there is one; one that has none is a dashed line across.
    """
    results = _load(folder)
    rows = [row for row in results.students if row.at]
    places = sorted({row.at for row in rows}, key=lambda at: number(at) or 0.0)
    columns = [c for c in results.main if any(results.interval(row, c.column) for row in rows)]
    if not columns or len(places) < 2:
        return None
    series = list(dict.fromkeys(row.series for row in rows))
    across = list(dict.fromkeys(row.series for row in results.students if not row.at))
    several = [label for label in series if sum(row.series == label for row in rows) > 1]
    lines = [label for label in series if label in several or _base(label, several) == label]  # the others vary one of these
    with plt.rc_context(STYLE):
        wide = min(len(columns), 3)
        tall = -(-len(columns) // wide)
        figure, grid = plt.subplots(tall, wide, figsize=(3.3 * wide, 0.9 + 2.7 * tall), squeeze=False)
        for axes, column in zip(grid.flat, columns, strict=False):
            seen = [_dodged(axes, results, column, [r for r in rows if r.series == s], places, series, lines) for s in series]
            seen = [*(value for values in seen for value in values), *_across(axes, results, column)]
            if min(seen) > 0 and max(seen) / min(seen) > 30:
                axes.set(yscale="log", ylim=(min(seen) / 1.5, max(seen) * 1.5))
            else:
                margin = 0.15 * (max(seen) - min(seen) or 1.0)
                axes.set_ylim(min(seen) - margin, max(seen) + margin)
            if column.better == "one":
                axes.axhline(1, color=QUIET, linestyle=":", linewidth=1.2, zorder=0)
            axes.set_title(_wrapped(column.wish, 34))
            axes.set_xticks(range(len(places)), [show(at) for at in places])
            axes.set_xlim(-0.5, len(places) - 0.5)
            axes.grid(axis="x", visible=False)
        for axes in list(grid.flat)[len(columns) :]:
            axes.set_visible(False)
        figure.supxlabel((results.axis or "").replace("_", " "), fontsize=STYLE["axes.labelsize"])
        alone = {"linestyle": "none", "markerfacecolor": GROUND}
        looks = {label: _look(series, label) | ({} if label in several else alone) for label in lines}
        handles = [plt.Line2D([], [], **look, label=_short(label, 44)) for label, look in looks.items()]
        variations = list(dict.fromkeys(_beyond(label, lines) for label in series if label not in lines))
        hollow = {"color": QUIET, "marker": "o", "markerfacecolor": GROUND, "linestyle": "none"}
        handles += [plt.Line2D([], [], **hollow, label=_short(text, 44)) for text in variations]
        dashed = {"linestyle": (0, (4, 3))}
        handles += [
            plt.Line2D([], [], **_look([*series, *across], _base(s, series)) | dashed, label=_short(s, 44)) for s in across
        ]
        longest = max(len(str(handle.get_label())) for handle in handles)
        abreast = int(3.3 * wide / (0.55 + 0.068 * longest))  # inches: a handle and its gaps, and a letter
        figure.legend(handles=handles, loc="outside upper left", ncols=max(1, abreast))
    return figure


def _dodged(
    axes: Axes, results: Results, column: Column, rows: Sequence[Row], places: Sequence[str], series: list[str], lines: list[str]
) -> list[float]:
    """Draw one series of `overview`; returns the scores of its runs."""
    label, found, seen = rows[0].series, [], []
    base = _base(label, lines)
    look = _look(series, base)
    wide = min(0.7, 0.14 * len(lines))
    shift = wide * ((lines.index(base) + 0.5) / len(lines) - 0.5)
    for row in rows:
        interval = results.interval(row, column.column)
        if interval is not None:
            known = [float(values.mean()) for values in row.by_seed(column.column).values()]
            at = places.index(row.at) + shift
            axes.plot(np.full(len(known), at), known, ".", color=look["color"], alpha=0.45, markersize=3)
            found.append((at, interval))
            seen += [*known, interval.mean]
    found.sort(key=lambda pair: pair[0])
    style = look if len(rows) > 1 else look | {"linestyle": "none", "markerfacecolor": GROUND}
    xs, ys, bars = [at for at, _ in found], [i.mean for _, i in found], [_half(i) for _, i in found]
    axes.errorbar(xs, ys, yerr=bars, **style, elinewidth=0.8, linewidth=1.1, markersize=4.5)
    return seen


def _beyond(label: str, lines: Sequence[str]) -> str:
    """What a label says beyond the series that it varies."""
    return label.removeprefix(_base(label, lines)).strip()


def _base(label: str, series: Sequence[str]) -> str:
    """The series that a label varies: the longest that it begins with; itself where there is none."""
    return max((s for s in series if label == s or label.startswith(f"{s} ")), key=len, default=label)


def score_by_axis(folder: Path | Results, column: Column | str) -> Figure | None:
    """A score against what the sweep varies, a line a series."""
    results = _load(folder)
    return against(results, results.axis, _column(results, column), "series") if results.axis else None


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
    note: str
    x: Interval
    y: Interval


def points(results: Results, x: str, y: str, group: str) -> list[Point]:
    """Mean and interval of both columns for every row of students, split by `group` where it is not of the row."""
    found = []
    for row in results.students:
        parts: dict[str, list] = {}
        for run in row.runs:
            label = row.series if group == "series" else show(run.line.get(group, ""))
            parts.setdefault(label, []).append(run)
        for label, runs in parts.items():
            part = dataclasses.replace(row, runs=tuple(runs))
            pair = results.interval(part, x), results.interval(part, y)
            if None not in pair:
                found.append(Point(label, "" if x == results.axis else show(row.at) if row.at else "", *pair))
    return found


def against(folder: Path | Results, x: Column | str, y: Column | str, group: str = "method") -> Figure | None:
    """One column of runs.csv against another: a line a group, a marker a row, its place on the axis beside it.

    None where no finished run has both. Rows without a place on the sweep's axis are lines across it. References with both
    columns are diamonds, with `y` alone dashed lines; those far from the runs are named below.
    """
    results = _load(folder)
    x, y = _column(results, x), _column(results, y)
    found = points(results, x.column, y.column, group)
    if not found:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=SIZE)
        groups = list(dict.fromkeys(point.group for point in found))
        places = [row.series for row in results.students] if group == "series" else groups
        for label in groups:
            own = sorted((point for point in found if point.group == label), key=lambda point: point.x.mean)
            look = _look(places, label)
            xs, ys = [p.x.mean for p in own], [p.y.mean for p in own]
            bars = {"yerr": [_half(p.y) for p in own], "xerr": [_half(p.x) if x.headline else 0 for p in own]}
            axes.errorbar(xs, ys, **bars, **look, capsize=2.5, elinewidth=1, linewidth=1.3, label=_short(label, 28))
            for point in own:
                offset = {"xytext": (4, 4), "textcoords": "offset points"}
                axes.annotate(point.note, (point.x.mean, point.y.mean), **offset, color=look["color"], fontsize=8)
        across = _across(axes, results, y) if x.column == results.axis else []
        heights = [*(point.y.mean for point in found), *across]
        if min(heights) > 0 and max(heights) / min(heights) > 30:
            axes.set_yscale("log")
        spread = [point.x.mean for point in found]
        if not x.headline and min(spread) > 0 and max(spread) / min(spread) > 8:
            axes.set_xscale("log")
            if len(set(spread)) <= 8 and x.column == results.axis:
                axes.set_xticks(sorted(set(spread)), [f"{value:g}" for value in sorted(set(spread))], minor=False)
                axes.minorticks_off()
        if y.better == "one":
            axes.axhline(1, color=QUIET, linestyle=":", linewidth=1.2, zorder=0)
        far = _references(axes, results, x, y)
        below = [f"beside the markers: {results.axis}" if any(point.note for point in found) else "", far]
        axes.set_xlabel("\n".join([x.wish, *filter(None, below)]))
        axes.set_ylabel(_wrapped(y.wish, 28))
        if len(groups) > 1 or group == "series" or across:
            title = group if group not in ("method", "series") else None
            handles = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda pair: isinstance(pair[0], Line2D))
            figure.legend(
                *zip(*handles, strict=True), title=title, loc="outside upper left", ncols=2 if max(map(len, groups)) > 12 else 3
            )
    return figure


def _across(axes: Axes, results: Results, y: Column) -> list[float]:
    """Draw the rows that have no place on the sweep's axis, each a line with its interval as a band; returns their means."""
    series, means = [row.series for row in results.students], []
    for row in results.students:
        interval = None if row.at else results.interval(row, y.column)
        if interval is None:
            continue
        placed = [s for s in series if any(r.series == s and r.at for r in results.students)]
        look = _look([*placed, *series], _base(row.series, placed)) | {
            "linestyle": (0, (4, 3)),
            "markevery": [1],
            "clip_on": False,
        }
        across = axes.get_yaxis_transform()
        axes.plot([0, 1], [interval.mean] * 2, transform=across, **look, linewidth=1.3, label=_short(row.series, 28))
        half = _half(interval)
        axes.axhspan(interval.mean - half, interval.mean + half, color=look["color"], alpha=0.12, linewidth=0, zorder=0)
        means.append(interval.mean)
    return means


def _references(axes: Axes, results: Results, x: Column, y: Column) -> str:
    """Draw the references that lie near the runs; returns a sentence for the others."""
    limits = axes.get_xlim(), axes.get_ylim()
    far, lines = [], []
    for row in results.references:
        at = [row.runs[0].value(column.column) if row.done else None for column in (x, y)]
        if at[1] is None:
            continue
        near = [
            value is None or low - (high - low) <= value <= high + (high - low)
            for value, (low, high) in zip(at, limits, strict=True)
        ]
        if not all(near):
            far.append(f"{row.label} " + (_brief(at[1]) if at[0] is None else f"({_brief(at[0])}, {_brief(at[1])})"))
        elif at[0] is None:
            lines.append((at[1], row.label))
        else:
            axes.plot(*at, marker="d", color=QUIET, markersize=7, linestyle="none")
            axes.annotate(row.label, at, xytext=(6, -3), textcoords="offset points", color=QUIET, fontsize=8)
    for value, _ in lines:
        axes.axhline(value, color=QUIET, linestyle=(0, (4, 3)), linewidth=1, zorder=0)
    low, high = axes.get_ylim()
    label, at = "", -np.inf
    for value, name in [*sorted(lines), (np.inf, "")]:
        if value - at < 0.05 * (high - low):  # too close for a label of its own
            label += f", {name}"
            continue
        if label:
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(label, (1, at), xytext=(0, 2), ha="right", color=QUIET, fontsize=8, **place)
        label, at = name, value
    return _wrapped("off the axis: " + ", ".join(far)) if far else ""


def curves(folder: Path | Results, column: Column | str, x: Column | str) -> Figure | None:
    """A score over student updates or cost at the evaluated checkpoints, a panel a place on the axis, bands over seeds.

    None where no run was evaluated before its end.
    """
    results = _load(folder)
    column, x = _column(results, column), _column(results, x)
    panels = _panels(results)
    if not any(len(run.checkpoints) > 1 for run in results.runs):
        return None
    wide = min(2, len(panels))
    tall = -(-len(panels) // wide)
    with plt.rc_context(STYLE):
        size = (SIZE[0] if wide == 1 else 7.6, 0.6 + 2.5 * tall)
        figure, grid = plt.subplots(tall, wide, figsize=size, sharey=True, squeeze=False)
        series = [row.series for row in results.students]
        for axes, (title, rows) in zip(grid.flat, panels, strict=False):
            for row in rows:
                _curve(axes, row, column.column, x.column, _look(series, row.series))
            axes.set_title(title)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        _scale(grid.flat[: len(panels)])
        figure.supxlabel(x.wish, fontsize=STYLE["axes.labelsize"])
        figure.supylabel(_wrapped(column.wish, 30 if tall == 1 else 60), fontsize=STYLE["axes.labelsize"])
        _legend(figure, series, 4 if wide > 1 else 2)
    return figure


def _curve(axes: Axes, row: Row, column: str, x: str, look: dict) -> None:
    at: dict[float, list[tuple[float, float]]] = {}
    for run in row.runs:
        for point in run.checkpoints if run.scored else ():
            if x in point and column in point:
                at.setdefault(point["student_updates"], []).append((point[x], point[column]))
    whole = {updates: pairs for updates, pairs in sorted(at.items()) if len(pairs) == row.done}
    if whole:
        places = [float(np.mean([place for place, _ in pairs])) for pairs in whole.values()]
        means = [mean_interval([value for _, value in pairs]) for pairs in whole.values()]
        axes.plot(places, [each.mean for each in means], **look, linewidth=1.3)
        low, high = ([b if isfinite(b) else m.mean for m, b in zip(means, bs, strict=True)]
                     for bs in ([m.low for m in means], [m.high for m in means]))  # fmt: skip
        axes.fill_between(places, low, high, color=look["color"], alpha=0.15, linewidth=0)
    for run in row.runs:
        known = [point for point in run.checkpoints if x in point and column in point]
        if run.status == "collapsed" and known:
            axes.plot(known[-1][x], known[-1][column], marker="x", color=look["color"], markersize=7, linestyle="none")


def every_row(folder: Path | Results) -> Figure | None:
    """A panel a headline score: every row's mean with its 95 % interval, its runs as dots."""
    results = _load(folder)
    columns = [c for c in results.main if any(results.interval(row, c.column) for row in results.rows)]
    if not columns:
        return None
    series, wide = [row.series for row in results.students], _abreast(len(columns))
    tall = -(-len(columns) // wide)
    with plt.rc_context(STYLE):
        size = (2.2 + 2.4 * wide, tall * (0.9 + 0.2 * len(results.rows)))
        figure, grid = plt.subplots(tall, wide, figsize=size, sharey=True, squeeze=False)
        for axes, column in zip(grid.flat, columns, strict=False):
            references = []
            for place, row in enumerate(results.rows):
                interval = results.interval(row, column.column)
                if interval is None:
                    axes.annotate("—", (0.02, place), xycoords=("axes fraction", "data"), color=QUIET, va="center")
                elif row.reference:
                    references.append((place, interval.mean))
                else:
                    look = _look(series, row.series) | {"linestyle": "none"}
                    axes.errorbar(interval.mean, place, xerr=_half(interval), **look, capsize=2.5, elinewidth=1)
                    known = [float(values.mean()) for values in row.by_seed(column.column).values()]
                    axes.plot(known, np.full(len(known), place + 0.3), ".", color=look["color"], alpha=0.5, markersize=3)
            _reference_dots(axes, references)
            axes.set_title(_wrapped(column.wish, 26))
            axes.locator_params("x", nbins=4)
            axes.set_yticks(range(len(results.rows)), [_tick(row) for row in results.rows])
        for axes in list(grid.flat)[len(columns) :]:
            axes.set_visible(False)
        grid[0][0].set_ylim(len(results.rows) - 0.4, -0.6)
        if results.axis:
            figure.supxlabel(_beside(results).strip("\n"), fontsize=STYLE["axes.labelsize"])
    return figure


def _reference_dots(axes: Axes, references: Sequence[tuple[int, float]]) -> None:
    """Diamonds for the references; one far from the runs is a number at the border, so that the runs keep the axis."""
    low, high = axes.get_xlim() if axes.lines else (-np.inf, np.inf)
    span = high - low
    for row, value in references:
        if axes.lines and not low - span <= value <= high + span:
            side, align = (0.98, "right") if value > high else (0.02, "left")
            text = f"{_brief(value)} ▸" if value > high else f"◂ {_brief(value)}"
            place = ("axes fraction", "data")
            axes.annotate(text, (side, row), xycoords=place, color=QUIET, fontsize=8, ha=align, va="center")
        else:
            axes.plot([value], [row], marker="d", color=QUIET)


def differences(folder: Path | Results) -> Figure | None:
    """A panel a headline score: the paired difference of every row to the baseline with its interval."""
    results = _load(folder)
    baseline = results.baseline
    families = {c: against_baseline(results, c, baseline) for c in results.main} if baseline else {}
    families = {c: found for c, found in families.items() if any(each.interval for each, _ in found)}
    if not families:
        return None
    others = [row for row in results.students if row is not baseline]
    series, wide = [row.series for row in results.students], _abreast(len(families))
    tall = -(-len(families) // wide)
    with plt.rc_context(STYLE):
        size = (2.2 + 2.4 * wide, tall * (0.9 + 0.2 * len(others)))
        figure, grid = plt.subplots(tall, wide, figsize=size, sharey=True, squeeze=False)
        for axes, (column, found) in zip(grid.flat, families.items(), strict=False):
            axes.axvline(0, color=QUIET, linewidth=1)
            for place, (each, p) in enumerate(found):
                if each.interval is None:
                    axes.annotate("—", (0.02, place), xycoords=("axes fraction", "data"), color=QUIET, va="center")
                    continue
                look = _look(series, each.a.series) | {"linestyle": "none"}
                fill = {} if verdict(each, p) else {"markerfacecolor": GROUND}
                axes.errorbar(each.interval.mean, place, xerr=_half(each.interval), **look, **fill, capsize=2.5, elinewidth=1)
            axes.set_title(_wrapped(column.wish, 26))
            axes.locator_params("x", nbins=4)
            axes.set_yticks(range(len(others)), [_tick(row) for row in others])
        for axes in list(grid.flat)[len(families) :]:
            axes.set_visible(False)
        grid[0][0].set_ylim(len(others) - 0.4, -0.6)
        figure.supxlabel(f"difference to {baseline.label}{_beside(results)}", fontsize=STYLE["axes.labelsize"])
    return figure


def training(folder: Path | Results) -> Figure | None:
    """Quantities of the training logs over student updates, a line of panels each: means over bins first, then what most log."""
    results = _load(folder)
    count: dict[str, set[str]] = {}
    for row in results.students:
        for key in {key for run in row.runs for line in run.training for key in line}:
            count.setdefault(key, set()).add(row.method)
    clock = {UPDATES.column, COST, "seconds", "rate"}
    keys = sorted((key for key in count if key not in clock and "/" not in key), key=lambda key: (-len(count[key]), key))
    over_bins = [name for name in binned(results) if _numeric(_bins(results, name))]
    return _panel_grid(results, [*over_bins, *keys][:MOST_KEYS], UPDATES.wish, _training_line)


def _training_line(axes: Axes, row: Row, key: str, look: dict) -> None:
    at: dict[float, list[float]] = {}
    for run in row.runs:
        for line in run.training:
            values = [value for name, value in line.items() if name == key or name.startswith(f"{key}/")]
            if values:
                at.setdefault(line[UPDATES.column], []).append(float(np.mean(values)))
    every = sorted(updates for updates, values in at.items() if len(values) == max(map(len, at.values())))
    axes.plot(every, [np.mean(at[updates]) for updates in every], **(look | {"marker": ""}), linewidth=1.1)


def binned(results: Results) -> list[str]:
    """Names that are logged by bin, as `name/bin`."""
    keys = {key for run in results.runs for line in run.training for key in line if "/" in key}
    return sorted({key.partition("/")[0] for key in keys})


def _bins(results: Results, name: str) -> list[str]:
    """The keys of a name in the order of their bins."""
    keys = {key for run in results.runs for line in run.training for key in line if key.startswith(f"{name}/")}
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
        axes.plot([i for i, v in enumerate(values) if isfinite(v)], [v for v in values if isfinite(v)], **style, linewidth=1.1)
        axes.set_xticks(
            range(len(bins)), labels, rotation=40 if max(map(len, labels)) > 3 else 0, ha="right", rotation_mode="anchor"
        )

    return _panel_grid(results, [name], unit.strip("_ ") or "bin", line)


def _late_mean(row: Row, key: str) -> float:
    """Mean over runs and the last third of their logs."""
    means = []
    for run in row.runs:
        values = [
            line[key] for line in run.training if key in line and line[UPDATES.column] * 1.5 >= run.training[-1][UPDATES.column]
        ]
        means += [float(np.mean(values))] if values else []
    return float(np.mean(means)) if means else nan


def _panel_grid(
    results: Results, keys: Sequence[str], x_title: str, line: Callable[[Axes, Row, str, dict], None]
) -> Figure | None:
    """A line of panels a key, a panel a place on the axis, a line a series."""
    if not keys:
        return None
    panels, series = _panels(results), [row.series for row in results.students]
    with plt.rc_context(STYLE):
        size = (max(SIZE[0], 0.5 + 2.2 * len(panels)), 0.7 + 1.9 * len(keys))
        figure, grid = plt.subplots(len(keys), len(panels), figsize=size, sharey="row", sharex=True, squeeze=False)
        for i, (key, line_of_axes) in enumerate(zip(keys, grid, strict=True)):
            for axes, (title, rows) in zip(line_of_axes, panels, strict=True):
                for row in rows:
                    line(axes, row, key, _look(series, row.series))
                axes.set_title(title if i == 0 else "")
            _scale(line_of_axes)
            line_of_axes[0].set_ylabel(_wrapped(key.replace("_", " "), 20))
        figure.supxlabel(x_title, fontsize=STYLE["axes.labelsize"])
        _legend(figure, series, 4 if len(panels) > 1 else 2)
    return figure


# --- what figures share ---


def _column(results: Results, name: Column | str) -> Column:
    if isinstance(name, Column):
        return name
    known = {column.column: column for column in [*results.columns, *COSTS, UPDATES]}
    return known.get(name) or Column(name, name.rpartition(".")[2].replace("_", " "), "", None, False)


def _look(series: Sequence[str], label: str) -> dict:
    """Colour, marker and line of a series, the same in every figure."""
    i = list(dict.fromkeys(series)).index(label)
    line = ("-", (0, (5, 2)), (0, (1, 1.5)))[i // len(COLOURS) % 3]
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": line}


def _panels(results: Results) -> list[tuple[str, list[Row]]]:
    """The students' rows by their place on the axis."""
    places: dict[str, list[Row]] = {}
    for row in results.students:
        places.setdefault(row.at, []).append(row)
    ordered = sorted(places.items(), key=lambda item: number(item[0]) or 0.0)
    return [(say(results.axis or "", at), rows) for at, rows in ordered]


def _legend(figure: Figure, series: Iterable[str], columns: int) -> None:
    labels = list(dict.fromkeys(series))
    handles = [plt.Line2D([], [], **_look(labels, label)) for label in labels]
    figure.legend(handles, [_short(label, 28) for label in labels], loc="outside upper left", ncols=columns)


def _half(interval: Interval) -> float:
    return interval.half if isfinite(interval.half) else 0.0


def _scale(panels: Iterable[Axes]) -> None:
    """Logarithmic where every value is positive and they span more than a factor of 30."""
    panels = list(panels)
    values = np.concatenate([np.asarray(line.get_ydata(), float) for axes in panels for line in axes.lines] or [np.ones(1)])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() / values.min() > 30:
        for axes in panels:
            axes.set_yscale("log")


def _abreast(panels: int) -> int:
    return 2 if panels in (2, 4) else min(panels, 3)


def _beside(results: Results) -> str:
    return f"\nbeside the names: {results.axis}" if results.axis else ""


def _tick(row: Row) -> str:
    """A row's name where its place on the axis must not be cut off."""
    return f"{_short(row.series, 28)}  {show(row.at)}" if row.at else _short(row.series, 28)


def _short(label: str, most: int) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"


def _brief(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) > 1e-9 else "0"


def _wrapped(text: str, width: int = 62) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def _file_name(text: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "_", text).strip("_")


def _save(figure: Figure, folder: Path, name: str) -> Path:
    """Write name.svg, without a ground, for the page, and name.png on white; both small enough to commit. Returns the SVG."""
    target = Path(folder) / "figures" / name
    with plt.rc_context(STYLE):
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg.getvalue(), flags=re.DOTALL)
        text = re.sub(r' (?:d|x|y|points)="[^"]*"', lambda match: re.sub(r"(\.\d)\d+", r"\1", match[0]), text)
        text = re.sub(
            r' transform="rotate\(-0 [^"]*"|font-family: [^;"]*; |; stroke-linecap: square|; stroke-dashoffset: 0', "", text
        )
        used = set(re.findall(r"#([\w.-]+)", text))
        text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
        text = text.replace("<svg ", '<svg font-family="system-ui, sans-serif" ', 1)
        write_bytes(target.with_suffix(".svg"), re.sub(r"\s*\n\s*", "\n", text).encode())
        figure.set_layout_engine("none")  # it has been laid out
        raster, small = io.BytesIO(), io.BytesIO()
        figure.savefig(raster, format="png", facecolor="white")
        Image.open(raster).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
        write_bytes(target.with_suffix(".png"), small.getvalue())
    plt.close(figure)
    return target.with_suffix(".svg")


# --- command line ---


def find_column(results: Results, name: str) -> str:
    """The column of runs.csv that a name or its unambiguous beginning or part means; headline scores come first.

    Raises:
        PlotError: if none or several are meant.
    """
    known = list(results.rows[0].runs[0].line) if results.rows else []
    headline = [column.column for column in results.main]
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
    return _save(figure, folder, f"{_file_name(y)}_against_{_file_name(x)}_by_{_file_name(group)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: all figures of a results folder, or one."""
    parser = argparse.ArgumentParser(prog="distill_bench.plot", description="figures of a sweep's results")
    parser.add_argument("results", type=Path, help="folder with runs.csv, or a sweep's YAML or name")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the results of a named sweep lie")
    parser.add_argument("--x", default="cost", help="column of runs.csv, or its beginning (default: cost)")
    parser.add_argument("--y", help="draw this column alone")
    parser.add_argument("--group", default="method", help="a line for each value of this column; `series`: each kind of row")
    options = parser.parse_args(argv)
    folder = options.results if options.results.is_dir() else options.out / options.results.stem
    try:
        for path in [draw_pair(folder, options.x, options.y, options.group)] if options.y else plot(folder):
            print(path)
    except PlotError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
