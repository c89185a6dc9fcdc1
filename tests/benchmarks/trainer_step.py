"""What a trainer step costs beyond its network passes, and whether seconds follow the ledger: `make bench`.

On mini-wan, batch 8, one thread, in processor seconds (a shared machine changes them less). Rounds of bare passes and of
steps alternate in one process, and each is summed up by its median, so that a slow minute slows both. Fails where a step takes
more than 10 % over the passes that it needs, or where the ratio of seconds of two methods is 15 % off the ratio of their
ledgers.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from distill_bench.config.resolve import resolve
from distill_bench.plan.cost import declared, priced
from distill_bench.train.trainer import Trainer

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


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def passes(trainer: Trainer) -> dict[str, Callable[[], object]]:
    """The bare passes of a transformer at the run's batch, without anything around them."""
    net, (text, null) = trainer.student, (trainer.texts[0], trainer.nets.null_text)
    size = trainer.config.batch_size
    x, sigma = torch.randn(size, *trainer.latent_shape), torch.full((size,), 500.0)
    text = text.expand(size, -1, -1)
    double = torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([text, null.expand_as(text)])

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        return net(*inputs, return_dict=False)[0]

    def bare() -> None:
        with torch.no_grad():
            forward(x, sigma, text)

    def guided() -> None:
        with torch.no_grad():
            forward(*double)

    def full() -> None:
        net.requires_grad_(True)
        forward(x, sigma, text).sum().backward()
        net.zero_grad(set_to_none=True)

    def by_input() -> None:
        net.requires_grad_(False)
        forward(x.clone().requires_grad_(), sigma, text).sum().backward()

    return {"forward": bare, "guided": guided, "full": full, "input": by_input}


def needed(trainer: Trainer) -> dict[str, float]:
    """How many of each bare pass one student update with its fake-score updates needs; a backward brings its own forward."""
    counts = declared(trainer.config)
    student, fake_score, teacher = counts["student"], counts["fake_score"], counts["teacher"]
    full = student["full_backward"] + fake_score["full_backward"]
    by_input = fake_score["input_backward"]
    forward = student["forward"] + fake_score["forward"] - full - by_input
    return {"forward": forward, "guided": teacher["forward"] / 2, "full": full, "input": by_input}


def step(trainer: Trainer) -> None:
    """One student update with its fake-score updates, as `train` makes it."""
    samples = trainer.update_student()
    trainer.after_student_update()
    for index in range(trainer.config.fake_score_updates or 0):
        trainer.update_fake_score(
            index, samples if trainer.config.reuse_rollout and index == 0 else None
        )
    trainer.student_updates += 1


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="trainer_step", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    trainers = {}
    for name, fields in METHODS.items():
        run = Path(tempfile.mkdtemp()) / "runs" / name.replace(" ", "-")
        run.mkdir(parents=True)
        (run / "run.yaml").write_text(
            yaml.safe_dump(resolve(BASE | fields).model_dump(mode="json"))
        )
        trainers[name] = Trainer(run)
    bare = passes(next(iter(trainers.values())))
    for work in bare.values():
        work()
    for trainer in trainers.values():
        step(trainer)
    took: dict[str, list[float]] = {name: [] for name in [*bare, *trainers]}
    for _ in range(options.rounds):
        for name, trainer in trainers.items():
            for kind, work in bare.items():
                took[kind].append(seconds(work))
            took[name].append(seconds(lambda trainer=trainer: step(trainer)))
    median = {name: statistics.median(values) for name, values in took.items()}
    print("bare passes, s:", "  ".join(f"{kind} {median[kind]:.4f}" for kind in bare))
    failed = False
    for name, trainer in trainers.items():
        expected = sum(count * median[kind] for kind, count in needed(trainer).items())
        over = median[name] / expected - 1
        failed |= over > 0.10
        print(
            f"{name:12} step {median[name]:.3f} s, its passes {expected:.3f} s, over by {over:+.1%}"
        )
    cost = {name: priced(declared(trainer.config), {}) for name, trainer in trainers.items()}
    for one, other in itertools.combinations(trainers, 2):
        measured, counted = median[one] / median[other], cost[one] / cost[other]
        failed |= abs(measured / counted - 1) > 0.15
        print(
            f"{one} to {other}: seconds {measured:.2f}, ledger {counted:.2f}, off by {measured / counted - 1:+.1%}"
        )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
