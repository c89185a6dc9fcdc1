"""Conformance check of methods in two processes."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from distill_bench.method import Method
from distill_bench.store.files import read_json, text_lines
from distill_bench.testing.runs import Runs, named
from distill_bench.train import checkpoint

TRAIN_FOLDERS = "distill_bench.testing.train_folders"  # module that trains the given run folders


def check_two_ranks(
    *methods: str | type[Method] | Mapping[str, Any],
    folder: Path,
    fields: Mapping[str, Any] | None = None,
    tolerance: float = 1e-7,
    timeout: float | None = None,
) -> None:
    """Two processes train the same weights as one process with the whole batch, in float64.

    Args:
        fields: fields of every run, for instance `sharding`.
        tolerance: largest difference of a weight after two updates; by default a thousandth of a
            step. (Adam moves a weight by about its learning rate, 1e-4, whatever the size of its
            gradient. Networks compute their norms in float32 at any precision, and Adam turns the
            rounding of a tiny gradient into 1e-9 of weight. A fault moves weights by whole steps.)
        timeout: seconds for each of the two launches; None: 600, and 60 per method.

    Raises:
        AssertionError: naming the method that did not train, or the weight that differs.
    """
    fields = {
        "student_updates": 2,
        "precision": "float64",
        "exit_step": "last",
        "signals_every": None,
    } | dict(fields or {})
    together: dict[str, Path] = {}
    alone: dict[str, Path] = {}
    for index, method in enumerate(methods):
        runs = Runs(method, folder, f"ranks-{index}")
        with named(runs.name, "check_two_ranks"):
            together[runs.name] = runs.make(**fields)
            alone[runs.name] = runs.make(**fields)
    timeout = timeout or 600 + 60 * len(together)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    _train_all(together, [sys.executable, "-m", *torchrun, "-m", TRAIN_FOLDERS], timeout)
    _train_all(alone, [sys.executable, "-m", TRAIN_FOLDERS], timeout)
    for name, run_dir in together.items():
        with named(name, "check_two_ranks"):
            assert_same("two ranks", alone[name], run_dir, tolerance)


def _train_all(runs: Mapping[str, Path], command: Sequence[str], timeout: float) -> None:
    """Train run folders, by name of their method, in other processes.

    Raises:
        AssertionError: naming the first method that was not trained.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    failure = ""
    with subprocess.Popen(
        [*command, *map(str, runs.values())],
        env=environment,
        encoding="utf-8",
        errors="replace",
        **streams,
    ) as process:
        try:
            _, output = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its processes; SIGKILL would orphan them
            _, output = process.communicate()
            failure = f"not done after {timeout:g} s"
    if process.returncode and not failure:
        errors = [line for line in text_lines(output) if "Error" in line]
        failure = f"training failed: {' | '.join(errors) or output[-2000:]}"
    if failure:
        untrained = [name for name, run in runs.items() if not (run / "train.json").is_file()]
        name = untrained[0] if untrained else ", ".join(runs)
        raise AssertionError(f"{name}: check_two_ranks: {failure}")


def assert_same(what: str, run: Path, other: Path, tolerance: float) -> None:
    """Assert that two trained runs have the same final weights.

    Raises:
        AssertionError: beginning with `what`, naming the weight that differs most.
    """
    for folder in (run, other):
        summary = read_json(folder / "train.json")
        assert summary["status"] == "done", summary["reason"]
    weights, others = (
        load_file(checkpoint.folders(folder)[-1] / "weights.safetensors") for folder in (run, other)
    )
    unmatched = sorted(weights.keys() ^ others.keys())
    assert not unmatched, f"{what}: tensors in only one run, {unmatched}"
    errors = {
        name: float((weight - others[name]).abs().nan_to_num(nan=torch.inf).max())
        for name, weight in weights.items()
        if weight.numel()
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{what}, {worst} is off by {errors[worst]:.3g}"
