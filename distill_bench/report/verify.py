"""Recomputes tables and sentences of results/NAME from its data files, names every difference; exit code 1 where there is one.

    distill-bench verify results/NAME [--store runs]

What nothing in the folder holds twice (the data files, the page's figures and clips) is taken as given where its bytes are those
that the report wrote: digests.json. With the store the data files are made again from the runs themselves too. Needs no torch.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from distill_bench.report.gather import GatherError, data_files, read_sweep
from distill_bench.report.page import GIVEN, digests, page_parts
from distill_bench.report.results import Results, ResultsError, load
from distill_bench.report.tables import tables
from distill_bench.store.files import read_json
from distill_bench.store.runs import sweep_called

MOST = 20  # differences shown of one file


def verify(folder: Path, store: Path | None = None) -> list[str]:
    """What in the folder does not follow from its data files, or is not as written; from `store` too, where it is given.

    Raises:
        ResultsError: if there are no results in the folder, or they name a baseline that is not there.
        GatherError: if the store does not know the sweep.
    """
    results = load(folder)
    found = [*_inner(results)]
    if store is not None:
        about = results.about
        asked = about["baseline"] if "--baseline" in about["provenance"]["command"] else None
        found += _unlike(
            folder, data_files(read_sweep(results.name, store), asked, about["budget"])
        )
    found += _unlike(folder, tables(results))
    page = folder / "report.html"
    text = page.read_text() if page.is_file() else None
    if text is not None:
        found += [
            f"report.html: its {name} is not that of the data"
            for name, part in page_parts(results).items()
            if part not in text
        ]
    return [*found, *_unsealed(folder)]


def _unsealed(folder: Path) -> Iterator[str]:
    """Which files are not those that the report wrote."""
    known, mine = read_json(folder / "digests.json"), digests(folder)
    if known is None:
        yield "digests.json is missing or damaged: `python -m distill_bench.report` writes it"
        return
    for name in dict.fromkeys([*GIVEN, *known]):
        if name not in mine:
            yield f"{name} is missing"
        elif mine[name] != known.get(name):
            yield f"{name}: its SHA-256 is not that in digests.json: it was changed after the report was written"


def _inner(results: Results) -> Iterator[str]:
    """Where the data files contradict each other: clips that do not average to their score, ends that are not the score."""
    for row in results.rows:
        for run in row.runs:
            for column, clips in run.clips.items():
                value, tolerance = run.value(column), 1e-3 * max(1e-3, float(np.abs(clips).max()))
                if value is None or abs(float(clips.mean()) - value) > tolerance:
                    yield f"runs.csv: {column} of {run.run_id} is {run.line[column]}, its clips average {clips.mean():.6g}"
            last = run.checkpoints[-1] if run.checkpoints and run.scored else {}
            for column in results.columns:
                value, end = run.value(column.column), last.get(column.column)
                if (
                    end is not None
                    and value is not None
                    and abs(end - value) > 1e-4 * max(1e-6, abs(value))
                ):
                    yield f"runs.csv: {column.column} of {run.run_id} is {value:.6g}, its last line in checkpoints.csv {end:.6g}"


def _unlike(folder: Path, files: Mapping[str, str]) -> Iterator[str]:
    """Every difference of the files in the folder to the given texts."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
            continue
        text = path.read_text()
        if text == expected:
            continue
        differences = list(
            _cells(name, text, expected) if name.endswith(".csv") else _lines(name, text, expected)
        )
        yield from differences[:MOST]
        if len(differences) > MOST:
            yield f"{name}: and {len(differences) - MOST} more"


def _cells(name: str, text: str, expected: str) -> Iterator[str]:
    found, wanted = (list(csv.reader(io.StringIO(each))) for each in (text, expected))
    header = wanted[0]
    if not found or found[0] != header:
        yield f"{name}: its columns are not {', '.join(header)}"
        return
    for number, (mine, theirs) in enumerate(zip_longest(found[1:], wanted[1:]), 2):
        if mine is None or theirs is None:
            yield f"{name}:{number}: {'a line is missing' if mine is None else 'a line too many'}"
            continue
        for key, a, b in zip_longest(header, mine, theirs):
            if a != b:
                yield f"{name}:{number}: {key} of {theirs[0]} is {a!r}, the data give {b!r}"


def _lines(name: str, text: str, expected: str) -> Iterator[str]:
    for number, (a, b) in enumerate(zip_longest(text.splitlines(), expected.splitlines()), 1):
        if a != b:
            yield f"{name}:{number}: is {a!r}, the data give {b!r}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 where all follows from the data, 1 where it does not, 2 where there is nothing to verify."""
    parser = argparse.ArgumentParser(
        prog="distill-bench verify", description="recompute the tables of a results folder"
    )
    parser.add_argument(
        "results", type=Path, help="folder that distill_bench.report wrote, or the sweep's name"
    )
    parser.add_argument(
        "--store", type=Path, help="make the data files again from the runs in this store too"
    )
    options = parser.parse_args(argv)
    folder = (
        options.results
        if options.results.is_dir()
        else Path("results") / sweep_called(options.results)
    )
    try:
        found = verify(folder, options.store)
    except (ResultsError, GatherError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if found:
        print(*found, sep="\n")
        return 1
    given = ", ".join(name for name in GIVEN if name != "report.html")
    print(f"{folder}: every table follows from its data, and so does every sentence of the page")
    print(
        f"taken as given, with the digests of digests.json: the page's figures and clips{'' if options.store else ', ' + given}"
    )
    print(
        "made again from the runs: " + given
        if options.store
        else "--store RUNS makes these again from the runs"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
