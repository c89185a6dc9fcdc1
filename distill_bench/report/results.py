"""The folder results/<name> read back: rows of runs that differ in the seed alone, from its data files and nothing else."""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from distill_bench.report.gather import DONE, REFERENCE
from distill_bench.report.stats import Interval, crossed_interval, mean_interval

ABOUT = (
    "name",
    "question",
    "swept",
    "axis",
    "baseline",
    "budget",
    "columns",
    "prompts",
    "notes",
    "provenance",
)  # of sweep.json
WRITE_AGAIN = "`python -m distill_bench.report SWEEP` writes it"


class ResultsError(ValueError):
    """The folder holds no results that can be read; one line that says why."""


@dataclass(frozen=True)
class Column:
    """One metric as its scores describe it."""

    column: str
    title: str
    unit: str
    better: str | None
    headline: bool

    @property
    def arrow(self) -> str:
        return {"lower": "↓", "higher": "↑", "one": "→ 1"}.get(self.better or "", "")

    @property
    def heading(self) -> str:
        return " ".join(
            part for part in (self.title, f"({self.unit})" if self.unit else "", self.arrow) if part
        )

    @property
    def wish(self) -> str:
        """Title, unit and direction in words, as an axis names it."""
        wish = {"lower": "lower is better", "higher": "higher is better", "one": "1 is best"}.get(
            self.better or ""
        )
        rest = ", ".join(part for part in (self.unit, wish) if part)
        return f"{self.title} ({rest})" if rest else self.title


# What a run cost; every table shows these after the scores.
COSTS = [
    Column("cost_forward_equivalents", "Training cost", "forward equivalents", None, False),
    Column("train_seconds", "Training time", "s", None, False),
    Column("peak_memory_gib", "Peak memory", "GiB", None, False),
]
COST = COSTS[0].column


