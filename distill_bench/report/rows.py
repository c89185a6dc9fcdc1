"""Rows of a study: runs that differ only in the training seed, or one reference."""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from distill_bench.config.errors import ConfigError
from distill_bench.config.overrides import matches, same_value
from distill_bench.config.yaml_files import parse_yaml
from distill_bench.report.csv_files import ResultsError
from distill_bench.report.labels import Declared, Label, is_sampling, label_rows, parse_number
from distill_bench.report.read_store import COST, DONE, REFERENCE, is_further_sampling
from distill_bench.sample.reference_kinds import STUDENT

SCORED = (DONE, REFERENCE)  # states of runs whose scores enter means


@dataclass(frozen=True, eq=False)
class Row:
    """All runs of one configuration, or one reference."""

    label: str
    series: str  # the label without the row's place on the sweep's axis
    stem: str  # the series without its numeric settings
    settings: Mapping[str, str]  # title of a key -> its words, of the numeric settings
    at: str  # value on the sweep's axis, "" if the row has none
    method: str  # for a reference: its kind
    role: str
    swept: Mapping[str, str]  # key -> value, as written in runs.csv
    runs: pd.DataFrame  # lines of runs.csv
    checkpoints: pd.DataFrame  # lines of checkpoints.csv
    training: pd.DataFrame  # lines of training.csv
    clips: Mapping[tuple[str, str], np.ndarray]  # (run id, column) -> values (clips,)

    @property
    def reference(self) -> bool:
        return self.role != STUDENT

    @property
    def as_trained(self) -> bool:
        """False for students that are sampled in a further way."""
        return not is_further_sampling(self.runs["run_id"].iloc[0])

    @cached_property
    def scored(self) -> pd.DataFrame:
        """Runs whose scores enter means."""
        return self.runs[self.runs["status"].isin(SCORED)]

    @property
    def done(self) -> int:
        return len(self.scored)

    @property
    def complete(self) -> bool:
        return self.done == len(self.runs)

    @property
    def lost(self) -> str:
        """Runs without scores by state, e.g. `1 failed, 2 missing`; "" if there are none."""
        states = self.runs["status"][~self.runs["status"].isin(SCORED)]
        counts = states.value_counts(sort=False)
        return ", ".join(f"{count} {state}" for state, count in counts.items())

    @property
    def count(self) -> str:
        """`5` if all runs have scores, else e.g. `3/5 (1 failed, 1 missing)`."""
        if self.reference:
            return REFERENCE if self.done else f"reference ({self.runs['status'].iloc[0]})"
        return str(self.done) if self.complete else f"{self.done}/{len(self.runs)} ({self.lost})"

    @property
    def keys(self) -> dict[str, str]:
        """Method and swept values, which identify the row."""
        return {"method": self.method} | dict(self.swept)

    @property
    def training_keys(self) -> tuple[tuple[str, str], ...]:
        """The keys that are not of the student's sampling, and their values."""
        return tuple((key, value) for key, value in self.keys.items() if not is_sampling(key))

    @property
    def name(self) -> str:
        """The keys in the syntax of `--baseline`, e.g. `method=dmd2,fake_score_updates=5`."""
        return key_texts({key: value or None for key, value in self.keys.items()})

    def by_seed(self, column: str) -> dict[Hashable, np.ndarray]:
        """Scores per training seed: one value per clip, (clips,), or a single value, (1,).

        Values per clip are shifted so that their mean is the score in runs.csv, which has more
        digits than clips.csv.
        """
        return self._by_seed.get(column, {})

    @cached_property
    def _by_seed(self) -> dict[str, dict[Hashable, np.ndarray]]:
        numbers = self.scored.select_dtypes("number")
        scores: dict[str, dict[Hashable, np.ndarray]] = {}
        for column, of_column in zip(numbers, numbers.to_numpy(float).T, strict=True):
            scores[column] = {}
            for (run_id, seed), value in zip(self._scored_seeds, of_column, strict=True):
                if np.isfinite(value):
                    clips = self.clips.get((run_id, column))
                    values = value[None] if clips is None else clips - clips.mean() + value
                    scores[column][seed] = values
        return scores

    def at_cost(self, column: str, cost: float) -> dict[Hashable, float]:
        """Scores per training seed at a training cost, interpolated between evaluated checkpoints.

        Seeds without a checkpoint on either side of the cost are left out.
        """
        scores = {}
        for seed, (costs, values) in self.curves(column, COST).items():
            if costs[0] <= cost * (1 + 1e-6) and costs[-1] >= cost * (1 - 1e-6):
                scores[seed] = float(np.interp(cost, costs, values))
        return scores

    def curves(
        self, column: str, clock: str = "student_updates"
    ) -> dict[Hashable, tuple[np.ndarray, np.ndarray]]:
        """Training seed -> values of a clock, ascending, and finite scores at them."""
        curves = {}
        for run_id, seed in self._scored_seeds:
            points = self._points.get(run_id, {})
            if column in points:
                known = np.isfinite(points[clock]) & np.isfinite(points[column])
                if known.any():
                    curves[seed] = (points[clock][known], points[column][known])
        return curves

    @cached_property
    def _scored_seeds(self) -> list[tuple[str, Hashable]]:
        """Run id and seed of the scored runs."""
        return list(zip(self.scored["run_id"], self.scored["seed"], strict=True))

    @cached_property
    def _points(self) -> dict[str, dict[str, np.ndarray]]:
        """Run id -> column -> values at its checkpoints, in ascending student updates."""
        if self.checkpoints.empty:
            return {}
        points = self.checkpoints.sort_values(["run_id", "student_updates"])
        starts = np.flatnonzero(~points["run_id"].duplicated())
        of_runs = points["run_id"].iloc[starts]
        parts = {
            name: np.split(values.to_numpy(), starts[1:])
            for name, values in points.drop(columns="run_id").items()
        }
        return {
            run_id: {name: part[i] for name, part in parts.items()}
            for i, run_id in enumerate(of_runs)
        }

    def matches(self, keys: Mapping[str, Any]) -> bool:
        """Return True if the row has these keys and values, see `is_value`."""
        return all(is_value(self.keys.get(key), value) for key, value in keys.items())


