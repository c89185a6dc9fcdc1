"""TODO: testing.__main__."""

import sys
from pathlib import Path
from unittest import mock

import torch

from distill_bench.train.loop import train


def main(argv: list[str] | None = None) -> int:
    """Train each run folder given: what the processes of `check_two_ranks` do."""
    torch.set_num_threads(1)
    # the end of a training destroys the process group, and ranks that meet again at once may miss each other: one for all runs
    with mock.patch("torch.distributed.destroy_process_group"):
        for run in sys.argv[1:] if argv is None else argv:
            train(Path(run))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
