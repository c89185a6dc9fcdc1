from pathlib import Path

import pytest
from stores import RUNS, load_results, write_store

from distill_bench.report import Results


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Store with the runs of RUNS and two references."""
    return write_store(tmp_path, RUNS)


@pytest.fixture
def results(store: Path, tmp_path: Path) -> Results:
    """Results of that store, in the folder `data`."""
    return load_results(store, tmp_path / "data")
