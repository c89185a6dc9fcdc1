"""A tiny run's config, comparisons of finished runs, and the worker processes of a sweep."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from distill_bench.train import checkpoint

# Two updates on 5 frames of 16x16, for the pipeline of the fixture `tiny_wan`.
TINY_RUN: dict[str, Any] = {
    "method": "dmd2",
    "student_updates": 2,
    "fake_score_updates": 2,
    "batch_size": 4,
    "nfe": 2,
    "frames": 5,
    "height": 16,
    "width": 16,
    "checkpoint_every": 1,
    "log_every": 1,
    "trackers": [],
    "evaluations": 1,
    "protocol": {"clips": 2, "teacher_steps": 2, "evaluators": ["motion"]},
}

# Id of `{"method": "dmd2"}` with mini-wan as it was when ids were first written.
OLD_RUN = {"teacher_hash": "04b8268b9123"}
OLD_RUN_ID = "dmd2-s0-5c88f7749f83"


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Weights of every role in a run's newest checkpoint."""
    return load_file(checkpoint.folders(run)[-1] / "weights.safetensors")


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Assert equal names and equal bits."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_same_weights(run: Path, other: Path) -> None:
    """Assert that two runs end with the same bits in every role's weights."""
    assert_same_tensors(weights(run), weights(other))


def assert_same_results(store: Path, other: Path) -> None:
    """Assert that two stores hold the same runs: students, scores and training curves."""
    names = [path.parent.name for path in sorted(store.glob("*/result.json"))]
    assert names
    assert names == [path.parent.name for path in sorted(other.glob("*/result.json"))]
    for name in names:
        run, other_run = store / name, other / name
        students, other_students = checkpoint.students(run), checkpoint.students(other_run)
        assert list(students) == list(other_students)
        for update in students:
            assert_same_tensors(load_file(students[update]), load_file(other_students[update]))
        assert (run / "metrics.jsonl").read_text() == (other_run / "metrics.jsonl").read_text()
        assert training_curve(run) == training_curve(other_run)


def training_curve(run: Path) -> list[dict[str, float]]:
    """Lines of train.jsonl without the seconds, which no two runs share."""
    lines = (run / "train.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": 0} for line in lines]


def workers(driver: int) -> list[int]:
    """Process ids of a driver's workers: the descendants that lead a session of their own."""
    try:
        children = [
            int(pid)
            for path in Path(f"/proc/{driver}/task").glob("*/children")
            for pid in path.read_text().split()
        ]
        return [
            pid
            for child in children
            for pid in ([child] if os.getsid(child) == child else workers(child))
        ]
    except OSError:  # a process ended in the meantime
        return []
