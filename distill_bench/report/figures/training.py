"""Figures of training logs: over student updates, by noise level, by term of the loss.

A quantity is logged as `name`, or as `name/bin`. Bins are intervals of a number, as in
`score_gap/sigma_0.02-0.26`, or terms of the student's loss, as in `x0_gradient_norm/fisher`.
"""

import os
import re
from math import inf, isfinite
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_bench.report.figures import canvas
from distill_bench.report.figures.study import UPDATES, Study, opened
from distill_bench.report.figures.style import SIZE, STYLE
from distill_bench.report.labels import show_value
from distill_bench.report.results import COST, Results

MOST_KEYS = 6  # quantities in one figure
CLOCK = [UPDATES.name, COST, "seconds", "rate"]
ROW = ["series", "place"]


@rc_context(STYLE)
def training(source: Path | Results | Study) -> Figure | None:
    """Draw quantities of the training logs over student updates.

    One line of panels per quantity, one panel for each of `study.panels`. Quantities with numeric
    bins come first, as means over their bins; the others follow, ordered by the number of methods
    that log them. Constant quantities and duplicates of other quantities are left out.
    """
    study = opened(source)
    quantities = _quantities(study)
    return _grid(study, quantities, UPDATES.axis_label)


def _quantities(study: Study) -> dict[str, pd.DataFrame]:
    """Return the quantities of `training`: name -> frame of series, place, x and y."""
    logs = study.logs
    plain = [c for c in logs if "/" not in c and c not in [*CLOCK, *ROW, "method", "run_id"]]
    methods = logs.groupby("method")[plain].count().gt(0).sum() if plain else {}
    names = sorted(plain, key=lambda key: (-methods[key], key))
    binned = [name for name in binned_names(study) if _numeric(_bins(study, name))]
    chosen: dict[str, pd.DataFrame] = {}
    for name in dict.fromkeys([*binned, *names]):
        keys = [name] if name in plain else _bins(study, name)
        frame = logs.assign(x=logs[UPDATES.name], y=logs[keys].mean(axis=1))
        means = frame.groupby([*ROW, "x"]).y.agg(["mean", "count"])
        runs = means["count"].groupby(ROW).transform("max")
        means = means["mean"][(means["count"] == runs) & (runs > 0)].rename("y")
        constant = means.groupby(ROW).nunique().le(1).all()
        copied = any(_equal(means, other) for other in chosen.values())
        if not (constant or copied):
            chosen[name] = means.reset_index()
        if len(chosen) == MOST_KEYS:
            break
    return chosen


def _equal(means: pd.Series, other: pd.DataFrame) -> bool:
    """Return whether two quantities have the same values in all rows that log both."""
    pairs = pd.concat([means, other.set_index([*ROW, "x"]).y], axis=1, join="inner")
    return len(pairs) > 0 and np.allclose(pairs.iloc[:, 0], pairs.iloc[:, 1], rtol=1e-3)


def binned_names(study: Study) -> list[str]:
    """Names that are logged by bin, as `name/bin`."""
    return sorted({column.partition("/")[0] for column in study.logs if "/" in column})


@rc_context(STYLE)
def by_bin(source: Path | Results | Study, name: str) -> Figure | None:
    """Draw a quantity that is logged as `name/bin`: mean over runs and the last third of training.

    Numeric bins are the x axis, with one panel per place on the sweep's axis. Terms of a loss have
    one panel each, with the places on the x axis.
    """
    study = opened(source)
    keys = _bins(study, name)
    if not keys:
        return None
    if _numeric(keys):
        return _by_number(study, name, keys)
    return _by_term(study, name, keys)


def _by_number(study: Study, name: str, keys: list[str]) -> Figure | None:
    labels = [key.partition("/")[2].replace("/", ", ") for key in keys]
    shared = os.path.commonprefix(labels) if len(labels) > 1 else ""
    unit = shared.rstrip("-.0123456789")  # "sigma_" of sigma_0.02-0.26, sigma_0.26-0.50
    means = _late_means(study, keys).rename(columns=dict(zip(keys, range(len(keys)), strict=True)))
    frame = means.melt(ROW, var_name="x", value_name="y").dropna()
    figure = _grid(study, {name: frame}, unit.strip("_ ") or "bin", markers=True)
    labels = [label.removeprefix(unit) for label in labels]
    tilted = len(labels) > 1 and max(map(len, labels)) > 3
    for axes in figure.axes if figure else []:
        axes.set_xticks(range(len(labels)), labels)
        if tilted:
            axes.tick_params("x", rotation=40)
            for tick in axes.get_xticklabels():
                tick.set(ha="right", rotation_mode="anchor")
    return figure


