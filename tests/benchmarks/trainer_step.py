"""Overhead of a trainer step over its network passes, for every preset: `make bench`.

The passes of a step are those that the ledger counts while it runs; their price is that of the same
passes of the bare networks. Steps and bare passes alternate in one process, in processor seconds of
one thread (a busy machine changes them less than wall-clock time). The overhead is the median over
rounds. Fails if a step on mini-wan, where passes dominate, takes more than 5 % longer than its
passes, or if its seconds per forward equivalent of the ledger are more than 15 % off the median.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from distill_bench.config.errors import ConfigError
from distill_bench.config.resolve import resolve
from distill_bench.registry import methods
from distill_bench.store.machine import keep_freed_memory
from distill_bench.teachers.architecture import architecture_called
from distill_bench.train import extras
from distill_bench.train.loop import update
from distill_bench.train.run import Run
from distill_bench.train.setup import build

TEACHERS = {"mini-wan": 8, "mixture": 128, "gaussian": 128}  # batch size
BASE = {"exit_step": "last", "trackers": [], "signals_every": None, "threads": 1}
# of one method that allows them all, beside the presets: average, reuse, and where a step begins
VARIED = {
    "ema": [0.98, None],
    "reuse_rollout": [False, True, "graph"],
    "student_input": ["rollout", "real_data"],
}
VARIED_METHOD = {"name": "sgmd", "preset": "official"}
LARGEST_OVERHEAD = 0.05
LARGEST_RATIO_ERROR = 0.15
SHORTEST = 0.01  # seconds of a measurement; shorter passes are repeated
EXTRA_ROWS = 16  # ODE pairs and real latents to draw from; a step takes as long with more

Pass = tuple[str, str, float]  # role, kind of the ledger, samples


class Step(NamedTuple):
    """Measured processor seconds of one step, of its passes alone, and its cost by the ledger."""

    seconds: float
    passes: float
    forward_equivalents: float

    @property
    def overhead(self) -> float:
        """Share of the passes' seconds that the step takes longer."""
        return self.seconds / self.passes - 1


