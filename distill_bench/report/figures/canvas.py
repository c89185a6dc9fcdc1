"""General drawing tools: limits, interval bars, legends, files.

Figures are plain `matplotlib.figure.Figure` objects. Without pyplot there are no windows and no
global list of open figures, and the import is a second faster.
"""

import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from distill_bench.report.figures.style import QUIET, SMALL, STYLE
from distill_bench.report.results import Column
from distill_bench.store.files import write_bytes

MOST_TICKS = 8  # values of a sweep's axis that are labelled: more overlap

# --- limits ---


def set_limits(
    axis: Axis, values: Sequence[float], ends: Sequence[float] = (), log_from: float = 30.0
) -> None:
    """Choose the scale and the limits of an axis.

    The scale is logarithmic if all values are positive and span more than a factor of `log_from`.
    The limits contain every value. They extend towards the ends of the intervals, but not so far
    that one long interval flattens everything else.

    Args:
        values: values that must lie inside the limits; without finite values nothing happens.
        ends: ends of intervals, which may stay outside the limits.
    """
    values = [value for value in values if isfinite(value)]
    if not values:
        return
    if min(values) > 0 and max(values) / min(values) > log_from:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_formatter(FuncFormatter(lambda value, _: brief(value)))
        axis.set_minor_formatter(NullFormatter())
    logarithmic = axis.get_scale() == "log"
    shown = on_scale(axis, values)
    reached = on_scale(axis, [end for end in ends if isfinite(end)])
    low, high = shown.min(), shown.max()
    span = high - low or 0.1 * abs(low) or 1.0
    room = 0.25 * span if logarithmic else span  # a lower end near 0 is far down on a log scale
    least, most = low - room, high + room
    if reached.size and not logarithmic:
        # Intervals may be much longer than the means are apart: hold the middle half of the ends.
        least = min(least, np.quantile(reached, 0.25))
        most = max(most, np.quantile(reached, 0.75))
    low = max(reached.min(initial=low), least)
    high = min(reached.max(initial=high), most)
    margin = 0.05 * (high - low) or span
    _apply_limits(axis, low - margin, high + margin)


def extend_limits(axis: Axis, values: Sequence[float]) -> None:
    """Widen the limits of an axis until they contain `values`."""
    low, high = on_scale(axis, axis.get_view_interval())
    fractions = [axis_fraction(axis, value) for value in values]
    below = min([0.0, *(fraction - 0.05 for fraction in fractions)])
    above = max([0.0, *(fraction - 0.95 for fraction in fractions)])
    _apply_limits(axis, low + below * (high - low), high + above * (high - low))


def _apply_limits(axis: Axis, low: float, high: float) -> None:
    """Set limits, given on the scale of the axis (see `scaled`)."""
    limits = (low, high)
    if axis.get_scale() == "log":
        limits = (10**low, 10**high)
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high - low < 2.3 else (1.0,)))
    axis.axes.set(**{f"{axis.axis_name}lim": limits})


def on_scale(axis: Axis, values: Any) -> np.ndarray:
    """Convert values to the scale of the axis: decimal logarithms for a logarithmic axis."""
    values = np.asarray(values, float)
    if axis.get_scale() != "log":
        return values
    with np.errstate(divide="ignore"):
        return np.log10(np.maximum(values, 0))


def axis_fraction(axis: Axis, value: float) -> float:
    """Position of a value along an axis: 0 at its lower end, 1 at its upper end."""
    low, high = on_scale(axis, axis.get_view_interval())
    return float((on_scale(axis, value) - low) / (high - low))


def drawn_values(panels: Iterable[Axes]) -> list[float]:
    """Every y value of the lines in the panels."""
    return [
        y for axes in panels for line in axes.lines for y in np.asarray(line.get_ydata(), float)
    ]


# --- marks ---


def interval_bars(
    axes: Axes,
    at: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    colours: Sequence[str],
    upright: bool = True,
) -> None:
    """Draw intervals as thin lines, with arrow heads where the limits of the axes cut them off.

    Call it after the limits are set. Intervals that are not finite are left out.
    """
    bottom, top = axes.get_ylim() if upright else axes.get_xlim()
    bars = pd.DataFrame({"at": at, "low": low, "high": high, "colour": colours})
    bars = bars[np.isfinite(bars.low) & np.isfinite(bars.high)]
    draw = axes.vlines if upright else axes.hlines
    ends = (bars.low.clip(bottom, top), bars.high.clip(bottom, top))
    draw(bars["at"], *ends, colors=bars.colour, linewidth=0.8, alpha=0.55, zorder=1)
    cuts = ((bottom, "v<", bars.low < bottom), (top, "^>", bars.high > top))
    for limit, (up, right), cut in cuts:
        places = (bars["at"][cut], [limit] * cut.sum())
        style = {"marker": up if upright else right, "s": 3.5**2, "alpha": 0.8, "zorder": 1}
        if cut.any():
            axes.scatter(
                *places[:: 1 if upright else -1], c=bars.colour[cut], clip_on=False, **style
            )


