"""Teachers of every architecture, and a trained run on each."""

from pathlib import Path
from unittest import mock

import pipelines
import pytest
from export_runs import SIZES, STEPPING, make_run

from distill_bench.train.loop import train


@pytest.fixture(scope="module", autouse=True)
def one_clip_per_batch():
    """Draw clips one by one, like large clips and like a pipeline: batches may round otherwise."""
    with mock.patch("distill_bench.networks.pipeline.CLIPS_PER_BATCH", 1):
        yield


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    for name in SIZES:
        pipelines.save(name, root / name)
    return root


@pytest.fixture(
    scope="module",
    params=[(teacher, method) for teacher in SIZES for method in STEPPING],
    ids="-".join,
)
def run(request, teachers, tmp_path_factory) -> Path:
    """Two updates of a method on a teacher: dmd2 with noise at every step, sgmd by Euler steps."""
    teacher, method = request.param
    store = tmp_path_factory.mktemp("store")
    run = make_run(teachers / teacher, store, "whole", method=method, stepping=STEPPING[method])
    assert train(run)["status"] == "done"
    return run
