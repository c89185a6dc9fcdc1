"""Colour, marker and dash of every series, the same in each figure of a sweep.

The name of a series has words and settings, as in `sgmd paper fake_score_lr=0.0001`; the words are
its stem. The main series, called lines, differ in colour and marker. A *control* has the stem of a
line but other settings, at fewer places of the sweep's axis; it has the colour of the line, and is
hollow. A series without a place on the axis is dashed, in the colour of the line whose name it
extends.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from matplotlib.lines import Line2D

from distill_bench.report.figures.canvas import shortened
from distill_bench.report.figures.style import COLOURS, DASHES, GROUND, MARKERS, QUIET

SOLID, DASHED, DOTTED = DASHES
SMALLEST, LARGEST = 3.5, 7.0  # points, of markers along the axis


@dataclass(frozen=True)
class Looks:
    """Keyword arguments of `Axes.plot` for every series, and the legend that explains them."""

    styles: dict[str, dict]
    line_of: dict[str, str]  # control or series without a place -> line with the same colour
    names: dict[str, str]  # line -> its name in the legend
    dashes: dict[str, str | tuple]  # settings -> dash, where one colour has several lines
    controls: str  # legend text for controls; "" without controls
    unplaced: list[str] = field(default_factory=list)

    def colour(self, series: str) -> str:
        """Colour of a series."""
        return self.styles[series]["color"]

    def legend(self, drawn: Iterable[str]) -> list[Line2D]:
        """Legend entries of the series that a figure shows."""
        drawn = set(drawn)
        entries = {}
        for line, name in self.names.items():
            followers = [series for series, base in self.line_of.items() if base == line]
            if not drawn.isdisjoint([line, *followers]) and name not in entries:
                style = self.styles[line] | ({"linestyle": SOLID} if self.dashes else {})
                entries[name] = Line2D([], [], **style, label=shortened(name, 44))
        for settings, dash in self.dashes.items():
            entries[settings] = Line2D([], [], color=QUIET, linestyle=dash, label=settings)
        if self.controls and any(s in drawn for s in self.line_of if s not in self.unplaced):
            hollow = {"marker": "o", "markerfacecolor": GROUND, "linestyle": DOTTED}
            entries["hollow"] = Line2D([], [], color=QUIET, **hollow, label=self.controls)
        for series in self.unplaced:
            if series in drawn and series in self.line_of:
                label = shortened(series, 44)
                entries[series] = Line2D([], [], **self.styles[series], label=label)
        return list(entries.values())


def choose_looks(places: Mapping[str, int]) -> Looks:
    """Choose the looks of all series.

    Args:
        places: number of places on the sweep's axis at which each series has a row, in the order
            of the sweep; 0 for a series without a place, and for all if the sweep has no axis.
    """
    line_of, unplaced = _lines_of(places)
    lines = [series for series in places if series not in line_of]
    stems = {line: _stem(line) for line in lines}
    settings = {line: line.removeprefix(stems[line]).strip() for line in lines}
    unique = list(stems.values())
    names = {line: stem if unique.count(stem) == 1 else line for line, stem in stems.items()}
    dashes: dict[str, str | tuple] = {}
    few_settings = len(set(settings.values())) <= len(DASHES)
    if len(lines) > len(COLOURS) >= len(set(unique)) and few_settings:
        # more lines than colours: give colours to the stems and dashes to the settings
        names = stems
        dashes = dict(zip(dict.fromkeys(settings.values()), DASHES, strict=False))
    hues = list(dict.fromkeys(names.values()))
    styles: dict[str, dict] = {}
    for line in lines:
        i = hues.index(names[line])
        dash = dashes.get(settings[line], DASHES[i // len(COLOURS) % len(DASHES)])
        styles[line] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHED if line in unplaced else dash,
        }
    for series, line in line_of.items():
        dash = DASHED if series in unplaced else DOTTED
        styles[series] = styles[line] | {"markerfacecolor": GROUND, "linestyle": dash}
    controls = {s: line for s, line in line_of.items() if s not in unplaced}
    return Looks(styles, line_of, names, dashes, _controls_text(controls), unplaced)


def marker_sizes(places: Collection[str]) -> dict[str, float]:
    """Marker sizes that grow along the sweep's axis, in points."""
    return dict(zip(places, np.linspace(SMALLEST, LARGEST, len(places)), strict=True))


def _lines_of(places: Mapping[str, int]) -> tuple[dict[str, str], list[str]]:
    """Map every series that is not a line to its line; also list the series without a place."""
    unplaced = [s for s, count in places.items() if count == 0] if any(places.values()) else []
    most = {}
    for series, count in places.items():
        stem = _stem(series)
        if count > places.get(most.get(stem, ""), 0):
            most[stem] = series
    line_of = {}
    for series, count in places.items():
        if series in unplaced:
            bases = [line for stem, line in most.items() if f"{series} ".startswith(f"{stem} ")]
            if bases:
                line_of[series] = max(bases, key=len)
        elif most and count < places[most[_stem(series)]]:
            line_of[series] = most[_stem(series)]
    return line_of, unplaced


def _stem(series: str) -> str:
    """The words of a series' name, without its settings."""
    return " ".join(word for word in series.split() if "=" not in word)


def _controls_text(controls: Mapping[str, str]) -> str:
    """Legend text for the controls: their shared setting, else the keys that differ."""
    differing = [set(series.split()) ^ set(line.split()) for series, line in controls.items()]
    added = [sorted(set(s.split()) - set(line.split())) for s, line in controls.items()]
    settings = {" ".join(words) for words in added}
    keys = sorted({word.partition("=")[0] for words in differing for word in words})
    if not controls:
        return ""
    shared = len(settings) == 1 and "" not in settings
    return f"hollow: {settings.pop()}" if shared else f"hollow: another {' or '.join(keys)}"
