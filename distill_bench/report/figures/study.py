"""Results of a sweep as data frames for figures: means per row, scores per run, logs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, nan
from pathlib import Path

import numpy as np
import pandas as pd

from distill_bench.report.figures import canvas
from distill_bench.report.figures.looks import Looks, Series, choose_looks
from distill_bench.report.figures.style import GROUND
from distill_bench.report.labels import (
    is_sampling,
    key_title,
    method_label,
    name_value,
    parse_number,
    show_value,
)
from distill_bench.report.results import COSTS, Column, Results, ResultsError, load
from distill_bench.report.rows import Row
from distill_bench.report.stats import losses
from distill_bench.sample.reference_kinds import FLOOR

MOST_PANELS = 8  # more are too small to read
MOST_LISTED = 100  # students in a figure with a line per row: more make an image too tall to open
MOST_SERIES = 24  # in a panel: more cannot be told apart
UPDATES = Column("student_updates", "Student updates")


class PlotError(ValueError):
    """The data files cannot be drawn; the message is one line."""


@dataclass(frozen=True, eq=False)
class Study:
    """Results with the looks of their series."""

    results: Results

    @property
    def axis(self) -> str:
        """Key of the sweep's axis, "" without one."""
        return self.results.axis or ""

    @property
    def axis_title(self) -> str:
        """Title of the sweep's axis, "" without one."""
        return key_title(self.axis) if self.axis else ""

    @cached_property
    def drawn(self) -> list[Row]:
        """Students of all figures but those with a line per row.

        Further samplings of a student share its training and its cost, so they are left out, unless
        they are the axis. Of more than MOST_SERIES series, those with the best rows remain.
        """
        trained = set(self._as_trained)
        series = dict.fromkeys(row.series for row in self._ranked if row in trained)
        best = set(list(series)[:MOST_SERIES])
        return [row for row in self._as_trained if row.series in best]

    @cached_property
    def _as_trained(self) -> list[Row]:
        students = self.results.students
        return [row for row in students if row.as_trained or is_sampling(self.axis)]

    @cached_property
    def listed(self) -> list[Row]:
        """Students of the figures with a line per row: of more than MOST_LISTED, the best."""
        best = set(self._ranked[:MOST_LISTED])
        return [row for row in self.results.students if row in best]

    @cached_property
    def _ranked(self) -> list[Row]:
        """The baseline, then the other students from best to worst in the ranking score."""

        def loss(row: Row) -> float:
            scores = losses(row.by_seed(self._ranking.name), self._ranking.better)
            return float(np.mean([values.mean() for values in scores.values()])) if scores else inf

        students = self.results.students
        if self._ranking:
            students = sorted(students, key=loss)
        return sorted(students, key=lambda row: row is not self.results.baseline)

    @cached_property
    def _ranking(self) -> Column | None:
        """The first headline score with a direction."""
        return next((column for column in self.results.headline if column.better), None)

    @cached_property
    def places(self) -> list[str]:
        """Values on the axis, in ascending order."""
        places = {row.at for row in self.drawn if row.at}
        return sorted(places, key=_place_order)

    @property
    def place_texts(self) -> list[str]:
        """`places` in words."""
        return [show_value(place, self.axis) for place in self.places]

    @cached_property
    def looks(self) -> Looks:
        """Looks of all series; further samplings are hollow, in the colour of their students."""
        rows_of: dict[str, list[Row]] = {}
        for row in self._as_trained:
            rows_of.setdefault(row.series, []).append(row)
        looks = choose_looks(
            {
                series: Series(sum(bool(row.at) for row in rows), rows[0].stem, rows[0].settings)
                for series, rows in rows_of.items()
            }
        )
        for trained, ways in self.ways.items():
            for row in ways:
                hollow = looks.styles[trained.series] | {"markerfacecolor": GROUND}
                looks.styles.setdefault(row.series, hollow)
        return looks

    @cached_property
    def ways(self) -> dict[Row, list[Row]]:
        """Student as trained -> its further samplings, for students that have any."""
        students = self.results.students
        trained = {row.training_keys: row for row in students if row.as_trained}
        ways: dict[Row, list[Row]] = {}
        for row in students:
            if not row.as_trained and row.training_keys in trained:
                ways.setdefault(trained[row.training_keys], []).append(row)
        return ways

    @cached_property
    def panels(self) -> dict[str, str]:
        """Panel title by place on the axis; rows without a place have the place "", first.

        Of more places than MOST_PANELS, the first, the last, and some at equal distances.
        """
        shown = canvas.evenly(len(self.places), MOST_PANELS)
        panels = {self.places[i]: name_value(self.axis, self.places[i]) for i in shown}
        if all(row.at for row in self.drawn):
            return panels
        return {"": f"without {self.axis_title}" if self.axis else ""} | panels

    @cached_property
    def listed_ways(self) -> dict[Row, list[Row]]:
        """`ways` of at most MOST_LISTED students, the best."""
        best = set([row for row in self._ranked if row in self.ways][:MOST_LISTED])
        return {row: further for row, further in self.ways.items() if row in best}

    @property
    def panels_note(self) -> str:
        """`series_note`, and how many of the places `panels` has if it leaves places out."""
        shown, count = len(self.panels.keys() - {""}), len(self.places)
        note = f"; {shown} of {count} values of {self.axis_title}" if shown < count else ""
        return self.series_note + note

    @property
    def series_note(self) -> str:
        """End of the caption of a figure of `drawn`: the series left out; "" without any."""
        shown, count = (len({row.series for row in of}) for of in (self.drawn, self._as_trained))
        return self._left_out(shown, count, "series")

    @property
    def listed_note(self) -> str:
        """End of the caption of a figure of `listed`: the rows left out; "" without any."""
        return self._left_out(len(self.listed), len(self.results.students), "rows")

    @property
    def ways_note(self) -> str:
        """End of the caption of a figure of `listed_ways`: the rows left out; "" without any."""
        return self._left_out(len(self.listed_ways), len(self.ways), "students")

    def _left_out(self, shown: int, count: int, things: str) -> str:
        if shown == count:
            return ""
        choice = f"best in {self._ranking.title}" if self._ranking else "first"
        return f"; {shown} of {count} {things}: the baseline and the {choice}"

    def means(self, column: str, rows: Sequence[Row]) -> pd.DataFrame:
        """Mean and interval of a column for every row; nan if missing.

        Columns: label, series, place, reference, value, low, high.
        """
        lines = []
        for row in rows:
            interval = self.results.interval(row, column)
            ends = (interval.mean, interval.low, interval.high) if interval else (nan, nan, nan)
            lines.append((row.label, row.series, row.at, row.reference, *ends))
        names = ["label", "series", "place", "reference", "value", "low", "high"]
        return pd.DataFrame(lines, columns=names)

    def drawn_means(self, column: str) -> pd.DataFrame:
        """`means` of the drawn students that have a value."""
        rows = self.means(column, self.drawn)
        return rows[rows.value.notna()]

    def placed(self, column: str) -> pd.DataFrame:
        """`drawn_means` of the students that have a place on the axis."""
        rows = self.drawn_means(column)
        return rows[rows.place != ""]

    def run_scores(self, column: str) -> pd.DataFrame:
        """Score of every finished run. Columns: label, score."""
        lines = [
            (row.label, float(values.mean()))
            for row in self.results.students
            for values in row.by_seed(column).values()
        ]
        return pd.DataFrame(lines, columns=["label", "score"])

    def floor(self, column: Column) -> float | None:
        """Distance of the teacher to its own clips of other seeds; None for other scores."""
        if column.better != "lower":
            return None
        floors = (_mean(row, column.name) for row in self.results.references if row.role == FLOOR)
        return next((floor for floor in floors if floor == floor), None)

    def pairs(self, x: str, y: str, group: str) -> pd.DataFrame:
        """Mean and interval of two columns for every row that has both.

        Columns: group, series, place, x, x_low, x_high, y, y_low, y_high.

        Args:
            group: column of runs.csv whose values split the rows, or "series".
        """
        lines = []
        for row in self.drawn:
            for value, part in self._split(row, group):
                intervals = [self.results.interval(part, column) for column in (x, y)]
                if None not in intervals:
                    ends = [end for i in intervals for end in (i.mean, i.low, i.high)]
                    lines.append((value, row.series, row.at, *ends))
        names = ["group", "series", "place", "x", "x_low", "x_high", "y", "y_low", "y_high"]
        return pd.DataFrame(lines, columns=names)

    def references(self, x: str, y: str) -> pd.DataFrame:
        """References with a value in y. Columns: label, role, x (may be nan), y."""
        lines = [
            (row.label, row.role, _mean(row, x), _mean(row, y)) for row in self.results.references
        ]
        frame = pd.DataFrame(lines, columns=["label", "role", "x", "y"])
        return frame[frame.y.notna()]

    def checkpoints(self, x: str, y: str) -> pd.DataFrame:
        """Two columns at every evaluation of a run.

        Columns: series, place, finished (number of finished runs of the row), run_id, status,
        student_updates, x, y.
        """
        points = self._evaluations
        names = ["series", "place", "finished", "run_id", "status", UPDATES.name, "x", "y"]
        if not {x, y} <= set(points):
            return pd.DataFrame(columns=names)
        return points.assign(x=points[x], y=points[y]).dropna(subset=["x", "y"])[names]

    @cached_property
    def _evaluations(self) -> pd.DataFrame:
        """checkpoints.csv of the drawn students, with the columns of `checkpoints`."""
        lines = [
            (row.series, row.at, row.done, *run)
            for row in self.drawn
            for run in zip(row.runs["run_id"], row.runs["status"], strict=True)
        ]
        runs = pd.DataFrame(lines, columns=["series", "place", "finished", "run_id", "status"])
        return runs.merge(self.results.checkpoints, on="run_id")

    def _split(self, row: Row, group: str) -> Iterator[tuple[str, Row]]:
        """Split the runs of a row by the values of a column, in words."""
        if group == "series":
            yield row.series, row
        elif group == "method":
            yield method_label(row.method, "", self.results.manifest.get("titles", {})), row
        else:
            for value, runs in row.runs.groupby(group, sort=False, dropna=False):
                text = show_value("" if pd.isna(value) else str(value), group)
                yield text, replace(row, runs=runs)

    @cached_property
    def logs(self) -> pd.DataFrame:
        """Training logs of the drawn students: training.csv with method, series and place."""
        lines = [
            (row.method, row.series, row.at, run)
            for row in self.drawn
            for run in row.runs["run_id"]
        ]
        runs = pd.DataFrame(lines, columns=["method", "series", "place", "run_id"])
        return runs.merge(self.results.training, on="run_id").dropna(axis="columns", how="all")