def rows() -> dict[str, dict]:
    """Keys of a run for every preset of every method, and for every combination of `VARIED`."""
    keys: dict[str, dict] = {}
    for name, method in methods().items():
        for preset, overrides in {p: q.overrides for p, q in method.presets.items()}.items():
            own = {key: value for key, value in BASE.items() if key not in overrides}
            keys[f"{name} {preset}"] = own | {"method": {"name": name, "preset": preset}}
        if not method.presets:
            keys[name] = BASE | {"method": name}
    for values in product(*VARIED.values()):
        setting = dict(zip(VARIED, values, strict=True))
        label = ", ".join(str(value).lower() for value in values)
        keys[f"{VARIED_METHOD['name']}: {label}"] = BASE | setting | {"method": VARIED_METHOD}
    return keys


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of a call, the mean of enough calls to measure."""
    began, calls = time.process_time(), 0
    while calls == 0 or time.process_time() - began < SHORTEST:
        work()
        calls += 1
    return (time.process_time() - began) / calls


def counted_passes(run: Run) -> Counter[Pass]:
    """Passes of a run from now on, as its ledger counts them; `clear` it to count anew."""
    passes: Counter[Pass] = Counter()
    count = run.ledger.add

    def add(role: str, kind: str, samples: float) -> None:
        passes[role, kind, samples] += 1
        count(role, kind, samples)

    run.ledger.add = add  # type: ignore[method-assign]
    return passes


def measured_steps(run: Run) -> Iterator[Step]:
    """Steps of a run, each with the price of its passes, measured right after it."""
    passes = counted_passes(run)
    while True:
        passes.clear()
        before = run.ledger.forward_equivalents()
        began = time.process_time()
        update(run)
        took = time.process_time() - began
        cost = run.ledger.forward_equivalents() - before
        yield Step(took, price(run, passes), cost)


def price(
    run: Run, passes: Counter[Pass], clock: Callable[[Callable[[], object]], float] = seconds
) -> float:
    """Seconds of passes of the bare networks; a backward includes its forward."""
    alone = Counter(passes)
    for (role, kind, samples), number in passes.items():
        if kind != "forward":
            alone[role, "forward", samples] -= number
    return sum(number * clock(bare(run, *one)) for one, number in alone.items())


def bare(run: Run, role: str, kind: str, samples: float) -> Callable[[], object]:
    """A pass of a role's network at a batch of random inputs, without anything around it.

    The ledger counts a pass that stops after the share s of the blocks as s times the samples.
    """
    batches = samples / run.config.batch_size
    net = network(run, role, min(1.0, batches))
    batch = run.batch("student")
    copies = max(1, round(batches))
    text = torch.cat([batch.text] * copies)
    x = torch.randn(len(text), *batch.latent_shape, device=text.device)
    sigma = torch.full((len(text),), 0.5, device=text.device)
    bfloat16 = run.config.precision == "bfloat16"

    def forward(x: Tensor) -> Tensor:
        def call(*inputs: Tensor) -> Tensor:
            output: Tensor = net(*inputs, return_dict=False)[0]
            return output

        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            return architecture_called(net).velocity(net, call, x, sigma, text)

    def work() -> None:
        if kind == "forward":
            with torch.no_grad():
                forward(x)
            return
        net.requires_grad_(kind == "full_backward")
        forward(x.clone().requires_grad_(kind == "input_backward")).sum().backward()
        net.zero_grad(set_to_none=True)

    return work


def network(run: Run, role: str, share: float) -> nn.Module:
    """Network of a role, with the first share of its blocks only."""
    denoiser = run.nets.unguided_teacher if role == "teacher" else getattr(run.nets, role)
    net: nn.Module = copy.copy(denoiser.net)
    blocks = architecture_called(net).blocks(net)
    first = blocks[: max(1, round(share * len(blocks)))]
    net._modules = {n: first if part is blocks else part for n, part in net._modules.items()}
    return net


def built(keys: dict[str, dict], teacher: str, store: Path) -> tuple[dict[str, Run], dict]:
    """The runs of the rows on a teacher, and the reasons why some are impossible."""
    runs, reasons = {}, {}
    for name, fields in keys.items():
        own = {"teacher": teacher, "batch_size": TEACHERS[teacher]}
        try:
            runs[name] = build(resolve(fields | own), store)
        except ConfigError as error:
            reasons[name] = str(error)
    return runs, reasons


def measure(runs: dict[str, Run], rounds: int) -> dict[str, list[Step]]:
    """Steps of each run; the runs take turns, after one step each that is not measured."""
    steps = {name: measured_steps(run) for name, run in runs.items()}
    for run in steps.values():
        next(run)
    measured = defaultdict(list)
    for _ in range(rounds):
        for name, run in steps.items():
            measured[name].append(next(run))
    return measured


def summary(steps: list[Step]) -> tuple[float, float, float, float]:
    """Medians: seconds of a step and of its passes, overhead, seconds per forward equivalent."""
    return (
        statistics.median(step.seconds for step in steps),
        statistics.median(step.passes for step in steps),
        statistics.median(step.overhead for step in steps),
        statistics.median(step.seconds / step.forward_equivalents for step in steps),
    )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark from the command line; 1 if a bound is broken."""
    parser = argparse.ArgumentParser(prog="trainer_step", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help="names of rows, e.g. 'dmd2 fastgen'; default: all")
    parser.add_argument("--teacher", action="append", choices=TEACHERS, help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    known = rows()
    unknown = set(options.rows) - known.keys()
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; known: {'; '.join(known)}")
    keys = {name: known[name] for name in options.rows or known}
    teachers = options.teacher or list(TEACHERS)
    keep_freed_memory()  # as in a worker
    torch.set_num_threads(1)
    few_rows = patch.multiple(extras, ODE_PAIRS=EXTRA_ROWS, REAL_LATENTS=EXTRA_ROWS)

    table = Table("preset, or sgmd with ema, reuse_rollout, student_input")
    cells: dict[str, list[str]] = {name: [] for name in keys}
    notes, failed = [], []
    for teacher in teachers:
        for heading in ("step, ms", "passes, ms", "overhead"):
            table.add_column(f"{teacher}\n{heading}", justify="right")
        with tempfile.TemporaryDirectory() as store, few_rows:
            runs, reasons = built(keys, teacher, Path(store))
            results = {
                name: summary(steps) for name, steps in measure(runs, options.rounds).items()
            }
        usual = statistics.median(result[-1] for result in results.values())
        for name, row in cells.items():
            if name in reasons:
                row += ["-"] * 3
                notes.append(f"{name} on {teacher}: {reasons[name]}")
                continue
            step, passes, overhead, unit = results[name]
            row += [f"{1000 * step:.1f}", f"{1000 * passes:.1f}", f"{overhead:+.1%}"]
            if teacher == "mini-wan" and overhead > LARGEST_OVERHEAD:
                failed.append(f"{name}: overhead {overhead:.1%} is above {LARGEST_OVERHEAD:.0%}")
            if teacher == "mini-wan" and abs(unit / usual - 1) > LARGEST_RATIO_ERROR:
                failed.append(f"{name}: {unit / usual - 1:+.1%} seconds per forward equivalent")
    for name, row in cells.items():
        table.add_row(name, *row)
    console = Console(width=140, highlight=False)
    console.print(table)
    for line in [*dict.fromkeys(notes), *failed]:
        console.print(line, soft_wrap=True)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