@dataclass(frozen=True)
class Run:
    """A line of runs.csv with what the other files say of it."""

    line: dict[str, str]
    clips: dict[str, np.ndarray] = field(default_factory=dict)  # column -> (clips,)
    checkpoints: tuple[dict[str, float], ...] = ()  # by student updates
    training: tuple[dict[str, float], ...] = ()

    @property
    def run_id(self) -> str:
        return self.line["run_id"]

    @property
    def status(self) -> str:
        return self.line["status"]

    @property
    def seed(self) -> str:
        return self.line.get("seed", "")

    @property
    def scored(self) -> bool:
        """Whether its scores count in a mean."""
        return self.status in (DONE, REFERENCE)

    def value(self, column: str) -> float | None:
        """A score or a cost as a number, None where there is none."""
        return number(self.line.get(column))

    def values(self, column: str) -> np.ndarray | None:
        """A score clip by clip where it is known so, else alone, (clips,) or (1,); their mean is the score of runs.csv."""
        value = self.value(column)
        if value is None:
            return None
        clips = self.clips.get(column)
        return np.array([value]) if clips is None else clips - clips.mean() + value

    @property
    def warnings(self) -> dict[str, list[str]]:
        return json.loads(self.line.get("warnings") or "{}")

    def at_cost(self, column: str, budget: float) -> float | None:
        """The score at a cost, between the evaluated student updates on either side; None where there are none."""
        known = [
            (point[COST], point[column])
            for point in self.checkpoints
            if COST in point and column in point
        ]
        if (
            not known
            or not known[0][0] <= budget * (1 + 1e-6)
            or not known[-1][0] >= budget * (1 - 1e-6)
        ):
            return None
        return float(np.interp(budget, *zip(*known, strict=True)))


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but the seed, or one reference."""

    label: str
    series: str  # the label without its place on the sweep's axis
    at: str  # place on the axis, "" where there is none
    method: str
    swept: dict[str, str]
    runs: tuple[Run, ...]
    reference: bool

    @property
    def done(self) -> int:
        return sum(run.scored for run in self.runs)

    @property
    def complete(self) -> bool:
        return self.done == len(self.runs)

    @property
    def count(self) -> str:
        """`5` where all runs are there, else `3/5 (1 failed, 1 missing)`."""
        if self.reference:
            return "reference" if self.done else f"reference ({self.runs[0].status})"
        if self.complete:
            return str(self.done)
        states = [run.status for run in self.runs if not run.scored]
        lost = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        return f"{self.done}/{len(self.runs)} ({lost})"

    @property
    def keys(self) -> str:
        """`method=dmd2,fake_score_updates=5`, as `--baseline` takes it."""
        return ",".join(
            f"{key}={value}"
            for key, value in ({"method": self.method} | self.swept).items()
            if value
        )

    def by_seed(self, column: str) -> dict[str, np.ndarray]:
        """Values of the runs that count, (clips,) or (1,) a seed."""
        found = {run.seed: run.values(column) for run in self.runs if run.scored}
        return {seed: values for seed, values in found.items() if values is not None}


@dataclass(frozen=True)
class Results:
    """Everything that the data files of results/<name> say."""

    about: dict[str, Any]
    rows: tuple[Row, ...]  # references first

    @property
    def name(self) -> str:
        return self.about["name"]

    @property
    def question(self) -> str:
        return self.about["question"]

    @property
    def axis(self) -> str | None:
        return self.about["axis"]

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows if not row.reference for run in row.runs]

    @property
    def students(self) -> list[Row]:
        return [row for row in self.rows if not row.reference]

    @property
    def references(self) -> list[Row]:
        return [row for row in self.rows if row.reference]

    @cached_property
    def columns(self) -> list[Column]:
        return [Column(**column) for column in self.about["columns"]]

    @property
    def main(self) -> list[Column]:
        return [column for column in self.columns if column.headline]

    @property
    def baseline(self) -> Row | None:
        """The row that differences are taken to: the one that the sweep names, else its first."""
        wanted = self.about["baseline"]
        if not wanted:
            return self.students[0] if self.students else None
        for row in self.matching(wanted):
            return row
        raise ResultsError(
            f"no row is the baseline {wanted}; known: {'; '.join(row.keys for row in self.students)}"
        )

    def matching(self, wanted: Mapping[str, Any]) -> list[Row]:
        """The students' rows with these keys and values."""
        known = [(row, {"method": row.method} | row.swept) for row in self.students]
        return [
            row
            for row, keys in known
            if all(_same(keys.get(key), value) for key, value in wanted.items())
        ]

    def interval(self, row: Row, column: str) -> Interval | None:
        """Mean and interval of a row's score or cost: over seeds and clips, or over seeds where clips have no value."""
        values = row.by_seed(column)
        if not values:
            return None
        prompts = self.about["prompts"]
        if row.reference:
            (value,) = values.values()
            sd = row.runs[0].value(f"{column}_sd")
            if len(value) == 1 and sd:  # resampled clips, which bias a distance but not its spread
                return Interval(float(value[0]), value[0] - 1.96 * sd, value[0] + 1.96 * sd, 1)
            return crossed_interval(
                value[None], clusters=_fitting(prompts, value), seeds_vary=False
            )
        if len({len(each) for each in values.values()}) > 1:
            return mean_interval([float(each.mean()) for each in values.values()])
        stacked = np.stack(list(values.values()))
        return crossed_interval(stacked, clusters=_fitting(prompts, stacked[0]))

    @cached_property
    def footnotes(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Each distinct warning of the scores, with the (run id, column) that it concerns."""
        notes: dict[str, list[tuple[str, str]]] = {}
        for row in self.rows:
            for run in row.runs:
                for column, texts in run.warnings.items():
                    for text in texts:
                        notes.setdefault(text, []).append((run.run_id, column))
        return list(notes.items())

    def marks(self, row: Row, column: str) -> list[int]:
        """Numbers of the footnotes that concern a cell."""
        ids = {run.run_id for run in row.runs}
        return [
            i
            for i, (_, where) in enumerate(self.footnotes, 1)
            if any(r in ids and c == column for r, c in where)
        ]


def _fitting(prompts: Sequence[int] | None, values: np.ndarray) -> Sequence[int] | None:
    return prompts if prompts is not None and len(prompts) == len(values) else None


def _same(text: str | None, value: Any) -> bool:
    return text == str(value) or (number(text) is not None and number(text) == number(str(value)))


def number(text: str | None) -> float | None:
    """The finite number in a cell, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if isfinite(value) else None


def load(folder: Path) -> Results:
    """The results in a folder that `distill_bench.report` wrote.

    Raises:
        ResultsError: if a data file is missing or cut off.
    """
    for name in ("sweep.json", "runs.csv"):  # the others may have nothing to say
        if not (folder / name).is_file():
            raise ResultsError(f"no {name} in {folder}; {WRITE_AGAIN}")
    try:
        about = json.loads((folder / "sweep.json").read_text())
    except ValueError as error:
        raise ResultsError(
            f"{folder / 'sweep.json'} is cut off or damaged ({error}); {WRITE_AGAIN}"
        ) from error
    try:
        clips: dict[str, dict[str, np.ndarray]] = {}
        for line in read_csv(folder / "clips.csv"):
            clips.setdefault(line["run_id"], {})[line["column"]] = np.array(
                line["values"].split(), dtype=float
            )
        checkpoints, training = (
            _by_run(folder / name) for name in ("checkpoints.csv", "training.csv")
        )
        runs = [
            Run(line, clips.get(i, {}), tuple(checkpoints.get(i, [])), tuple(training.get(i, [])))
            for line in read_csv(folder / "runs.csv")
            for i in [line["run_id"]]
        ]
        return Results(
            {key: about[key] for key in ABOUT}, _rows(runs, about["swept"], about["axis"])
        )
    except ResultsError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ResultsError(
            f"the data files in {folder} are damaged ({type(error).__name__}: {error}); {WRITE_AGAIN}"
        ) from error


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file; none where there is no file.

    Raises:
        ResultsError: for a line that has not all of its cells.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    for number, line in enumerate(lines, 2):
        if None in line or None in line.values():
            raise ResultsError(
                f"{path}:{number} has not one cell a column: it is cut off or damaged; {WRITE_AGAIN}"
            )
    return lines


def _by_run(path: Path) -> dict[str, list[dict[str, float]]]:
    lines: dict[str, list[dict[str, float]]] = {}
    for line in read_csv(path):
        numbers = {
            key: value
            for key, text in line.items()
            if key != "run_id" and (value := number(text)) is not None
        }
        lines.setdefault(line["run_id"], []).append(numbers)
    return lines


def _rows(runs: Sequence[Run], swept: Sequence[str], axis: str | None) -> tuple[Row, ...]:
    """References, then one row for all seeds of a configuration, in the sweep's order."""
    references = [run for run in runs if run.run_id.startswith("reference-")]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if not run.run_id.startswith("reference-"):
            groups.setdefault(
                (run.line["method"], *(run.line.get(key, "") for key in swept)), []
            ).append(run)
    rows = [
        Row(r.line["method"], r.line["method"], "", r.line["method"], {}, (r,), True)
        for r in references
    ]
    telling = {
        method: _telling([key for key in groups if key[0] == method], swept, axis)
        for method in {k[0] for k in groups}
    }
    between = _between(list(groups), swept, axis)
    for (method, *values), own in groups.items():
        mine = dict(zip(swept, values, strict=True))
        same = [key for key in groups if key[0] == method]
        # a number or switch that most rows of the method have goes without saying
        usual = {
            k
            for i, k in enumerate(swept, 1)
            if sum(key[i] == mine[k] for key in same) > len(same) / 2
        }
        told = [say(k, mine[k]) for k in telling[method] if k not in usual or _word(mine[k])]
        told += [say(k, mine[k]) for k, most in between.items() if mine[k] != most]
        series = " ".join([method, *filter(None, told)])
        at = mine.get(axis or "", "")
        if (
            axis and not at
        ):  # a row that has no place on the axis is named by the words that few rows share
            told += [
                mine[k]
                for k in swept
                if k not in telling[method] and k not in usual and _word(mine[k])
            ]
            series = " ".join([method, *filter(None, told)])
        label = f"{series} {say(axis, at)}" if at else series
        rows.append(Row(label, series, at, method, mine, tuple(own), False))
    return tuple(rows)


def _telling(
    groups: Sequence[tuple[str, ...]], swept: Sequence[str], axis: str | None
) -> list[str]:
    """The fewest swept keys, the method's own first, that with the axis tell the rows of one method apart."""
    place = {key: i + 1 for i, key in enumerate(swept)}
    order = sorted(
        (key for key in swept if key != axis), key=lambda key: not key.startswith("method.")
    )
    chosen = [axis] if axis else []

    def told(keys: Sequence[str]) -> int:
        return len({tuple(group[place[key]] for key in keys) for group in groups})

    for key in order:
        if told([*chosen, key]) > told(chosen):
            chosen.append(key)
    return [key for key in chosen if key != axis]


def _between(
    groups: Sequence[tuple[str, ...]], swept: Sequence[str], axis: str | None
) -> dict[str, str]:
    """The swept keys of the run that differ between methods and not within one, each with the value that most rows have.

    They tell no rows apart, but a row that differs from the others in more than its method must say so.
    """
    found = {}
    for place, key in enumerate(swept, 1):
        values = {
            group[0]: {other[place] for other in groups if other[0] == group[0]} for group in groups
        }
        alone = all(len(each) == 1 for each in values.values())
        if (
            key != axis
            and not key.startswith("method.")
            and alone
            and len(set().union(*values.values())) > 1
        ):
            found[key] = Counter(group[place] for group in groups).most_common(1)[0][0]
    return found


def say(key: str, value: str) -> str:
    """A swept value in a label: a word stands alone, a switch is its key, a number has its key."""
    short = key.rpartition(".")[2]
    if not value or _word(value):
        return value
    return {"True": short, "False": f"no {short}"}.get(value) or f"{short}={show(value)}"


def _word(value: str) -> bool:
    return number(value) is None and value not in ("True", "False", "")


def show(value: Any) -> str:
    """A swept value for the eye; `—` where the key does not exist for a method."""
    text = "" if value is None else str(value)
    as_number = number(text)
    return (f"{as_number:g}" if as_number is not None else text) or "—"


def mapping(text: str) -> dict[str, str]:
    """`method=a,nfe=4` as a mapping.

    Raises:
        ResultsError: if a part has no `=`.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    wrong = [key for key, equals, _ in pairs if not equals]
    if wrong:
        raise ResultsError(f"{wrong[0]!r} is no KEY=VALUE; name a row as method=NAME,KEY=VALUE")
    return {key.strip(): value.strip() for key, _, value in pairs}


def cells(row: Row) -> Mapping[str, str]:
    """What tells a row apart, for a machine: method and every swept key."""
    return {"method": row.method} | row.swept
