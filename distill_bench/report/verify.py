"""Recompute the tables of results/NAME from its data files and name every difference.

    distill-bench verify results/NAME [--store runs]

The exit code is 1 if there is a difference. Data files, figures and page are compared with
digests.json, their SHA-256 when the report was written. With `--store` the data files are also
recomputed from the runs.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from distill_bench.report.data_files import data_files
from distill_bench.report.digests import DATA, GIVEN, digests
from distill_bench.report.read_store import StoreReadError, read_sweep
from distill_bench.report.results import Results, ResultsError, load
from distill_bench.report.rows import SCORED
from distill_bench.report.tables.files import table_files
from distill_bench.store.files import read_json, text_lines

MOST = 20  # differences shown per file


def verify(folder: Path, store: Path | None = None) -> list[str]:
    """Recompute the files of a results folder and return every difference.

    Args:
        store: also recompute the data files from the runs in this store.

    Raises:
        ResultsError: if the data files are missing or damaged, or no row is the baseline.
        StoreReadError: if the store does not know the sweep.
    """
    results = load(folder)
    expected = table_files(results)
    if store is not None:
        manifest = results.manifest
        requested = "--baseline" in manifest["provenance"]["command"]
        baseline = manifest["baseline"] if requested else None
        expected |= data_files(read_sweep(results.name, store), baseline, manifest["budget"])
    return [
        *_contradictions(results),
        *_unlike_files(results.folder, expected),
        *_changed_files(results.folder),
    ]


def _changed_files(folder: Path) -> Iterator[str]:
    """Name the files that changed after the report wrote them."""
    recorded = read_json(folder / "digests.json")
    if recorded is None:
        yield "digests.json is missing or damaged: `python -m distill_bench.report` writes it"
        return
    actual = digests(folder)
    for name in dict.fromkeys([*GIVEN, *recorded]):
        if name not in actual:
            yield f"{name} is missing"
        elif actual[name] != recorded.get(name):
            yield f"{name}: its SHA-256 differs from digests.json: it was changed after the report"
    for name in actual:
        if name not in recorded and name not in GIVEN:
            yield f"{name} is not in digests.json: it was added after the report"


def _contradictions(results: Results) -> Iterator[str]:
    """Name the scores in runs.csv that disagree with clips.csv or checkpoints.csv."""
    runs = results.runs.set_index("run_id")
    for (run_id, column), clips in results.clip_scores.items():
        value = runs.at[run_id, column] if run_id in runs.index and column in runs else np.nan
        tolerance = 1e-3 * max(1e-3, float(np.abs(clips).max()))
        if not abs(clips.mean() - value) <= tolerance:  # nan: clips without a score
            yield f"runs.csv: {column} of {run_id} is {value}, its clips average {clips.mean():.6g}"
    last = results.checkpoints.drop_duplicates("run_id", keep="last").set_index("run_id")
    scored = runs[runs["status"].isin(SCORED)]
    for column in (column.name for column in results.columns if column.name in last):
        ends = last[column].reindex(scored.index)
        values = scored[column]
        unlike = (ends - values).abs() > 1e-4 * values.abs().clip(lower=1e-6)
        for run_id in scored.index[unlike]:
            yield (
                f"runs.csv: {column} of {run_id} is {values[run_id]:.6g}, "
                f"its last line in checkpoints.csv has {ends[run_id]:.6g}"
            )


def _unlike_files(folder: Path, expected: Mapping[str, str]) -> Iterator[str]:
    """Name every difference between the files in the folder and the expected texts."""
    for name, text in expected.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
            continue
        unlike = _unlike_cells if name.endswith(".csv") else _unlike_lines
        differences = list(unlike(name, path.read_bytes().decode(errors="replace"), text))
        yield from differences[:MOST]
        if len(differences) > MOST:
            yield f"{name}: and {len(differences) - MOST} more"
    for path in sorted([*folder.glob("*.csv"), *folder.glob("*.tex")]):
        if path.name not in expected and path.name not in GIVEN:
            yield f"{path.name}: the report writes no such file: delete it"


def _unlike_cells(name: str, text: str, expected: str) -> Iterator[str]:
    lines, expected_lines = (list(csv.reader(io.StringIO(file))) for file in (text, expected))
    header = expected_lines[0]
    if not lines or lines[0] != header:
        yield f"{name}: its columns are not {', '.join(header)}"
        return
    for number, (line, wanted) in enumerate(zip_longest(lines[1:], expected_lines[1:]), 2):
        if line is None or wanted is None:
            yield f"{name}:{number}: {'a line is missing' if line is None else 'an extra line'}"
            continue
        for column, cell, wanted_cell in zip_longest(header, line, wanted):
            if cell != wanted_cell:
                yield (
                    f"{name}:{number}: {column} of {wanted[0]} is {cell!r}, "
                    f"the data give {wanted_cell!r}"
                )


def _unlike_lines(name: str, text: str, expected: str) -> Iterator[str]:
    pairs = zip_longest(text_lines(text), text_lines(expected))
    for number, (line, wanted) in enumerate(pairs, 1):
        if line != wanted:
            yield f"{name}:{number}: is {line!r}, the data give {wanted!r}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 if every table follows from the data, 1 if not, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="distill-bench verify",
        description="Recompute the tables of a results folder and compare them with its files.",
    )
    parser.add_argument("results", help="folder that a report wrote, or the name of a sweep")
    parser.add_argument("--store", type=Path, help="recompute the data files from these runs, too")
    options = parser.parse_args(argv)
    try:
        folder = load(options.results).folder
        differences = verify(folder, options.store)
    except (ResultsError, StoreReadError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if differences:
        print(*differences, sep="\n")
        return 1
    data = ", ".join(DATA)
    print(f"{folder}: every table follows from the data files")
    if options.store:
        print(f"recomputed from the runs: {data}")
        print("unchanged since the report, by digests.json: page and figures")
    else:
        print(f"unchanged since the report, by digests.json: page, figures, {data}")
        print("to recompute the data files from the runs: --store RUNS")
    return 0


if __name__ == "__main__":
    sys.exit(main())
