"""Figures from runs.csv: each headline score against training cost, scores with intervals, training curves.

    python -m distill_bench.plot results/<sweep>
    python -m distill_bench.plot results/<sweep> --x COLUMN --y COLUMN --group COLUMN

Reads files only and needs no torch. Scores and methods are columns and values of runs.csv; none is known by name here.
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from distill_bench.stats import Interval, mean_interval  # noqa: E402
from distill_bench.store import read_json, read_jsonl  # noqa: E402

# Okabe and Ito, 2008: told apart with any colour vision; yellow is left out, too pale for a line on white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "svg.fonttype": "path",
    "svg.hashsalt": "distill_bench",
}
COST = "cost_forward_equivalents"
# What a training line says beside the losses.
NOT_CURVES = {"student_updates", "seconds", COST, "rate"}


class PlotError(ValueError):
    """The files cannot be drawn; one line that says why."""


@dataclass(frozen=True)
class Point:
    """The runs that differ in nothing but the seed, on one pair of columns."""

    group: str
    note: str
    x: Interval
    y: Interval


def plot(results: Path, store: Path | None = None) -> list[Path]:
    """Draw every figure of a sweep into results/figures; returns the PNG paths.

    Args:
        results: folder with runs.csv and columns.json, as report writes it.
        store: where the runs lie, for the training curves; None leaves them out.
    """
    lines = load_runs(results)
    about = read_json(results / "columns.json")
    headline = [column for column in about["columns"] if column["headline"]]
    paths = []
    for column in headline:
        name = f"{column['column']}_against_cost"
        figure = against(
            lines,
            about["swept"],
            COST,
            column["column"],
            "method",
            "training cost (forward equivalents)",
            _heading(column),
        )
        if figure:
            paths.append(_save(figure, results, name, f"{column['title']} against training cost, one line per method"))
    figure = intervals(lines, about["swept"], headline)
    if figure:
        titles = ", ".join(column["title"] for column in headline)
        paths.append(_save(figure, results, "headline", f"{titles}: mean and 95 % interval over seeds; dots are runs"))
    figure = training_curves(lines, store) if store else None
    if figure:
        paths.append(_save(figure, results, "training_curves", "Training losses; thin lines are runs, thick ones their mean"))
    return paths


def load_runs(results: Path) -> list[dict[str, str]]:
    path = Path(results) / "runs.csv"
    if not path.is_file():
        raise PlotError(f"no {path}; `python -m distill_bench.report` writes it")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _heading(column: dict[str, Any]) -> str:
    wish = {"lower": "lower is better", "higher": "higher is better", "one": "1 is best"}.get(column["better"] or "")
    rest = ", ".join(part for part in (column["unit"], wish) if part)
    return f"{column['title']} ({rest})" if rest else column["title"]


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if isfinite(value) else None


def points(lines: Iterable[dict[str, str]], swept: Sequence[str], x: str, y: str, group: str) -> list[Point]:
    """Mean and interval over seeds of both columns, for the runs that are done and have both."""
    cells: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for line in lines:
        pair = (_number(line.get(x)), _number(line.get(y)))
        if line["status"] == "done" and None not in pair:
            key = (line[group], line["method"], *(line.get(name, "") for name in swept))
            cells.setdefault(key, []).append(pair)
    result = []
    for (label, _, *values), pairs in cells.items():
        note = next((value for name, value in zip(swept, values, strict=True) if value and name != group), "")
        result.append(Point(label, note, *(mean_interval([pair[i] for pair in pairs]) for i in (0, 1))))
    return result


def against(
    lines: Sequence[dict[str, str]],
    swept: Sequence[str],
    x: str,
    y: str,
    group: str,
    x_title: str | None = None,
    y_title: str | None = None,
) -> Figure | None:
    """One column against another: a line a group, a marker a configuration, its first swept value beside it.

    None where no run has both. References near the runs are dashed lines; the others are named below.
    """
    found = points(lines, swept, x, y, group)
    if not found:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.4))
        groups = list(dict.fromkeys(point.group for point in found))
        for i, label in enumerate(groups):
            own = sorted((point for point in found if point.group == label), key=lambda point: point.x.mean)
            colour = COLOURS[i % len(COLOURS)]
            halves = [point.y.half if isfinite(point.y.half) else 0 for point in own]
            axes.errorbar(
                [point.x.mean for point in own],
                [point.y.mean for point in own],
                halves,
                color=colour,
                marker=MARKERS[i % len(MARKERS)],
                linestyle=("-", "--", ":")[i // len(COLOURS) % 3],
                capsize=3,
                label=label,
            )
            for point in own:
                offset = {"xytext": (5, 5), "textcoords": "offset points"}
                axes.annotate(point.note, (point.x.mean, point.y.mean), **offset, color=colour, fontsize=8)
        costs = [point.x.mean for point in found]
        if min(costs) > 0 and max(costs) / min(costs) > 20:
            axes.set_xscale("log")
        far = _reference_lines(axes, lines, y)
        key = next((name for name in swept if name != group), None)
        below = [f"markers: {key}" if key and any(point.note for point in found) else "", far]
        axes.set_xlabel("\n".join([x_title or x, *filter(None, ["; ".join(filter(None, below))])]))
        axes.set_ylabel(y_title or y)
        title = group if group != "method" else None
        figure.legend(title=title, loc="outside upper left", ncols=4)
    return figure


def _reference_lines(axes: Axes, lines: Iterable[dict[str, str]], y: str) -> str:
    """Draw the references that lie near the runs; returns a sentence for the others."""
    low, high = axes.get_ylim()
    span = high - low
    far, near = [], []
    for line in lines:
        value = _number(line.get(y))
        if line["status"] != "reference" or value is None:
            continue
        if low - 0.5 * span <= value <= high + 0.5 * span:
            near.append((value, line["method"]))
        else:
            far.append(f"{line['method']} {value:.3g}")
    label, at = "", -np.inf
    for value, name in [*sorted(near), (np.inf, "")]:
        if value < np.inf:
            axes.axhline(value, color="0.45", linestyle=(0, (4, 3)), linewidth=1, zorder=0)
        if value - at < 0.05 * span:  # too close for a label of its own
            label += f", {name}"
            continue
        if label:
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(label, (1, at), xytext=(4, 0), va="center", color="0.35", fontsize=8, **place)
        label, at = name, value
    return "off the axis: " + ", ".join(far) if far else ""


def intervals(lines: Sequence[dict[str, str]], swept: Sequence[str], columns: Sequence[dict[str, Any]]) -> Figure | None:
    """A panel a score: every configuration's mean with its 95 % interval, its runs as dots."""
    labels: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        names = [line["method"], *(f"{key.rpartition('.')[2]}={line[key]}" for key in swept if line.get(key))]
        labels.setdefault(line["method"] if line["run_id"].startswith("reference-") else " ".join(names), []).append(line)
    columns = [c for c in columns if any(_number(line.get(c["column"])) is not None for line in lines)]
    if not columns:
        return None
    methods = list(dict.fromkeys(line["method"] for line in lines if not line["run_id"].startswith("reference-")))
    wide = min(len(columns), 3)
    tall = -(-len(columns) // wide)
    with plt.rc_context(STYLE):
        size = (2.2 + 3.0 * wide, tall * (1.1 + 0.27 * len(labels)))
        figure, grid = plt.subplots(tall, wide, figsize=size, sharey=True, squeeze=False)
        for axes, column in zip(grid.flat, columns, strict=False):
            references = []
            for row, (_, own) in enumerate(labels.items()):
                known = [v for line in own if line["status"] in ("done", "reference")
                         if (v := _number(line.get(column["column"]))) is not None]  # fmt: skip
                if not known:
                    axes.annotate("—", (0.02, row), xycoords=("axes fraction", "data"), color="0.5", va="center")
                    continue
                if own[0]["status"] == "reference":
                    references.append((row, known[0]))
                    continue
                place = methods.index(own[0]["method"])
                colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
                interval = mean_interval(known)
                half = interval.half if isfinite(interval.half) else 0
                axes.errorbar(interval.mean, row, xerr=half, color=colour, marker=marker, capsize=3, markersize=5)
                axes.plot(known, np.full(len(known), row + 0.25), ".", color=colour, alpha=0.5, markersize=4)
            _reference_dots(axes, references)
            axes.set_title(_heading(column).replace(" (", "\n("))
            axes.set_yticks(range(len(labels)), list(labels))
        for axes in list(grid.flat)[len(columns) :]:
            axes.set_visible(False)
        grid[0][0].set_ylim(len(labels) - 0.4, -0.6)
    return figure


def _reference_dots(axes: Axes, references: Sequence[tuple[int, float]]) -> None:
    """Diamonds for the references; one far from the runs is a number at the border, so that the runs keep the axis."""
    low, high = axes.get_xlim() if axes.lines else (-np.inf, np.inf)
    span = high - low
    for row, value in references:
        if axes.lines and not low - span <= value <= high + span:
            side, align = (0.98, "right") if value > high else (0.02, "left")
            text = f"{value:.3g} ▸" if value > high else f"◂ {value:.3g}"
            place = ("axes fraction", "data")
            axes.annotate(text, (side, row), xycoords=place, color="0.35", fontsize=8, ha=align, va="center")
        else:
            axes.plot([value], [row], marker="d", color="0.45", markersize=5)


def training_curves(lines: Sequence[dict[str, str]], store: Path) -> Figure | None:
    """A panel a quantity that every method logs; thin lines are runs, the thick one the mean of a method's runs."""
    curves: dict[str, list[list[dict[str, Any]]]] = {}
    for line in lines:
        path = Path(store) / line["run_id"] / "train.jsonl"
        if path.is_file():
            curves.setdefault(line["method"], []).append(list(read_jsonl(path)))
    keys: dict[str, int] = {}
    for runs in curves.values():
        for key in dict.fromkeys(key for run in runs for entry in run for key in entry):
            keys[key] = keys.get(key, 0) + 1
    shared = [key for key, count in keys.items() if count == len(curves) and key not in NOT_CURVES][:6]
    if not shared:
        return None
    wide = min(len(shared), 3)
    tall = -(-len(shared) // wide)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(tall, wide, figsize=(1 + 3.2 * wide, 3 * tall), squeeze=False)
        for axes, key in zip(grid.flat, shared, strict=False):
            for i, (method, runs) in enumerate(curves.items()):
                colour = COLOURS[i % len(COLOURS)]
                at: dict[float, list[float]] = {}
                for run in runs:
                    pairs = [(e["student_updates"], e[key]) for e in run if isinstance(e.get(key), int | float)]
                    axes.plot(*zip(*pairs, strict=True), color=colour, alpha=0.25, linewidth=0.6) if pairs else None
                    for update, value in pairs:
                        at.setdefault(update, []).append(value)
                every = sorted(update for update, values in at.items() if len(values) == len(runs))
                axes.plot(every, [np.mean(at[u]) for u in every], color=colour, linewidth=1.6, label=method)
            _scale(axes)
            axes.set_title(key.replace("_", " "))
            axes.set_xlabel("student updates")
        for axes in list(grid.flat)[len(shared) :]:
            axes.set_visible(False)
        grid.flat[0].legend()
    return figure


def _scale(axes: Axes) -> None:
    """Logarithmic where every value is positive and they span more than a factor of 30."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines] or [np.ones(1)])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() / values.min() > 30:
        axes.set_yscale("log")


def _save(figure: Figure, results: Path, name: str, about: str) -> Path:
    """Write name.png, name.svg and name.txt (what it shows, for those who cannot see it)."""
    folder = Path(results) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    (folder / f"{name}.txt").write_text(about + "\n")
    return folder / f"{name}.png"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="distill_bench.plot", description="figures of a sweep's runs.csv")
    parser.add_argument("results", type=Path, help="folder with runs.csv, or a sweep's YAML or name")
    parser.add_argument("--store", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the results of a named sweep lie")
    parser.add_argument("--x", default=COST)
    parser.add_argument("--y", help="draw this column alone")
    parser.add_argument("--group", default="method")
    arguments = parser.parse_args(argv)
    results = arguments.results if arguments.results.is_dir() else arguments.out / arguments.results.stem
    try:
        for path in _one(results, arguments) if arguments.y else plot(results, arguments.store):
            print(path)
    except PlotError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _one(results: Path, arguments: argparse.Namespace) -> list[Path]:
    lines = load_runs(results)
    known = list(lines[0]) if lines else []
    for name in (arguments.x, arguments.y, arguments.group):
        if name not in known:
            raise PlotError(f"no column called {name!r} in runs.csv; known: {', '.join(known)}")
    swept = read_json(results / "columns.json")["swept"]
    figure = against(lines, swept, arguments.x, arguments.y, arguments.group)
    if figure is None:
        raise PlotError(f"no finished run has both {arguments.x} and {arguments.y}")
    name = f"{arguments.y}_against_{arguments.x}_by_{arguments.group}"
    return [_save(figure, results, name, f"{arguments.y} against {arguments.x}, one line per {arguments.group}")]


if __name__ == "__main__":
    sys.exit(main())
