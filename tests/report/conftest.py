"""A small store, its results, and its tables without a page: drawing takes seconds."""

import json
from pathlib import Path

import pytest
from stores import RUNS, load_results, write_store

from distill_bench.report import Results
from distill_bench.report.digests import digests
from distill_bench.report.tables.files import table_files


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Store with the runs of RUNS and two references."""
    return write_store(tmp_path, RUNS)


@pytest.fixture
def results(store: Path, tmp_path: Path) -> Results:
    """Results of that store, in the folder `data`."""
    return load_results(store, tmp_path / "data")


@pytest.fixture(scope="session")
def tabulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Results folder with the data files and tables of a report, and its store; only read them.

    The page and the figures are other files with their digests.
    """
    root = tmp_path_factory.mktemp("tabulated")
    store = write_store(root, RUNS)
    folder = root / "results" / "speed"
    results = load_results(store, folder)
    texts = table_files(results) | {"report.html": "<p>11.1</p>"}
    texts |= {f"figures/overview.{kind}": kind for kind in ("svg", "png")}
    (folder / "figures").mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "digests.json").write_text(json.dumps(digests(folder)))
    return folder, store
