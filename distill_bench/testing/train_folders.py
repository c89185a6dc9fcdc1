"""Train run folders one after another; `check_two_ranks` launches this module."""

import sys
from pathlib import Path
from unittest import mock

import torch

from distill_bench.train.loop import train


def main(argv: list[str] | None = None) -> int:
    """Train the given run folders."""
    torch.set_num_threads(1)
    # Each training destroys its process group at the end. Ranks that join a new group at once may
    # miss each other, so all runs share one group.
    with mock.patch("torch.distributed.destroy_process_group"):
        for run_dir in sys.argv[1:] if argv is None else argv:
            train(Path(run_dir))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
