"""Trains run folders in two processes for test_sharding.py; `FOLDER:stop` stops after one update.

Writes FOLDER/held.json: share and bytes of each role's weights that rank 0 holds before training.
If FOLDER has "peak" in its name, also writes peak.json: peak bytes of the second update beyond the
bytes held between updates. They come from the allocator, which maps each large block separately
(MALLOC_MMAP_THRESHOLD_) and covers all threads: collectives free buffers in their own threads.
"""

import ctypes
import gc
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill_bench.networks.sharding import local
from distill_bench.store.files import write_json
from distill_bench.train.loop import finish, update
from distill_bench.train.records import Records
from distill_bench.train.run import Run
from distill_bench.train.setup import build_from


def train(run_dir: Path, stops: bool) -> None:
    """Train a run folder; `stops` after one update."""
    run = build_from(run_dir)
    records = Records(run, run_dir)
    records.resume()
    held = weights_held(run)
    if records.writes:
        write_json(run_dir / "held.json", held)
    if "peak" in run_dir.name:
        update(run)
        peak = peak_of_update(run)
        if records.writes:
            write_json(run_dir / "peak.json", peak)
    finish(run, records, stop=lambda: stops)


def weights_held(run: Run) -> dict[str, dict[str, float]]:
    """Share of each role's weights that this process holds, and their bytes."""
    nets = {**run.trained, "teacher": run.nets.unguided_teacher.net}
    weights = {role: list(net.parameters()) for role, net in nets.items()}
    shares = {role: share_held(tensors) for role, tensors in weights.items() if tensors}
    shares["moving average"] = share_held(list(run.average.weights.values()))
    sizes = {
        role: sum(local(p).numel() * p.element_size() for p in tensors)
        for role, tensors in weights.items()
    }
    return {"shares": shares, "bytes": sizes}


def share_held(tensors: list[torch.Tensor]) -> float:
    return sum(local(t).numel() for t in tensors) / sum(t.numel() for t in tensors)


def peak_of_update(run: Run) -> int:
    """Peak bytes of an update beyond the bytes held before it."""
    gc.collect()
    before = mapped()
    with PeakMapped() as peak:
        update(run)
    return peak.bytes - before


class PeakMapped(TorchDispatchMode):
    """Largest number of bytes mapped after any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, mapped())
        return result


class _Allocator(ctypes.Structure):
    """glibc's struct mallinfo2."""

    NAMES = (
        "arena",
        "ordblks",
        "smblks",
        "hblks",
        "hblkhd",
        "usmblks",
        "fsmblks",
        "uordblks",
        "fordblks",
        "keepcost",
    )
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


_libc = ctypes.CDLL("libc.so.6")
_libc.mallinfo2.restype = _Allocator


def mapped() -> int:
    """Bytes in the blocks that the allocator has mapped separately."""
    return _libc.mallinfo2().hblkhd


if __name__ == "__main__":
    torch.set_num_threads(1)
    # The end of a training destroys the process group, and ranks that join a new one at once may
    # miss each other: keep one group for all runs.
    with mock.patch("torch.distributed.destroy_process_group"):
        for argument in sys.argv[1:]:
            folder, _, stop = argument.partition(":")
            train(Path(folder), stops=bool(stop))
