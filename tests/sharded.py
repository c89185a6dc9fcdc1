"""What each of two processes does in test_sharding.py: trains the run folders given, `FOLDER:stop` for one update alone.

Writes FOLDER/held.json: by role the share of its weights that this process (the first) held before it trained, and their bytes.
"""

import sys
from pathlib import Path
from unittest import mock

import torch

from distill_bench import train as training
from distill_bench.sharding import local
from distill_bench.store import write_json


class Watched(training.Trainer):
    """Says what it holds."""

    def resume(self) -> None:
        super().resume()
        nets = {**self.trained, "teacher": self.nets.unguided_teacher.net}
        held = {
            role: sum(local(p).numel() for p in net.parameters()) / sum(p.numel() for p in net.parameters())
            for role, net in nets.items()
            if any(True for _ in net.parameters())
        }
        held |= {"moving average": sum(local(v).numel() for v in self.ema.values()) / sum(v.numel() for v in self.ema.values())}
        size = {role: sum(local(p).numel() * p.element_size() for p in net.parameters()) for role, net in nets.items()}
        if self.accelerator.is_main_process:
            write_json(self.run_dir / "held.json", {"shares": held, "bytes": size})


if __name__ == "__main__":
    torch.set_num_threads(1)
    # the end of a training destroys the process group, and ranks that meet again at once may miss each other: one for all runs
    with mock.patch("torch.distributed.destroy_process_group"), mock.patch.object(training, "Trainer", Watched):
        for argument in sys.argv[1:]:
            folder, _, stop = argument.partition(":")
            training.train(Path(folder), stop=lambda stop=stop: bool(stop))
