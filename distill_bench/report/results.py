"""Load a study from the data files in `results/<name>`, as data frames."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distill_bench.report.csv_files import REWRITE, ResultsError, read_frame, read_texts
from distill_bench.report.labels import Declared
from distill_bench.report.rows import COST, Row, group_rows, key_texts
from distill_bench.report.stats import Interval, crossed_interval, mean_interval
from distill_bench.store.runs import sweep_name

MANIFEST = {  # keys of sweep.json
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
}


@dataclass(frozen=True)
class Column:
    """A score or a cost: one column of runs.csv."""

    name: str
    title: str
    unit: str = ""
    better: str | None = None  # "lower", "higher", "one" (closer to 1), or None
    headline: bool = False  # shown first, and tested for differences

    @property
    def heading(self) -> str:
        """Title, unit and direction, for the head of a table."""
        arrow = {"lower": "↓", "higher": "↑", "one": "→ 1"}.get(self.better or "", "")
        unit = f"({self.unit})" if self.unit else ""
        return " ".join(filter(None, [self.title, unit, arrow]))

    @property
    def axis_label(self) -> str:
        """Title, unit and direction in words, for the axis of a figure."""
        directions = {"lower": "lower is better", "higher": "higher is better", "one": "1 is best"}
        details = ", ".join(filter(None, [self.unit, directions.get(self.better or "", "")]))
        return f"{self.title} ({details})" if details else self.title


# Costs of a run; tables show them after the scores.
COSTS = [
    Column(COST, "Training cost", "forward equivalents"),
    Column("train_seconds", "Training time", "s"),
    Column("peak_memory_gib", "Peak memory", "GiB"),
]


@dataclass(frozen=True, eq=False, repr=False)
class Results:
    """A study: its manifest, its data files as frames, and its runs grouped into rows.

    Attributes:
        folder: folder of the data files.
        manifest: sweep.json: question, swept keys, axis, baseline, columns, notes, provenance.
        runs: one line per run and per reference, including failed and missing runs.
        checkpoints: scores at the evaluated student updates, with cost and seconds so far.
        training: training logs, thinned.
        rows: references, then one row per configuration (all its seeds together).
        clip_scores: (run id, column) -> values (clips,); `clips` has them as a frame.
    """

    folder: Path
    manifest: Mapping[str, Any]
    runs: pd.DataFrame
    checkpoints: pd.DataFrame
    training: pd.DataFrame
    rows: tuple[Row, ...]
    clip_scores: Mapping[tuple[str, str], np.ndarray]

    def __repr__(self) -> str:
        rows = f"{len(self.students)} rows, {len(self.references)} references"
        return f"<results of {self.name}: {rows}>"

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def question(self) -> str:
        return self.manifest["question"]

    @property
    def swept(self) -> list[str]:
        """Keys that differ between runs of one method."""
        return self.manifest["swept"]

    @property
    def axis(self) -> str | None:
        """The swept key on the x axis of the figures, if any."""
        return self.manifest["axis"]

    @property
    def contrasts(self) -> list[dict[str, Any]]:
        """The declared contrasts: definition, weights of runs, and since when it is declared."""
        return self.manifest.get("contrasts", [])

    @property
    def students(self) -> list[Row]:
        return [row for row in self.rows if not row.reference]

    @property
    def references(self) -> list[Row]:
        return [row for row in self.rows if row.reference]

    @cached_property
    def columns(self) -> list[Column]:
        """All scores."""
        return [
            Column(**{"name" if key == "column" else key: value for key, value in entry.items()})
            for entry in self.manifest["columns"]
        ]

    @property
    def headline(self) -> list[Column]:
        """The scores that are shown first and tested for differences."""
        return [column for column in self.columns if column.headline]

    @cached_property
    def clips(self) -> pd.DataFrame:
        """Headline scores per clip: run_id, column, clip, value."""
        lines = [
            (run_id, column, clip, value)
            for (run_id, column), values in self.clip_scores.items()
            for clip, value in enumerate(values)
        ]
        return pd.DataFrame(lines, columns=["run_id", "column", "clip", "value"])

    @cached_property
    def table(self) -> pd.DataFrame:
        """Mean and interval of every score and cost per row: table.csv."""
        return read_frame(self.folder / "table.csv")

    @cached_property
    def differences(self) -> pd.DataFrame:
        """Paired differences of all pairs of rows: differences.csv."""
        return read_frame(self.folder / "differences.csv")

    @cached_property
    def contrast_table(self) -> pd.DataFrame:
        """Estimates of the declared contrasts: contrasts.csv; empty if there are none."""
        path = self.folder / "contrasts.csv"
        return read_frame(path) if path.is_file() else pd.DataFrame()

    @cached_property
    def equal_cost(self) -> pd.DataFrame:
        """Scores of every row at one training cost: equal_cost.csv."""
        return read_frame(self.folder / "equal_cost.csv")

    @property
    def baseline(self) -> Row | None:
        """The row that is subtracted in differences: the baseline of the sweep, else the first row.

        Raises:
            ResultsError: if no row, or more than one, matches the sweep's baseline.
        """
        keys = self.manifest["baseline"]
        if not keys:
            return self.students[0] if self.students else None
        rows = self.matching(keys)
        if not rows:
            known = "; ".join(row.name for row in self.students)
            raise ResultsError(f"no row is the baseline {key_texts(keys)}; known: {known}")
        if len(rows) > 1:
            names = "; ".join(row.name for row in rows)
            raise ResultsError(f"the baseline {key_texts(keys)} fits {len(rows)} rows: {names}")
        return rows[0]

    def matching(self, keys: Mapping[str, Any]) -> list[Row]:
        """Return the students' rows that have these keys and values."""
        return [row for row in self.students if row.matches(keys)]

    def clusters(self, lengths: set[int]) -> list[int] | None:
        """Prompt number of each clip; None unless these scores have one value per clip."""
        prompts = self.manifest["prompts"]
        return prompts if prompts is not None and lengths == {len(prompts)} else None

    def interval(self, row: Row, column: str) -> Interval | None:
        """Mean and interval of a row's score or cost; None without a value.

        Students: over seeds and clips, or over seeds if the score has no value per clip.
        References: over clips, or from the standard deviation under resampling of clips.
        """
        if (row, column) not in self._intervals:
            self._intervals[row, column] = self._interval(row, column)
        return self._intervals[row, column]

    @cached_property
    def _intervals(self) -> dict[tuple[Row, str], Interval | None]:
        """Intervals that were asked for: tables, page and figures ask for the same."""
        return {}

    def _interval(self, row: Row, column: str) -> Interval | None:
        scores = row.by_seed(column)
        if not scores:
            return None
        lengths = {len(values) for values in scores.values()}
        if row.reference:
            (values,) = scores.values()
            deviation = row.by_seed(f"{column}_sd")
            if lengths == {1} and deviation:  # resampling biases a distance, but not its spread
                (sd,) = (float(sds[0]) for sds in deviation.values())
                if sd:
                    mean = float(values[0])
                    return Interval(mean, mean - 1.96 * sd, mean + 1.96 * sd, 1)
            clusters = self.clusters(lengths)
            return crossed_interval(values[None], clusters=clusters, seeds_vary=False)
        if len(lengths) > 1:
            return mean_interval([float(values.mean()) for values in scores.values()])
        return crossed_interval(np.stack(list(scores.values())), clusters=self.clusters(lengths))

    @cached_property
    def footnotes(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Distinct warnings of the evaluators, each with its (run id, column) pairs."""
        places: dict[str, list[tuple[str, str]]] = {}
        for row in self.rows:
            warned = row.runs[row.runs["warnings"] != ""]
            for run_id, warnings in zip(warned["run_id"], warned["warnings"], strict=True):
                for column, texts in json.loads(warnings).items():
                    for text in texts:
                        places.setdefault(text, []).append((run_id, column))
        return list(places.items())

    def marks(self, row: Row, column: str) -> list[int]:
        """Footnote numbers (from 1) of a row's score."""
        marks = (self._marks.get((run_id, column), ()) for run_id in row.runs["run_id"])
        return sorted(set().union(*marks))

    @cached_property
    def _marks(self) -> dict[tuple[str, str], set[int]]:
        """Run id and column -> footnote numbers."""
        marks: dict[tuple[str, str], set[int]] = {}
        for i, (_, places) in enumerate(self.footnotes, 1):
            for place in places:
                marks.setdefault(place, set()).add(i)
        return marks


def load(results: str | Path) -> Results:
    """Load the results of a sweep.

    Args:
        results: the sweep's name, for `results/<name>`, or the folder itself.

    Raises:
        ResultsError: if a data file is missing or damaged.
    """
    folder = Path(results)
    if not folder.is_dir():
        folder = Path("results") / sweep_name(results)
    for name in ("sweep.json", "runs.csv"):  # the other files may be empty
        if not (folder / name).is_file():
            raise ResultsError(f"no {name} in {folder}; {REWRITE}{_known(folder)}")
    manifest = _read_manifest(folder / "sweep.json")
    texts = read_texts(folder / "runs.csv")
    texts_columns = ["run_id", "method", "role", "seed", "status", "warnings", *manifest["swept"]]
    scores = [entry["column"] for entry in manifest["columns"]] + [cost.name for cost in COSTS]
    _require(folder / "runs.csv", texts, texts_columns + scores)
    runs = _numbers(folder / "runs.csv", read_frame(folder / "runs.csv"), scores)
    runs["seed"] = runs["seed"].astype("Int64")
    for key in ("run_id", "method", "role", "status", "warnings", "reason"):
        runs[key] = texts[key]
    checkpoints = _logged(folder / "checkpoints.csv")
    training = _logged(folder / "training.csv")
    clip_scores = _clip_scores(folder / "clips.csv")
    rows = group_rows(
        runs,
        texts,
        manifest["swept"],
        manifest["axis"],
        checkpoints,
        training,
        clip_scores,
        manifest.get("titles", {}),
        {
            run: Declared(entry["label"], frozenset(entry["keys"]))
            for run, entry in manifest.get("labels", {}).items()
        },
    )
    return Results(folder, manifest, runs, checkpoints, training, rows, clip_scores)


def load_data_files(files: Mapping[str, str]) -> Results:
    """Load results from the texts of data files, to check them before writing any file."""
    with tempfile.TemporaryDirectory() as draft:
        for name, text in files.items():
            (Path(draft) / name).write_bytes(text.encode())
        return load(Path(draft))


def _known(folder: Path) -> str:
    """Name the studies beside a folder that does not exist; "" if there are none."""
    names = sorted(path.parent.name for path in folder.parent.glob("*/sweep.json"))
    return f"; known: {', '.join(names)}" if names and not folder.exists() else ""


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise ResultsError(f"{path} is cut off or damaged ({error}); {REWRITE}") from error
    missing = MANIFEST - set(manifest)
    if missing:
        raise ResultsError(f"{path} has no {', '.join(sorted(missing))}; {REWRITE}")
    return manifest


def _require(path: Path, frame: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ResultsError(f"{path} has no column {missing[0]}: it is cut off or old; {REWRITE}")


def _numbers(path: Path, frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    try:
        return frame.astype(dict.fromkeys(columns, float))
    except ValueError as error:
        raise ResultsError(f"{path} is damaged ({error}); {REWRITE}") from error


def _logged(path: Path) -> pd.DataFrame:
    """Read checkpoints.csv or training.csv; every column except run_id is numeric."""
    frame = read_frame(path)
    if frame.empty and "run_id" not in frame:
        return pd.DataFrame({"run_id": [], COST: []})
    _require(path, frame, ["run_id"])
    return _numbers(path, frame, [column for column in frame if column != "run_id"])


def _clip_scores(path: Path) -> dict[tuple[str, str], np.ndarray]:
    """Read clips.csv: (run id, column) -> values (clips,)."""
    frame = read_texts(path)
    if frame.empty:
        return {}
    _require(path, frame, ["run_id", "column", "values"])
    scores = {}
    for run_id, column, values in zip(
        frame["run_id"], frame["column"], frame["values"], strict=True
    ):
        try:
            scores[run_id, column] = np.array([float(value) for value in values.split()])
        except ValueError as error:
            raise ResultsError(f"{path} is damaged ({error}); {REWRITE}") from error
        if not values:
            raise ResultsError(f"{path} has no values for {column} of {run_id}; {REWRITE}")
    return scores
