"""Trains run folders one after another: the processes of `check_two_ranks`."""

import sys
from pathlib import Path
from unittest import mock

import torch

from distill_bench.train.loop import train


def main(argv: list[str] | None = None) -> int:
    """Train each run folder given."""
    torch.set_num_threads(1)
    # The end of a training destroys the process group, and ranks that join a new one at once may
    # miss each other: keep one group for all runs.
    with mock.patch("torch.distributed.destroy_process_group"):
        for run_dir in sys.argv[1:] if argv is None else argv:
            train(Path(run_dir))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
