"""Processor seconds of updates with sequential and batched rollouts for the fake score.

Both runs take turns in one process on the same updates, so that they meet the same exit steps. The
mean over updates depends on the exit steps that were drawn; the ratio is that of the sums.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from distill_bench.config.resolve import resolve
from distill_bench.train.loop import update
from distill_bench.train.run import Run
from distill_bench.train.setup import build

BATCH_SIZES = {"mini-wan": 8, "mixture": 128, "gaussian": 128}
BASE = {"trackers": [], "signals_every": None, "threads": 1}
WAYS = ("sequential", "batched")


def seconds(run: Run, updates: int) -> float:
    """Processor seconds of some updates of a run."""
    began = time.process_time()
    for _ in range(updates):
        update(run)
    return time.process_time() - began


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="batched_rollouts", description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", choices=BATCH_SIZES, default="mini-wan")
    parser.add_argument("--method", default="dmd2")
    parser.add_argument("--nfe", type=int, default=4)
    parser.add_argument("--fake-score-updates", type=int, default=5)
    parser.add_argument("--exit-step", choices=("random", "last"), default="random")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--updates", type=int, default=1, help="of each run per round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keys = {
        "method": options.method,
        "teacher": options.teacher,
        "batch_size": BATCH_SIZES[options.teacher],
        "nfe": options.nfe,
        "exit_step": options.exit_step,
        "fake_score_updates": options.fake_score_updates,
    }
    with tempfile.TemporaryDirectory() as store:
        runs = {
            way: build(resolve(BASE | keys | {"fake_score_rollouts": way}), Path(store))
            for way in WAYS
        }
    for run in runs.values():
        update(run)
    rounds = [
        {way: seconds(runs[way], options.updates) for way in (WAYS if i % 2 else WAYS[::-1])}
        for i in range(options.rounds)
    ]
    costs = [run.ledger.forward_equivalents() for run in runs.values()]
    assert abs(costs[0] - costs[1]) < 1e-6 * costs[0], f"the runs made unlike passes: {costs}"
    ratios = [one["sequential"] / one["batched"] for one in rounds]
    sums = {way: sum(one[way] for one in rounds) for way in WAYS}
    low, _, high = statistics.quantiles(ratios, n=4)
    count = options.rounds * options.updates
    print(
        f"{options.method} on {options.teacher}, K={options.fake_score_updates}, {count} updates: "
        + ", ".join(f"{way} {1000 * total / count:.1f} ms" for way, total in sums.items())
        + f"; ratio {sums['sequential'] / sums['batched']:.3f} (quartiles {low:.3f}, {high:.3f})"
    )


if __name__ == "__main__":
    main()
