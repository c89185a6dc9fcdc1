"""The cost ledger: network passes of each role, counted as they happen, in forward equivalents; and what a sweep will cost.

One forward equivalent is one forward of the student over one global batch; an input-only backward costs one, a full
backward two (weights and input). Roles of another size are weighted by their FLOPs a forward.

    distill-bench cost SWEEP                                    roles of one size, as they begin
    distill-bench cost SWEEP --size teacher=14 --size student=1.3    a larger teacher, by parameters or FLOPs
    distill-bench cost SWEEP --memory                           bytes by role and FLOPs of a step, at the run's size

prices one student update of every cell from the passes that the methods declare: nothing is trained for it. The ledger counts
what a method needs: the forwards that gradient checkpointing runs again are the machine's, so that a run's cost does not depend
on how it is held (`--memory` shows them apart). Nor are there FLOPs of the adapters themselves in it.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distill_bench.plan.cost import declared, priced

if TYPE_CHECKING:
    from distill_bench.config.schema import RunConfig
    from distill_bench.config.sweep_file import SweepConfig
    from distill_bench.plan.prediction import Prediction


def main(argv: list[str] | None = None) -> int:
    """Command line: what one student update of every cell of a sweep costs."""
    from rich.console import Console
    from rich.table import Table

    from distill_bench.config.identity import group_id, method_title
    from distill_bench.config.overrides import parse_override, run_value
    from distill_bench.config.sweep_file import load_sweep
    from distill_bench.teachers.folder import outlines

    parser = argparse.ArgumentParser(
        prog="distill-bench cost", description=main.__doc__.splitlines()[0]
    )
    parser.add_argument("sweep", type=Path, help="a sweep file")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="predict the memory by role and the FLOPs of a step, by rehearsal",
    )
    parser.add_argument(
        "--set",
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
        help="parameters or FLOPs of a role, in any one unit",
    )
    options = parser.parse_args(argv)
    try:
        sizes = dict(map(_size, options.size))
        unknown = sorted(sizes.keys() - {"student", "fake_score", "teacher", "target"})
        if unknown:
            raise ValueError(
                f"--size {unknown[0]}: roles are student, fake_score, teacher and target"
            )
        if "student" not in sizes and sizes:
            raise ValueError("--size needs the student's size too: costs are in its forwards")
        sweep = load_sweep(options.sweep, dict(parse_override(text) for text in options.set))
        with outlines():
            runs, presets = {group_id(config): config for config in sweep.expand()}, sweep.presets()
            if options.memory:
                return _print_memory(sweep, runs, presets)
    except ValueError as error:  # of the config, the registry or a teacher, of one line
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    axes = [key for key in sweep.axes(list(runs.values())) if key != "method"]
    table = Table(title=f"forward equivalents of one student update: {sweep.name}")
    roles = ("student", "fake_score", "teacher", "target")
    for heading in (
        "method",
        *axes,
        *(f"{role} fwd / bwd" for role in roles),
        "total",
        "to the first",
    ):
        table.add_column(heading, justify="left" if heading in ("method", *axes) else "right")
    first = None
    for config in runs.values():
        counts = declared(config)
        total = priced(counts, sizes)
        first = first or total
        cells = [_passes(counts.get(role)) for role in roles]
        swept = ["-" if (value := run_value(config, key)) is None else str(value) for key in axes]
        table.add_row(
            method_title(config, presets), *swept, *cells, f"{total:.4g}", f"{total / first:.2f}"
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


def _size(text: str) -> tuple[str, float]:
    role, _, size = text.partition("=")
    try:
        found = float(size)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ValueError(f"--size {text!r} takes ROLE=NUMBER, for instance teacher=14e9")
    return role, found


def _print_memory(
    sweep: "SweepConfig", runs: Mapping[str, "RunConfig"], presets: Mapping[str, str]
) -> int:
    """A line for each cell: GiB on each device by kind and role, and PFLOP a student update; like cells share one."""
    from rich.console import Console
    from rich.table import Table

    from distill_bench.config.identity import method_title
    from distill_bench.config.protocol import protocol_hash, student_key
    from distill_bench.plan.memory import predicted, sampling_peak, step_flops

    processes = sweep.cluster.nodes * sweep.cluster.processes
    lines: dict[tuple[str, ...], list[str]] = {}
    rehearsed: dict[str, Prediction] = {}
    sampled: dict[tuple[object, ...], int] = {}
    for config in runs.values():
        # what moves no byte: so that cells which differ in it are rehearsed once
        fields = {
            "fake_score_updates": config.fake_score_updates and 1,
            "student_lr": 1.0,
            "fake_score_lr": 1.0,
            "seed": 0,
        }
        alike = json.dumps(config.model_copy(update=fields).model_dump(mode="json"), sort_keys=True)
        if alike not in rehearsed:
            rehearsed[alike] = predicted(config, processes)
        found = rehearsed[alike]
        row = (
            protocol_hash(config),
            student_key(config),
            config.teacher_offload,
            config.guidance_forwards,
        )
        if row not in sampled:
            sampled[row] = sampling_peak(config)
        needed, again = step_flops(found, config)
        held_back = f" (host: {_gib(found.held_back)})" if found.held_back else ""

        def by_role(sizes: Mapping[str, float]) -> str:
            return " / ".join(
                _gib(sizes[role]) if role in sizes else "-" for role in ("student", "fake_score")
            )

        cells = (
            f"{by_role(found.weights)} / {_gib(found.weights['teacher'])}{held_back}",
            *map(by_role, (found.masters, found.gradients, found.moments)),
            _gib(found.ema),
            _gib(found.other),
            by_role(found.activations),
            _gib(found.peak),
            _gib(sampled[row]),
            f"{needed / 1e15:.3g}",
            f"{again / 1e15:.3g}",
        )
        updates = "" if config.fake_score_updates is None else f" x{config.fake_score_updates}"
        lines.setdefault(cells, []).append(f"{method_title(config, presets)}{updates}")
    config = next(iter(runs.values()))
    title = f"{sweep.name}: {config.frames} frames of {config.height}x{config.width}, batch {config.batch_size}"
    table = Table(
        title=f"{title} on {processes} processes; GiB on each device by student / fake score (/ teacher)"
    )
    table.add_column("method, fake-score updates")
    kinds = (
        "weights",
        "masters",
        "gradients",
        "moments",
        "average",
        "other",
        "activations",
        "peak",
        "sampling",
    )
    for heading in (*kinds, "PFLOP an update", "made again"):
        table.add_column(heading, justify="right")
    for cells, names in lines.items():
        table.add_row(", ".join(dict.fromkeys(names)), *cells)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


def _gib(size: float) -> str:
    return "0" if size == 0 else f"{size / 2**30:.3g}"


def _passes(row: Mapping[str, float] | None) -> str:
    """`forwards / backwards`, a full backward as two."""
    if row is None:
        return "-"
    return f"{row['forward']:g} / {row['input_backward'] + 2 * row['full_backward']:g}"


if __name__ == "__main__":
    raise SystemExit(main())
