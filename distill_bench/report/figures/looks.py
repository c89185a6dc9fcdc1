"""Colour, marker and dash of every series, the same in each figure of a sweep.

The name of a series has words and numeric settings, as in "SGMD paper, fake-score lr 1e-4"; the
words are its stem. The main series, called lines, differ in colour and marker. A *control* has the
stem of a line but other settings, at fewer places of the sweep's axis; it has the colour of the
line, and is hollow. A series without a place on the axis is dashed, in the colour of the line whose
name it extends.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from matplotlib.lines import Line2D

from distill_bench.report.figures.style import COLOURS, DASHES, GROUND, MARKERS, QUIET
from distill_bench.report.labels import shortened

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


@dataclass(frozen=True)
class Series:
    """A series of rows, by its name."""

    places: int  # on the sweep's axis at which it has a row; 0 without a place or an axis
    stem: str  # its name without its settings
    settings: Mapping[str, str] = field(default_factory=dict)  # title of a key -> its words


def choose_looks(series: Mapping[str, Series]) -> Looks:
    """Choose the looks of all series.

    Args:
        series: by name, in the order of the sweep.
    """
    line_of, unplaced = _lines_of(series)
    lines = [name for name in series if name not in line_of]
    stems = {line: series[line].stem for line in lines}
    settings = {line: ", ".join(series[line].settings.values()) for line in lines}
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
    for name, line in line_of.items():
        dash = DASHED if name in unplaced else DOTTED
        styles[name] = styles[line] | {"markerfacecolor": GROUND, "linestyle": dash}
    controls = {name: line for name, line in line_of.items() if name not in unplaced}
    return Looks(styles, line_of, names, dashes, _controls_text(series, controls), unplaced)


def marker_sizes(places: Collection[str]) -> dict[str, float]:
    """Marker sizes that grow along the sweep's axis, in points."""
    return dict(zip(places, np.linspace(SMALLEST, LARGEST, len(places)), strict=True))


def _lines_of(series: Mapping[str, Series]) -> tuple[dict[str, str], list[str]]:
    """Map every series that is not a line to its line; also list the series without a place."""
    has_axis = any(one.places for one in series.values())
    unplaced = [name for name, one in series.items() if not one.places] if has_axis else []
    most: dict[str, str] = {}  # stem -> its series with most places
    for name, one in series.items():
        if one.places and (one.stem not in most or one.places > series[most[one.stem]].places):
            most[one.stem] = name
    line_of = {}
    for name, one in series.items():
        if name in unplaced:
            bases = [line for stem, line in most.items() if _extends(name, stem)]
            if bases:
                line_of[name] = max(bases, key=len)
        elif most and one.places < series[most[one.stem]].places:
            line_of[name] = most[one.stem]
    return line_of, unplaced


def _extends(name: str, stem: str) -> bool:
    """True if a name is the stem, or the stem followed by further words."""
    return name == stem or name.startswith((f"{stem} ", f"{stem}, "))


def _controls_text(series: Mapping[str, Series], controls: Mapping[str, str]) -> str:
    """Legend text for the controls: their shared setting, else the keys that differ."""
    keys, added = set(), set()
    for name, line in controls.items():
        own, base = series[name].settings.items(), series[line].settings.items()
        keys |= {key for key, _ in own ^ base}
        added.add(", ".join(sorted(words for _, words in own - base)))
    if not controls:
        return ""
    shared = len(added) == 1 and "" not in added
    return f"hollow: {added.pop()}" if shared else f"hollow: another {' or '.join(sorted(keys))}"
