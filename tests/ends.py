"""The worker processes of a sweep, and how two stores of one sweep are held against each other."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from distill_bench.train import checkpoint


def workers(driver: int) -> list[int]:
    """The workers under a driver: each leads a session of its own, below the process that forks them."""
    try:
        children = [
            int(p)
            for path in Path(f"/proc/{driver}/task").glob("*/children")
            for p in path.read_text().split()
        ]
        return [
            pid
            for child in children
            for pid in ([child] if os.getsid(child) == child else workers(child))
        ]
    except OSError:  # one has just ended
        return []


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights of every role in a run's newest checkpoint."""
    return load_file(checkpoint.found(run)[-1] / "weights.safetensors")


def assert_same_ends(a: Path, b: Path) -> None:
    """The same runs, weights, scores and curves."""
    names = [sorted(p.parent.name for p in store.glob("*/result.json")) for store in (a, b)]
    assert names[0] and names[0] == names[1]
    for run in names[0]:
        first, second = (list(checkpoint.students(store / run).items()) for store in (a, b))
        assert [update for update, _ in first] == [update for update, _ in second]
        for (_, one), (_, other) in zip(first, second, strict=True):
            one, other = load_file(one), load_file(other)
            assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
        assert (a / run / "metrics.jsonl").read_text() == (b / run / "metrics.jsonl").read_text()
        curves = [
            [json.loads(line) for line in (store / run / "train.jsonl").read_text().splitlines()]
            for store in (a, b)
        ]
        assert [line | {"seconds": 0} for line in curves[0]] == [
            line | {"seconds": 0} for line in curves[1]
        ]