def group_rows(
    runs: pd.DataFrame,
    texts: pd.DataFrame,
    swept: Sequence[str],
    axis: str | None,
    checkpoints: pd.DataFrame,
    training: pd.DataFrame,
    clips: Mapping[tuple[str, str], np.ndarray],
    titles: Mapping[str, str] = {},
    declared: Mapping[str, Declared] = {},
) -> tuple[Row, ...]:
    """Group runs into rows: references first, then one row per configuration in the sweep's order.

    Args:
        runs: lines of runs.csv, numbers parsed.
        texts: the same lines with every cell as text, which distinguishes `1e-4` from `0.0001`.
        swept: keys that, with the method, identify a configuration.
        axis: swept key on the x axis of the figures.
        titles: display names of methods and presets.
        declared: run id -> label of the sweep file.
    """
    is_student = texts["role"] == STUDENT
    names = texts.loc[is_student, ["method", *swept]]
    groups = {_tuple(key): lines.index for key, lines in _grouped(names)}
    given = [declared.get(texts.at[index[0], "run_id"]) for index in groups.values()]
    table = pd.DataFrame(list(groups), columns=names.columns, dtype=str)
    labels = label_rows(table, axis, titles, given)
    rows = []
    for index in texts.index[~is_student]:
        kind = texts.at[index, "method"]
        rows.append((pd.Index([index]), Label(kind, kind, kind, {}), kind, {}))
    for ((method, *values), index), label in zip(groups.items(), labels, strict=True):
        rows.append((index, label, method, dict(zip(swept, values, strict=True))))
    return tuple(
        Row(
            label=label.text,
            series=label.series,
            stem=label.stem,
            settings=label.settings,
            at=keys.get(axis or "", ""),
            method=method,
            role=texts.at[index[0], "role"],
            swept=keys,
            runs=runs.loc[index],
            checkpoints=_of_runs(checkpoints, runs.loc[index, "run_id"]),
            training=_of_runs(training, runs.loc[index, "run_id"]),
            clips=clips,
        )
        for index, label, method, keys in rows
    )


def _grouped(names: pd.DataFrame):
    return names.groupby(list(names.columns), sort=False)


def _tuple(key: Any) -> tuple:
    return key if isinstance(key, tuple) else (key,)


def _of_runs(frame: pd.DataFrame, run_ids: pd.Series) -> pd.DataFrame:
    return frame[frame["run_id"].isin(run_ids)]


def parse_keys(text: str) -> dict[str, Any]:
    """Parse `method=dmd2,nfe=4`, the keys of a row; values are YAML, as in a sweep file.

    Raises:
        ResultsError: if a part has no `=`, or a value is not YAML.
    """
    keys: dict[str, Any] = {}
    parts = text.split(",")
    while parts:
        part = parts.pop(0)
        key, equals, value = part.partition("=")
        if not equals:
            raise ResultsError(
                f"{part!r} is not KEY=VALUE; name a row as method=NAME,KEY=VALUE,..."
            )
        try:
            keys[key.strip()] = parse_yaml(value)
        except ConfigError as error:
            if not parts:
                raise ResultsError(f"{part!r}: {error}") from error
            parts[0] = f"{part},{parts[0]}"  # the comma is inside a list or mapping
    return keys


def key_texts(keys: Mapping[str, Any]) -> str:
    """Keys in the syntax that `parse_keys` reads."""
    return ",".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in keys.items()
    )


def is_value(cell: str | None, value: Any) -> bool:
    """Return True if a cell of runs.csv holds a value: "" is null, numbers compare as numbers.

    Args:
        cell: text of the cell; None if runs.csv has no such column.
    """
    if cell is None:
        return False
    if value is None or isinstance(value, bool):
        return cell == ("" if value is None else str(value))
    if isinstance(value, list | dict):
        try:
            return same_value(json.loads(cell), value)
        except ValueError:
            return False
    number = parse_number(cell)
    return matches(cell, str(value)) or (number is not None and number == parse_number(str(value)))
