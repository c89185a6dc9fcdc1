"""Write results/<sweep>: data files from the store, then tables, figures and the page."""

import contextlib
import gc
import json
from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path
from typing import Any

from distill_bench.report.data_files import data_files
from distill_bench.report.digests import digests
from distill_bench.report.page.html import render_page
from distill_bench.report.read_store import StoreReadError, read_sweep
from distill_bench.report.results import ResultsError, load_data_files
from distill_bench.report.tables.files import table_files
from distill_bench.store.files import write_bytes


class ReportError(ValueError):
    """There is nothing to report; the message is one line."""


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python look for cycles rarely: in a large store it walks millions of objects in vain."""
    thresholds = gc.get_threshold()
    gc.set_threshold(200_000, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


@_rare_collections()
def report(
    sweep: str | Path,
    store: Path,
    out: Path,
    baseline: Mapping[str, Any] | None = None,
    budget: float | None = None,
) -> Path:
    """Write data files, tables, figures and report.html to out/<sweep>.

    Nothing is written if an error is raised.

    Args:
        sweep: name or YAML of the sweep.
        store: folder of runs, e.g. `runs`.
        out: folder of all results, e.g. `results`.
        baseline: method and swept keys of the row that is subtracted in differences; default: the
            baseline of the sweep, else its first row.
        budget: training cost of the equal-cost table in forward equivalents; default: the largest
            cost that every finished run reaches.

    Returns:
        Path of report.html.

    Raises:
        ReportError: if the sweep or the baseline is unknown, or scores cannot share a column.
    """
    if budget is not None and not 0 < budget < inf:
        raise ReportError(f"budget {budget:g}: a cost in forward equivalents must be above 0")
    try:
        stored = read_sweep(sweep, Path(store))
        files = data_files(stored, baseline, budget)
        results = load_data_files(files)
        files |= table_files(results)
    except (StoreReadError, ResultsError) as error:
        raise ReportError(str(error)) from error
    folder = Path(out) / stored.name
    for name, text in files.items():
        write_bytes(folder / name, text.encode())
    # Matplotlib takes a second to import, so it comes after every check.
    from distill_bench.report.plot import most_workers, plot

    plot(folder, most_workers(), results)
    page = folder / "report.html"
    write_bytes(page, render_page(results, stored, folder).encode())
    write_bytes(folder / "digests.json", (json.dumps(digests(folder), indent=1) + "\n").encode())
    return page