def _by_term(study: Study, name: str, keys: list[str]) -> Figure | None:
    """Draw the terms of a loss: one panel per term, the places of the sweep's axis on x."""
    means = _late_means(study, keys)
    wide = canvas.panels_per_line(len(keys))
    tall = -(-len(keys) // wide)
    figure = Figure(figsize=(max(SIZE[0], 0.6 + 2.4 * wide), 0.5 + 2.1 * tall))
    panels = list(figure.subplots(tall, wide, sharey=True, squeeze=False).flat)
    places = [place for place in ["", *study.places] if place in set(means.place)]
    labels = [show_value(place, study.axis) for place in places]
    if not study.axis:
        places = list(dict.fromkeys(means.series))
        labels = [""] * len(places)
    for axes, key in zip(panels, keys, strict=False):
        known = means[means[key].notna()]
        for series, line in known.groupby("series", sort=False):
            # without an axis, series stand side by side
            place = line.place if study.axis else line.series
            line = line.assign(x=place.map(places.index)).sort_values("x")
            axes.plot(line.x, line[key], **study.looks.styles[series])
        axes.set_title(" and ".join(key.split("/")[1:]))
        canvas.category_ticks(axes.xaxis, labels)
        axes.set_xlim(-0.4, len(places) - 0.6)
    for axes in panels[len(keys) :]:
        axes.set_visible(False)
    canvas.set_limits(panels[0].yaxis, canvas.drawn_values(panels))
    figure.supxlabel(study.axis_title)
    figure.supylabel(name.replace("_", " "))
    canvas.legend(figure, study.looks.legend(means.series))
    return figure


def _grid(
    study: Study, quantities: dict[str, pd.DataFrame], x_title: str, markers: bool = False
) -> Figure | None:
    """Draw one line of panels per quantity, and a panel for each of `study.panels` with logs.

    Args:
        quantities: name -> frame of series, place, x and y.
    """
    if not quantities:
        return None
    frames = pd.concat(quantities.values())
    logged = set(frames.place)
    panels = {place: title for place, title in study.panels.items() if place in logged}
    if not panels:
        return None
    size = (max(SIZE[0], 0.5 + 2.2 * len(panels)), 0.7 + 1.8 * len(quantities))
    figure = Figure(figsize=size)
    grid = figure.subplots(len(quantities), len(panels), sharey="row", sharex=True, squeeze=False)
    for (name, frame), line_of_panels in zip(quantities.items(), grid, strict=True):
        for axes, place in zip(line_of_panels, panels, strict=True):
            _draw_lines(axes, study, frame[frame.place == place], markers)
        canvas.set_limits(line_of_panels[0].yaxis, canvas.drawn_values(line_of_panels))
        line_of_panels[0].set_ylabel(canvas.wrapped(name.replace("_", " "), 20))
    for axes, title in zip(grid[0], panels.values(), strict=True):
        axes.set_title(title)
    figure.supxlabel(x_title)
    canvas.legend(figure, study.looks.legend(frames.series))
    return figure


def _draw_lines(axes: Axes, study: Study, frame: pd.DataFrame, markers: bool) -> None:
    lines = dict(list(frame.groupby("series")))
    for series, style in study.looks.styles.items():
        if series in lines:
            line = lines[series]
            axes.plot(line.x, line.y, **style if markers else style | {"marker": ""})


def _late_means(study: Study, keys: list[str]) -> pd.DataFrame:
    """Means over the runs of a row and the last third of their logs. Columns: *ROW, *keys."""
    logs = study.logs
    last = logs.groupby("run_id")[UPDATES.name].transform("max")
    late = logs[logs[UPDATES.name] * 1.5 >= last]
    runs = late.groupby([*ROW, "run_id"], sort=False)[keys].mean()
    means = runs.groupby(ROW, sort=False).mean().reset_index()
    return means[means[keys].notna().any(axis=1)]


def _bins(study: Study, name: str) -> list[str]:
    """Columns of a binned quantity, in the order of their bins."""
    keys = {column for column in study.logs if column.startswith(f"{name}/")}
    return sorted(keys, key=lambda key: (_first_number(key), key))


def _first_number(key: str) -> float:
    match = re.search(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", key.partition("/")[2])
    return float(match[0]) if match else inf


def _numeric(keys: list[str]) -> bool:
    """Return whether all bins are numbers or intervals of numbers."""
    return all(isfinite(_first_number(key)) for key in keys)