def margin_labels(axes: Axes, labels: Sequence[tuple[float, str]]) -> None:
    """Write labels for y values into the right margin, spread so that they do not overlap.

    A thin line leads from each value to its label.
    """
    if not labels:
        return
    ordered = sorted((axis_fraction(axes.yaxis, y), text) for y, text in labels)
    height = 72 * 0.7 * axes.figure.get_figheight() / axes.get_gridspec().nrows  # about, in points
    gap = min(1.3 * SMALL / height, 1 / len(ordered))
    places = [place for place, _ in ordered]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    places[-1] = min(places[-1], 1.0)
    for i in reversed(range(len(places) - 1)):
        places[i] = min(places[i], places[i + 1] - gap)
    leader = {"arrowstyle": "-", "color": QUIET, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 0}
    leader["relpos"] = (0, 0.5)  # from the left of the label: across no other label
    for (value, text), place in zip(ordered, places, strict=True):
        axes.annotate(
            text,
            xy=(1, value),
            xytext=(1.04, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            arrowprops=leader,
            annotation_clip=False,
            color=QUIET,
            fontsize=SMALL,
            va="center",
        )


# --- legends and text ---


def legend(
    figure: Figure, entries: Sequence[Line2D], spare: Axes | None = None, title: str | None = None
) -> None:
    """Put the legend into a spare panel, or above the panels in as many columns as fit.

    The figure grows by the lines of the legend, so that no panel shrinks.
    """
    if spare:
        spare.legend(handles=entries, loc="upper left", title=title)
        return
    FigureCanvasAgg(figure)  # one renderer for all tries, which measures each text once
    for columns in range(min(len(entries), 6), 0, -1):
        drawn = figure.legend(handles=entries, loc="outside upper left", ncols=columns, title=title)
        if columns == 1 or drawn.get_window_extent().width <= figure.bbox.width:
            break
        drawn.remove()
    breaks = sum(str(entry.get_label()).count("\n") for entry in entries)
    lines = -(-len(entries) // columns) + breaks + bool(title)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * lines)


def category_ticks(axis: Axis, labels: Sequence[str]) -> None:
    """Label the places 0, 1, ... of an axis; of more than MOST_TICKS, some at equal distances."""
    shown = evenly(len(labels), MOST_TICKS)
    axis.set_ticks(shown, [labels[i] for i in shown])


def evenly(count: int, most: int) -> list[int]:
    """At most `most` indices below `count` at equal distances, both ends included."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()


def panels_per_line(count: int) -> int:
    """Number of panels side by side in a figure of `count` panels."""
    return 2 if count in (2, 4) else min(count, 3)


def brief(value: float) -> str:
    """Format a number with three significant digits."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) > 1e-9 else "0"


def wrapped(text: str, width: int) -> str:
    """Break a text into lines of at most `width` letters, if its words allow."""
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def titled(column: Column, width: int) -> str:
    """Title of a column; unit and direction go on a second line if they do not fit."""
    if len(column.axis_label) <= width:
        return column.axis_label
    note = column.axis_label.removeprefix(column.title).strip()
    return "\n".join(filter(None, [wrapped(column.title, width), note]))


# --- files ---


def file_name(text: str) -> str:
    """Turn a text into a file name."""
    return re.sub("[^A-Za-z0-9]+", "_", text).strip("_")


@rc_context(STYLE)
def save_figure(figure: Figure, folder: Path, name: str, png: bool = True) -> Path:
    """Write figures/name.svg (transparent, for the page) and, by default, name.png (on white).

    Both are small enough to be committed. Returns the path of the SVG.
    """
    target = Path(folder) / "figures" / name
    agg = FigureCanvasAgg(figure)  # lays out and draws with one renderer
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if not axis.get_label_text():
                axis.set_label_coords(0, 0)  # else all tick labels are measured to place ""
    figure.get_layout_engine().execute(figure)
    with rc_context({"figure.constrained_layout.use": False}):
        figure.set_layout_engine(None)  # else each file is laid out, and drawn twice
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        write_bytes(target.with_suffix(".svg"), _small_svg(svg.getvalue()).encode())
        if png:
            figure.set_facecolor("white")
            agg.draw()
            write_bytes(target.with_suffix(".png"), _small_png(agg))
    return target.with_suffix(".svg")


def _small_png(canvas: FigureCanvasAgg) -> bytes:
    """PNG of a drawn figure in at most 256 colours."""
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    palette, png = pixels.quantize(256, Image.Quantize.MAXCOVERAGE, dither=0), io.BytesIO()
    palette.save(png, "PNG", optimize=True)
    return png.getvalue()


def _small_svg(text: str) -> str:
    """Shrink an SVG of matplotlib to about 60 % of its size without a visible change."""
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*\n\s*", " ", text).replace("> <", "><")
    referenced = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="(.*?)"', lambda name: name[0] if name[1] in referenced else "", text)
    text = re.sub(r"<[^>]+>", lambda tag: _LONG.sub(r"\1", tag[0]), text)
    for _ in range(3):  # groups of one element, up to three around each other
        text = _GROUP_OF_ONE.sub(r"\1", text)
    return text


# digits after the second, spaces in styles, rotations by 0
_LONG = re.compile(r'(\.\d\d)\d+|(?<=[:;]) | transform="rotate\(-0 .*?\)"')
_GROUP_OF_ONE = re.compile(r"<g/>|<g>(<(?:path|use)[^>]*/>|<text[^>]*>[^<]*</text>)</g>")
