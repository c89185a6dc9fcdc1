"""Shared fixtures: a tiny pipeline of Wan's real classes, its runs, and a reported sweep."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import TINY_RUN
from stores import RUNS, write_store

from distill_bench.config.resolve import resolve
from distill_bench.config.yaml_files import dump_yaml

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files with slow tests first: the fast ones then keep all workers busy to the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pipeline of Wan's own classes with random weights, for 5 frames of 16x16."""
    from distill_bench.testing.tiny import tiny_pipeline  # takes seconds, and few tests need it

    folder = tmp_path_factory.mktemp("pipelines") / "tiny-wan"
    tiny_pipeline(folder)
    return folder


@pytest.fixture
def make_run(tiny_wan: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the run folder `name`: the config `TINY_RUN` on `tiny_wan`, with other `fields`."""

    def make(name: str, **fields) -> Path:
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        config = resolve(TINY_RUN | {"teacher": str(tiny_wan)} | fields)
        (run / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
        return run

    return make


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Results folder that `report` wrote, and its hand-written store; tests only read them."""
    from distill_bench.report.write import report  # takes seconds, and few tests need it

    folder = tmp_path_factory.mktemp("reported")
    store = write_store(folder, RUNS)
    return report("speed", store, folder / "results").parent, store
