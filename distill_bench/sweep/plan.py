"""TODO: sweep.plan."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from distill_bench.config.cluster import ClusterConfig
from distill_bench.config.identity import cost_key, method_title
from distill_bench.config.overrides import run_value
from distill_bench.store.runs import result_of
from distill_bench.sweep import queue as scheduler
from distill_bench.sweep import status
from distill_bench.sweep.manifest import OpenSweep
from distill_bench.sweep.status import ENDED, Status
from distill_bench.sweep.watch import console
from distill_bench.teachers.folder import is_outline, teacher_folder


def print_plan(sweep: OpenSweep, statuses: Sequence[Status], on_slurm: bool) -> None:
    """The runs with their ids, what varies, what they will cost by what like runs took, and what the cluster lacks."""
    axes = [key for key in sweep.config.axes(sweep.runs.values()) if key != "method"]
    table = Table(
        "run", "method", *axes, "seed", "updates", "state", "estimate", box=None, pad_edge=False
    )
    history, presets = _history(sweep.store), sweep.config.presets()
    known, unknown, total = 0, 0, 0.0
    for s in statuses:
        config = sweep.runs[s.run]
        like = history.get(cost_key(config), [])
        ended, seconds = s.state in ENDED, None
        if like:
            pace, evaluation = (statistics.median(column) for column in zip(*like, strict=True))
            seconds = pace * (s.of - s.student_updates) + evaluation
        if not ended:
            known, unknown, total = (
                known + bool(like),
                unknown + (not like),
                total + (seconds or 0.0),
            )
        estimate = (
            ""
            if ended
            else "unknown"
            if seconds is None
            else f"{status.duration(seconds)} (of {len(like)} like runs)"
        )
        values = [_shown(run_value(config, key)) for key in axes]
        table.add_row(
            s.run,
            method_title(config, presets),
            *values,
            str(config.seed),
            str(s.of),
            s.state,
            estimate,
        )
    console.print(table)
    console.print(f"{len(statuses)} runs ({status.counts(statuses)}), {known + unknown} to do")
    for teacher in dict.fromkeys(config.teacher for config in sweep.runs.values()):
        if is_outline(teacher_folder(teacher)):
            console.print(
                f"the weights of {teacher} are not here: by its configs; with them the runs have other ids"
            )
    cluster = sweep.config.cluster
    if known:
        hours = total / 3600 * cluster.nodes * (cluster.gpus or 1) / cluster.runs_per_job
        unit = "GPU-hours" if cluster.gpus else "process-hours"
        console.print(
            f"cost of {known} of them by like runs: {hours:.3g} {unit}, one run at a time {status.duration(total)}"
        )
    if unknown:
        console.print(f"cost of {unknown} of them: unknown, no like run is done yet")
    if on_slurm:
        _print_cluster(sweep)
    elif cluster.partition or cluster.gpus or cluster.nodes > 1:
        from distill_bench.sweep import submit as slurm

        console.print("\non SLURM each run would be a job like this:\n")
        console.print(slurm.script(cluster, sweep.store), markup=False, soft_wrap=True)


def _history(store: Path) -> dict[str, list[tuple[float, float]]]:
    """Seconds a student update, and seconds of evaluation, of the runs that are done; by `config.cost_key`."""
    paces: dict[str, list[tuple[float, float]]] = {}
    for path in store.glob("*/result.json"):
        result = result_of(path.parent) or {}
        if result.get("student_updates") and {"cost_key", "evaluate_seconds"} <= result.keys():
            pace = result["train_seconds"] / result["student_updates"]
            paces.setdefault(result["cost_key"], []).append((pace, result["evaluate_seconds"]))
    return paces


def _print_cluster(sweep: OpenSweep) -> None:
    """How the jobs will look, and what this cluster cannot do for them."""
    from distill_bench.sweep import submit as slurm

    wanted = sweep.config.cluster
    found = scheduler.cluster(wanted.partition)
    size = f"{wanted.nodes} x {wanted.processes} processes of {wanted.cpus} CPUs, {wanted.gpus} GPUs a node, {wanted.hours:g} h"
    console.print(
        f"slurm: partition {found.partition}, {size}, runs a job {wanted.runs_per_job}, jobs at once {wanted.jobs or 16}"
    )
    warn(wanted)
    console.print(slurm.script(wanted, sweep.store), markup=False, soft_wrap=True)


def warn(wanted: ClusterConfig) -> None:
    """Say what this cluster cannot do for such jobs: some would wait in its queue for ever."""
    found = scheduler.cluster(wanted.partition)
    cpus, mem = wanted.processes * wanted.cpus, wanted.mem_gb or 0
    lacks = {
        f"{wanted.hours:g} h is over the partition's {found.max_hours} h": found.max_hours
        and wanted.hours > found.max_hours,
        f"{wanted.nodes} nodes are more than the partition's {found.nodes}": wanted.nodes
        > found.nodes,
        f"{wanted.processes} x {wanted.cpus} CPUs are more than any node's {found.cpus}": cpus
        > found.cpus,
        f"{mem} GB are more than any node's {found.mem_gb:.3g}": mem > found.mem_gb,
        f"{wanted.gpus} GPUs are more than any node's {found.gpus}": wanted.gpus > found.gpus,
        "preemption sends no signal: a run saves when it is told to end, within GraceTime": found.preemptible
        and not found.preemption_signal,
        "jobs are not requeued on this cluster: start the sweep again after a preemption": not found.requeue,
        "no accounting: how a lost job ended is known for some minutes only": not found.accounting,
    }
    for text, true in lacks.items():
        if true:
            console.print(f"[yellow]warning[/yellow]: {text}")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
