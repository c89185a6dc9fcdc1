"""What each of two processes does in test_sharding.py: trains the run folders given, `FOLDER:stop` for one update alone.

Writes FOLDER/held.json: by role the share of its weights that this process (the first) held before it trained, and their bytes.
Of a folder with peak in its name, peak.json: how many bytes more than between its updates it held at once in the second. The
allocator maps what is large by itself (MALLOC_MMAP_THRESHOLD_) and counts it for all threads: collectives free buffers in others.
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
from distill_bench.train import loop, trainer


class Watched(trainer.Trainer):
    """Says what it holds."""

    def resume(self) -> None:
        super().resume()
        nets = {**self.trained, "teacher": self.nets.unguided_teacher.net}
        held = {
            role: sum(local(p).numel() for p in net.parameters())
            / sum(p.numel() for p in net.parameters())
            for role, net in nets.items()
            if any(True for _ in net.parameters())
        }
        held |= {
            "moving average": sum(local(v).numel() for v in self.ema.values())
            / sum(v.numel() for v in self.ema.values())
        }
        size = {
            role: sum(local(p).numel() * p.element_size() for p in net.parameters())
            for role, net in nets.items()
        }
        if self.accelerator.is_main_process:
            write_json(self.run_dir / "held.json", {"shares": held, "bytes": size})

    def update_student(self) -> list:
        self.watch = "peak" in self.run_dir.name and self.student_updates == 1
        if not self.watch:
            return super().update_student()
        gc.collect()
        self.before = mapped()
        with Mapped() as self.most:
            return super().update_student()

    def update_fake_score(self, *inputs: object) -> None:
        if not self.watch:
            return super().update_fake_score(*inputs)
        with self.most:
            super().update_fake_score(*inputs)
        if self.accelerator.is_main_process:
            write_json(self.run_dir / "peak.json", self.most.bytes - self.before)


class Mapped(TorchDispatchMode):
    """The most bytes that were mapped after an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
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
    """Bytes that the allocator has mapped one by one."""
    return _libc.mallinfo2().hblkhd


if __name__ == "__main__":
    torch.set_num_threads(1)
    # the end of a training destroys the process group, and ranks that meet again at once may miss each other: one for all runs
    with (
        mock.patch("torch.distributed.destroy_process_group"),
        mock.patch.object(loop, "Trainer", Watched),
    ):
        for argument in sys.argv[1:]:
            folder, _, stop = argument.partition(":")
            loop.train(Path(folder), stop=lambda stop=stop: bool(stop))
