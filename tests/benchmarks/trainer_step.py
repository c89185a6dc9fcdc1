"""Overhead of a trainer step over its network passes, and seconds against the ledger: `make bench`.

On mini-wan, batch 8, one thread, in processor seconds (a busy machine changes them less than
wall-clock time). Rounds of bare passes and of steps alternate in one process, and each is
summarised by its median, so that a slow minute slows both. Fails if a step takes more than 10 %
longer than the passes that it needs, or if the ratio of seconds of two methods is 15 % off the
ratio of their ledgers.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from distill_bench.config.resolve import resolve
from distill_bench.plan.cost import passes, priced
from distill_bench.train.loop import update
from distill_bench.train.run import Run
from distill_bench.train.setup import build

METHODS = {
    "dmd2": {"method": "dmd2", "fake_score_updates": 5},
    "sgmd shared": {"method": {"name": "sgmd", "preset": "shared"}},
    "tsg_fisher": {"method": "tsg_fisher", "fake_score_updates": 5},
}
BASE = {
    "nfe": 4,
    "exit_step": "last",
    "batch_size": 8,
    "trackers": [],
    "signals_every": None,
    "threads": 1,
}
LARGEST_OVERHEAD = 0.10
LARGEST_RATIO_ERROR = 0.15


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def bare_passes(run: Run) -> dict[str, Callable[[], object]]:
    """The passes of a transformer at the run's batch, without anything around them."""
    net = run.networks["student"]
    batch = run.batch("student")
    text, null_text = batch.text, run.nets.null_text.expand_as(batch.text)
    x = torch.randn(len(text), *batch.latent_shape)
    sigma = torch.full((len(text),), 500.0)
    guided_inputs = torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([text, null_text])

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        return net(*inputs, return_dict=False)[0]

    def bare() -> None:
        with torch.no_grad():
            forward(x, sigma, text)

    def guided() -> None:
        with torch.no_grad():
            forward(*guided_inputs)

    def full() -> None:
        net.requires_grad_(True)
        forward(x, sigma, text).sum().backward()
        net.zero_grad(set_to_none=True)

    def by_input() -> None:
        net.requires_grad_(False)
        forward(x.clone().requires_grad_(), sigma, text).sum().backward()

    return {"forward": bare, "guided": guided, "full": full, "input": by_input}


def needed(run: Run) -> dict[str, float]:
    """Count of each bare pass in one update; a backward includes its forward."""
    counts = passes(run.config)
    student, fake_score, teacher = counts["student"], counts["fake_score"], counts["teacher"]
    full = student["full_backward"] + fake_score["full_backward"]
    by_input = fake_score["input_backward"]
    forward = student["forward"] + fake_score["forward"] - full - by_input
    return {"forward": forward, "guided": teacher["forward"] / 2, "full": full, "input": by_input}


def medians(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds of each bare pass and of a step of each run."""
    passes = bare_passes(next(iter(runs.values())))
    for work in passes.values():
        work()
    for run in runs.values():
        update(run)
    took: dict[str, list[float]] = {name: [] for name in [*passes, *runs]}
    for _ in range(rounds):
        for name, run in runs.items():
            for kind, work in passes.items():
                took[kind].append(seconds(work))
            took[name].append(seconds(lambda run=run: update(run)))
    return {name: statistics.median(values) for name, values in took.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark from the command line; 1 if a bound is broken."""
    parser = argparse.ArgumentParser(prog="trainer_step", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    store = Path(tempfile.mkdtemp())
    runs = {name: build(resolve(BASE | fields), store) for name, fields in METHODS.items()}
    median = medians(runs, options.rounds)
    kinds = [kind for kind in median if kind not in runs]
    print("bare passes, s:", "  ".join(f"{kind} {median[kind]:.4f}" for kind in kinds))
    failed = False
    for name, run in runs.items():
        expected = sum(count * median[kind] for kind, count in needed(run).items())
        overhead = median[name] / expected - 1
        failed |= overhead > LARGEST_OVERHEAD
        print(
            f"{name:12} step {median[name]:.3f} s, its passes {expected:.3f} s, "
            f"overhead {overhead:+.1%}"
        )
    cost = {name: priced(passes(run.config), {}) for name, run in runs.items()}
    for one, other in itertools.combinations(runs, 2):
        measured, counted = median[one] / median[other], cost[one] / cost[other]
        error = measured / counted - 1
        failed |= abs(error) > LARGEST_RATIO_ERROR
        print(
            f"{one} to {other}: seconds {measured:.2f}, ledger {counted:.2f}, off by {error:+.1%}"
        )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
