"""TODO: testing.ranks."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from distill_bench.method import Method
from distill_bench.store.files import read_json
from distill_bench.testing.runs import Runs, named
from distill_bench.train import checkpoint


def check_two_ranks(
    *methods: str | type[Method] | Mapping[str, Any],
    folder: Path,
    fields: Mapping[str, Any] = {},
    tolerance: float = 1e-7,
    timeout: float | None = None,
) -> None:  # noqa: B006 - never changed
    """Two processes end where one does with their batches together, in float64; with `fields` of a run, for instance sharded.

    Args:
        tolerance: how far a weight may be off after two updates, by default a thousandth of a step (Adam moves a weight by about
            its learning rate, 1e-4, whatever the size of its gradient). Networks compute their norms in float32 whatever the
            precision, and Adam turns the rounding of a tiny gradient into 1e-9 of weight; one that a rank changes moves by steps.
        timeout: seconds for each of the two launches; None: 600 and 60 a method, for machines that do other things.

    Raises:
        AssertionError: naming the method that did not train, or which weight is off.
    """
    pairs: dict[str, tuple[Path, Path]] = {}
    for at, method in enumerate(methods):
        runs = Runs(method, folder, f"ranks-{at}")
        given = {
            "student_updates": 2,
            "precision": "float64",
            "exit_step": "last",
            "signals_every": None,
        } | fields
        with named(runs.name, "check_two_ranks"):
            pairs[runs.name] = (runs.make(**given), runs.make(**given))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    for which, command in enumerate(([*launch, "-m", __name__], [sys.executable, "-m", __name__])):
        _train_all(
            {name: pair[which] for name, pair in pairs.items()},
            command,
            timeout or 600 + 60 * len(pairs),
        )
    for name, (two, one) in pairs.items():
        with named(name, "check_two_ranks"):
            assert_same("two ranks", one, two, tolerance)


def _train_all(runs: Mapping[str, Path], command: Sequence[str], timeout: float) -> None:
    """Train run folders by the name of their method in other processes: AssertionError where one is not trained."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [*command, *map(str, runs.values())], env=environment, **streams
    ) as process:
        why = ""
        try:
            _, said = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its processes, which a kill would leave
            _, said = process.communicate()
            why = f"not done after {timeout:g} s"
    left = [name for name, run in runs.items() if not (run / "train.json").is_file()]
    if why or process.returncode:
        errors = [line for line in said.splitlines() if "Error" in line]
        why = why or f"training failed: {' | '.join(errors) or said[-2000:]}"
        raise AssertionError(f"{left[0] if left else ', '.join(runs)}: check_two_ranks: {why}")


def assert_same(what: str, one: Path, other: Path, tolerance: float) -> None:
    for run in (one, other):
        assert read_json(run / "train.json")["status"] == "done", read_json(run / "train.json")[
            "reason"
        ]
    a, b = (load_file(checkpoint.found(run)[-1] / "weights.safetensors") for run in (one, other))
    assert a.keys() == b.keys(), f"{what}: other tensors, {sorted(a.keys() ^ b.keys())}"
    errors = {
        key: float((a[key] - b[key]).abs().nan_to_num(nan=torch.inf).max())
        for key in a
        if a[key].numel()
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{what}, {worst} is off by {errors[worst]:.3g}"
