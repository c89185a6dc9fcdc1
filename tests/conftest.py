"""Shared pieces of the tests: one thread, and a tiny pipeline of the real classes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of Wan's own classes and configuration keys with random weights: 5 frames of 16x16."""
    from distill_bench.testing.tiny import tiny_pipeline

    folder = tmp_path_factory.mktemp("pipelines") / "tiny-wan"
    tiny_pipeline(folder)
    return folder


@pytest.fixture
def make_run(request: pytest.FixtureRequest, tiny_wan: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the run folder of a config over the module's BASE, named by hand."""
    from distill_bench.config.resolve import resolve

    def make(name: str, **fields) -> Path:
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        config = resolve(
            request.module.BASE | {"teacher": str(tiny_wan), "method": "dmd2"} | fields
        )
        (run / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return run

    return make


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A results folder as `report` writes it, and the store (written by hand) that it comes from: never change them."""
    from stores import RUNS, write_store

    from distill_bench.report.page import report

    folder = tmp_path_factory.mktemp("reported")
    store = write_store(folder, RUNS)
    return report("speed", store, folder / "results").parent, store