def opened(source: Path | Results | Study) -> Study:
    """Wrap results, or load them from a results folder or its runs.csv.

    Raises:
        PlotError: if the folder holds no results.
    """
    if isinstance(source, Study):
        return source
    if isinstance(source, Results):
        return Study(source)
    try:
        return Study(load(source.parent if source.name == "runs.csv" else source))
    except ResultsError as error:
        raise PlotError(str(error)) from error


def find_column(results: Results, name: str) -> str:
    """Find a column of runs.csv by its name or an unambiguous part of the name.

    Prefixes of headline scores take precedence.

    Raises:
        PlotError: if no column matches, or several do.
    """
    known = list(results.runs.columns)
    headline = [column.name for column in results.headline]
    candidates = (
        [column for column in known if column == name],
        [column for column in headline if column.startswith(name)],
        [c for c in known if c.startswith(name) or c.rpartition(".")[2] == name],
        [column for column in known if name in column],
    )
    for fitting in candidates:
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise PlotError(
                f"column {name!r} is ambiguous: it fits {', '.join(fitting)}; give a longer part"
            )
    raise PlotError(f"no column called {name!r} in runs.csv; known: {', '.join(known)}")


def column_of(results: Results, name: Column | str) -> Column:
    """Look up a column by name, with its title and direction; see `find_column`."""
    if isinstance(name, Column):
        return name
    known = {column.name: column for column in [*results.columns, *COSTS, UPDATES]}
    if name not in known and any(row.done for row in results.rows):
        name = find_column(results, name)  # before a run is finished, runs.csv has no scores
    return known.get(name) or Column(name, key_title(name), "", None, False)


def _place_order(place: str) -> float:
    return parse_number(place) or 0.0


def _mean(row: Row, column: str) -> float:
    """Score of a reference; nan if it has none."""
    return next((float(values.mean()) for values in row.by_seed(column).values()), nan)
