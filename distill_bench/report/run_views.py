"""Runs of a row as objects, for figures and page."""

from collections.abc import Iterator
from math import isfinite
from types import SimpleNamespace

import pandas as pd

from distill_bench.report.results import Results
from distill_bench.report.rows import SCORED, Row


def runs_of(row: Row) -> Iterator[SimpleNamespace]:
    """Yield the runs of a row."""
    for line in row.runs.to_dict("records"):
        run_id = line["run_id"]

        def value(column: str, line: dict = line) -> float | None:
            cell = line.get(column)
            known = isinstance(cell, int | float) and isfinite(cell)
            return float(cell) if known else None

        def points(frame: pd.DataFrame, run_id: str = run_id) -> list[dict[str, float]]:
            lines = frame[frame["run_id"] == run_id].drop(columns="run_id").to_dict("records")
            return [{key: x for key, x in line.items() if x == x} for line in lines]

        yield SimpleNamespace(
            run_id=run_id,
            line={key: "" if pd.isna(cell) else str(cell) for key, cell in line.items()},
            status=line["status"],
            seed="" if pd.isna(line["seed"]) else str(line["seed"]),
            scored=line["status"] in SCORED,
            value=value,
            checkpoints=points(row.checkpoints),
            training=points(row.training),
        )


def student_runs(results: Results) -> list[SimpleNamespace]:
    """Return the runs of all students' rows."""
    return [run for row in results.students for run in runs_of(row)]
