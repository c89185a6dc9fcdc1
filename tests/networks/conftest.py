"""Runs with a folder of real clips, on which some methods train."""

import functools
from pathlib import Path

import pytest

from distill_bench.testing import tiny


@pytest.fixture
def make_run(make_run, tmp_path: Path):
    """The fixture `make_run` with `data` set to a folder of clips."""
    tiny.tiny_clips(tmp_path / "clips")
    return functools.partial(make_run, data=str(tmp_path / "clips"))
