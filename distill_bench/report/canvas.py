"""What figures share whatever they show: ink, legends and notes, views of axes, and the files that they become."""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.axis import Axis  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402
from PIL import Image  # noqa: E402

from distill_bench.report.stats import Interval  # noqa: E402
from distill_bench.store.files import write_bytes  # noqa: E402

# The page maps these four inks to its own, light or dark; see report.INK.
TEXT, RULE, QUIET, GROUND = "#1b1f24", "#d5dae0", "#59636e", "#fefefe"
# Okabe and Ito, 2008: told apart with any colour vision; yellow is left out, too pale for a line on white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", TEXT]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "h"]
DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1, 1.5))]
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
    "legend.handlelength": 2.5,
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
SIZE = (4.8, 3.4)  # inches; legible unscaled on a phone
TOO_NEAR = 0.15  # inches between two notes


def legend(
    figure: Figure, entries: Sequence[Line2D], spare: Axes | None = None, title: str | None = None
) -> None:
    """In a spare panel, or above the others, as many abreast as fit; the figure grows by its lines, so that no panel shrinks."""
    if spare:
        spare.legend(handles=entries, loc="upper left", title=title)
        return
    width, height = figure.get_size_inches()
    letters = [len(str(entry.get_label())) for entry in entries]

    def fits(abreast: int) -> bool:  # inches: a handle and its gaps, and a letter
        return (
            sum(0.65 + 0.063 * max(column) for column in np.array_split(letters, abreast)) < width
        )

    abreast = max((n for n in range(1, min(len(entries), 6) + 1) if fits(n)), default=1)
    figure.set_size_inches(width, height + 0.2 * (-(-len(entries) // abreast) + bool(title)))
    figure.legend(handles=entries, loc="outside upper left", ncols=abreast, title=title)


def annotate(axes: Axes, notes: Sequence[tuple[str, tuple[float, float], str]]) -> None:
    """Write notes beside their points; of two alike that would lie on each other one stays, in no line's colour."""
    drawn: list[tuple[str, np.ndarray, Any]] = []
    for note, place, colour in notes:
        at = axes.transData.transform(place)
        near = [
            text
            for other, there, text in drawn
            if other == note and np.hypot(*(at - there)) < axes.figure.dpi * TOO_NEAR
        ]
        if near:
            near[0].set_color(QUIET)
            continue
        offset = {"xytext": (4, 4), "textcoords": "offset points", "in_layout": False}
        drawn.append((note, at, axes.annotate(note, place, **offset, color=colour, fontsize=8)))


def together(
    named: Sequence[tuple[Any, str]], share: Callable[[Any], list[float]]
) -> list[tuple[Any, list[str]]]:
    """Names whose places are too close for a label each, at the first's place."""
    found: list[tuple[Any, list[str]]] = []
    for at, name in named:
        near = (
            names
            for place, names in found
            if np.allclose(share(place), share(at), rtol=0, atol=0.06)
        )
        for names in near:
            names.append(name)
            break
        else:
            found.append((at, [name]))
    return found


def few(names: Sequence[str]) -> str:
    """One or two names, or the first and how many more."""
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more"


def half(interval: Interval) -> float:
    """Half of an interval; 0 where it has none."""
    return interval.half if isfinite(interval.half) else 0.0


def drawn(panels: Iterable[Axes]) -> list[float]:
    """Every y value that panels show."""
    return [
        float(value)
        for axes in panels
        for line in axes.lines
        for value in np.asarray(line.get_ydata(), float)
    ]


def view(
    axis: Axis, seen: Sequence[float], ends: Sequence[float] = (), spread: float = 30.0
) -> None:
    """Limits that hold what is seen and its intervals, of long ones only a part.

    Logarithmic where every value is positive and they span more than a factor of `spread`.
    """
    seen = [value for value in seen if isfinite(value)]
    if not seen:
        return
    if min(seen) > 0 and max(seen) / min(seen) > spread:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    values, reached = straight(axis, seen), straight(axis, [end for end in ends if isfinite(end)])
    low, high = values.min(), values.max()
    span = (high - low or 0.1 * abs(low) or 1.0) * (
        0.25 if axis.get_scale() == "log" else 1
    )  # what is near 0 is far down
    least, most = low - span, high + span
    if (
        reached.size and axis.get_scale() != "log"
    ):  # means may lie close beside their intervals: hold the middle half of ends
        least, most = min(least, np.quantile(reached, 0.25)), max(most, np.quantile(reached, 0.75))
    low, high = max(reached.min(initial=low), least), min(reached.max(initial=high), most)
    margin = 0.05 * (high - low or span)
    _limit(axis, low - margin, high + margin)


def give_way(axis: Axis, values: Sequence[float]) -> None:
    """Widen the view where a value lies outside."""
    low, high = straight(axis, axis.get_view_interval())
    shares = [share(axis, value) for value in values]
    _limit(
        axis,
        low + min([0.0, *(share - 0.05 for share in shares)]) * (high - low),
        high + max([0.0, *(share - 0.95 for share in shares)]) * (high - low),
    )


def _limit(axis: Axis, low: float, high: float) -> None:
    """Set an axis's limits, as it places values."""
    limits = low, high
    if axis.get_scale() == "log":
        limits = 10**low, 10**high
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high - low < 2.3 else (1.0,)))
    axis.axes.set(**{f"{axis.axis_name}lim": limits})


def straight(axis: Axis, values: Any) -> np.ndarray:
    """Values as the axis places them: logarithms on a logarithmic one."""
    values = np.asarray(values, float)
    if axis.get_scale() != "log":
        return values
    with np.errstate(divide="ignore"):
        return np.log10(np.maximum(values, 0))


def share(axis: Axis, value: float) -> float:
    """Where a value lies between the ends of an axis, 0 to 1."""
    low, high = straight(axis, axis.get_view_interval())
    return float((straight(axis, value) - low) / (high - low))


def intervals(
    axes: Axes, marks: Sequence[tuple[float, float, float, str]], upright: bool = True
) -> None:
    """(place, low, high, colour) as thin lines within the view, with an arrow head where it cuts one."""
    marks = [mark for mark in marks if isfinite(mark[1]) and isfinite(mark[2])]
    if not marks:
        return
    bottom, top = sorted(axes.get_ylim() if upright else axes.get_xlim())
    at, lows, highs, colours = zip(*marks, strict=True)
    lines = axes.vlines if upright else axes.hlines
    lines(
        at,
        np.clip(lows, bottom, top),
        np.clip(highs, bottom, top),
        colors=colours,
        linewidth=0.7,
        alpha=0.5,
        zorder=1,
    )
    for place, low, high, colour in marks:
        for end, shape in ((bottom, "v" if upright else "<"), (top, "^" if upright else ">")):
            if (low < end) if end == bottom else (high > end):
                where = (place, end) if upright else (end, place)
                axes.plot(
                    *where,
                    marker=shape,
                    color=colour,
                    markersize=3.5,
                    alpha=0.8,
                    clip_on=False,
                    zorder=1,
                )


def abreast(panels: int) -> int:
    """How many of these panels fit beside each other."""
    return 2 if panels in (2, 4) else min(panels, 3)


def short(label: str, most: int) -> str:
    """A label of at most so many letters."""
    return label if len(label) <= most else f"{label[: most - 1]}…"


def brief(value: float) -> str:
    """A number of three digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) > 1e-9 else "0"


def wrapped(text: str, width: int = 62) -> str:
    """A text in lines of about `width` letters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def file_name(text: str) -> str:
    """A text as a file's name."""
    return re.sub("[^A-Za-z0-9]+", "_", text).strip("_")


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write name.svg, without a ground, for the page, and name.png on white; both small enough to commit. Returns the SVG."""
    target = Path(folder) / "figures" / name
    with plt.rc_context(STYLE):
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg.getvalue(), flags=re.DOTALL)
        text = re.sub(
            r' (?:d|x|y|points)="[^"]*"', lambda match: re.sub(r"(\.\d)\d+", r"\1", match[0]), text
        )
        text = re.sub(
            r' transform="rotate\(-0 [^"]*"|font-family: [^;"]*; |; stroke-linecap: square|; stroke-dashoffset: 0',
            "",
            text,
        )
        used = set(re.findall(r"#([\w.-]+)", text))
        text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
        text = text.replace("<svg ", '<svg font-family="system-ui, sans-serif" ', 1)
        write_bytes(target.with_suffix(".svg"), re.sub(r"\s*\n\s*", "\n", text).encode())
        figure.set_layout_engine("none")  # it has been laid out
        raster, small = io.BytesIO(), io.BytesIO()
        figure.savefig(raster, format="png", facecolor="white")
        Image.open(raster).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(
            small, "PNG", optimize=True
        )
        write_bytes(target.with_suffix(".png"), small.getvalue())
    plt.close(figure)
    return target.with_suffix(".svg")
