"""Predicts the cost, the memory or the price of every cell of a sweep without loading a weight.

    distill-bench cost SWEEP                                      all roles of the same size
    distill-bench cost SWEEP --size teacher=14 --size student=1.3 a larger teacher
    distill-bench cost SWEEP --memory                             GiB by role, FLOPs per update
    distill-bench cost SWEEP --hours                              device-hours, from similar runs
    distill-bench cost SWEEP --hours --tflops 989 --mfu 0.4       the same, else from FLOPs

The unit of cost is the forward equivalent: one forward of the student over one global batch. An
input-only backward costs one, a full backward (weights and input) two. Roles of another size are
weighted by their FLOPs per forward. Forwards recomputed by gradient checkpointing do not count, so
that the cost of a run does not depend on its memory settings; `--memory` shows them separately.
FLOPs of adapters do not count either.
"""

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distill_bench.config.identity import group_id, method_title
from distill_bench.config.overrides import parse_override, run_value
from distill_bench.config.schema import RunConfig
from distill_bench.config.sweep_file import SweepConfig, load_sweep
from distill_bench.plan.cost import passes, priced
from distill_bench.plan.price import Device, price_table
from distill_bench.store.files import user_text
from distill_bench.teachers.folder import outlines

PRICED_ROLES = ("student", "fake_score", "teacher", "target")
WIDTH = 200  # characters per line where the output is not a terminal


def main(argv: list[str] | None = None) -> int:
    """Print the cost of one student update for every cell of a sweep."""
    options = _parser().parse_args(argv)
    try:
        sizes = _sizes(options.size)
        sweep = load_sweep(options.sweep, dict(parse_override(text) for text in options.set))
        with outlines():
            runs = {group_id(config): config for config in sweep.expand()}
            if options.hours:
                table = price_table(sweep, options.store, _device(options))
            elif options.memory:
                # the rehearsals of memory import diffusers, which takes seconds
                from distill_bench.plan.memory_table import memory_table

                table = memory_table(sweep, list(runs.values()))
            else:
                table = cost_table(sweep, list(runs.values()), sizes)
    except ValueError as error:
        print(f"distill-bench cost: {error}", file=sys.stderr)
        return 2
    width = None if sys.stdout.isatty() else WIDTH
    Console(width=width, markup=False, emoji=False).print(table)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill-bench cost", description=main.__doc__.splitlines()[0]
    )
    parser.add_argument("sweep", type=Path, help="a sweep file")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="predict the memory by role and the FLOPs of an update",
    )
    parser.add_argument(
        "--hours",
        action="store_true",
        help="predict GPU-hours, or core-hours without GPUs, by stage and in total",
    )
    parser.add_argument(
        "--store", type=Path, default=Path("runs"), help="run folders with similar runs (--hours)"
    )
    parser.add_argument(
        "--tflops", type=float, help="peak of one device in TFLOP/s, to price FLOPs (--hours)"
    )
    parser.add_argument(
        "--mfu", type=float, help="share of the peak that is reached, in (0, 1] (--hours)"
    )
    parser.add_argument(
        "--set",
        type=user_text,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of every run",
    )
    parser.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="ROLE=SIZE",
        help="parameters or FLOPs of a role; any unit, the same for all roles",
    )
    return parser


def _device(options: argparse.Namespace) -> Device | None:
    """The device that `--tflops` and `--mfu` state; None without them.

    Raises:
        ValueError: if one of the two is missing or out of range.
    """
    if options.tflops is None and options.mfu is None:
        return None
    if options.tflops is None or options.mfu is None:
        raise ValueError("--tflops and --mfu belong together: a peak and the share of it")
    if not (0 < options.tflops < math.inf and 0 < options.mfu <= 1):
        raise ValueError(
            f"--tflops {options.tflops:g} --mfu {options.mfu:g}: the peak must be positive, in "
            "1e12 FLOPs per second, and the share in (0, 1]"
        )
    return Device(options.tflops, options.mfu)


def _sizes(arguments: list[str]) -> dict[str, float]:
    """Sizes by role of `--size` arguments.

    Raises:
        ValueError: for an unknown role, a size that is not positive, or no size for the student.
    """
    sizes = {}
    for argument in arguments:
        role, _, text = argument.partition("=")
        try:
            size = float(text)
        except ValueError:
            size = math.nan
        if not 0 < size < math.inf:
            raise ValueError(f"--size {argument!r} takes ROLE=NUMBER, for instance teacher=14e9")
        if role not in PRICED_ROLES:
            raise ValueError(f"--size: no role called {role!r}; known: {', '.join(PRICED_ROLES)}")
        sizes[role] = size
    if sizes and "student" not in sizes:
        raise ValueError(
            "--size: the student's size, the unit of costs, is missing; add student=NUMBER"
        )
    return sizes


def cost_table(sweep: SweepConfig, runs: list[RunConfig], sizes: Mapping[str, float]) -> Table:
    """One line per cell: passes by role, forward equivalents, and the ratio to the first cell."""
    presets = sweep.presets()
    axes = [key for key in sweep.axes(runs) if key != "method"]
    table = Table(title=f"forward equivalents of one student update: {sweep.name}")
    for heading in ("method", *axes):
        table.add_column(heading)
    for heading in (*(f"{role} fwd / bwd" for role in PRICED_ROLES), "total", "to the first"):
        table.add_column(heading, justify="right")
    first = None
    for config in runs:
        counts = passes(config)
        total = priced(counts, sizes)
        first = first or total
        table.add_row(
            method_title(config, presets),
            *(_text(run_value(config, key)) for key in axes),
            *(_forwards_and_backwards(counts.get(role)) for role in PRICED_ROLES),
            f"{total:.4g}",
            f"{total / first:.2f}",
        )
    return table


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _forwards_and_backwards(row: Mapping[str, float] | None) -> str:
    """`forwards / backwards`; a full backward counts as two."""
    if row is None:
        return "-"
    return f"{row['forward']:g} / {row['input_backward'] + 2 * row['full_backward']:g}"


if __name__ == "__main__":
    raise SystemExit(main())
