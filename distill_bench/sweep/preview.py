"""Print --dry-run: the runs with ids, states and estimated cost, and the SLURM job."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from distill_bench.config.identity import method_title
from distill_bench.config.overrides import run_value
from distill_bench.config.rows.sampling import guidance_in_words
from distill_bench.config.schema import is_scale_per_expert
from distill_bench.plan.price import (
    STAGES,
    devices,
    further_seconds,
    history,
    measured_seconds,
    reference_seconds,
    summed,
)
from distill_bench.store.durations import duration
from distill_bench.store.runs import unsampled
from distill_bench.sweep.manifest import OpenSweep
from distill_bench.sweep.slurm.queue import read_partition
from distill_bench.sweep.status import ENDED, Status, count_states
from distill_bench.sweep.watch import console, print_rows, warn, work_in_words
from distill_bench.teachers.folder import is_outline, teacher_folder


def print_preview(sweep: OpenSweep, statuses: Sequence[Status], on_slurm: bool) -> None:
    """Print the runs with their swept values and costs, and the shortfalls of the cluster."""
    estimates = _estimates(sweep, statuses)
    _print_runs(sweep, statuses, estimates)
    waiting = [s for s in statuses if s.state not in ENDED]
    console.print(f"{work_in_words(sweep)} ({count_states(statuses)}), {len(waiting)} to do")
    for teacher in dict.fromkeys(config.teacher for config in sweep.runs.values()):
        if is_outline(teacher_folder(teacher)):
            console.print(
                f"{teacher}: weights not found, planned from its configs; run ids will change "
                "once the weights are present"
            )
    cluster = sweep.config.cluster
    if estimates:
        total = sum(sum(seconds.values()) for seconds, _ in estimates.values())
        count, unit = devices(cluster)
        stages = {
            stage: sum(seconds.get(stage, 0.0) for seconds, _ in estimates.values())
            for stage in STAGES
        }
        if (shared := reference_seconds(next(iter(sweep.runs.values())), sweep.store)) is not None:
            stages["references"] = shared
        parts = ", ".join(f"{k} {v * count / 3600:.3g}" for k, v in stages.items() if v)
        console.print(
            f"cost of {len(estimates)} of them, from similar runs: "
            f"{sum(stages.values()) * count / 3600:.3g} {unit} ({parts}), "
            f"one run at a time {duration(total)}"
        )
    if unscored := sum("evaluate" not in seconds for seconds, _ in estimates.values()):
        console.print(
            f"without the evaluation of {unscored} of them: no similar run has these evaluators"
        )
    if unknown := len(waiting) - len(estimates):
        which = f"cost of {unknown} of them" if estimates else "cost"
        console.print(
            f"{which}: unknown, no similar run is done yet (`distill-bench cost --hours` predicts "
            "it from FLOPs)"
        )
    if on_slurm:
        _print_cluster(sweep)
    elif cluster.partition or cluster.gpus or cluster.nodes > 1:
        # Submitit takes a second to import
        from distill_bench.sweep.slurm.submit import batch_script

        console.print("\non SLURM each run would be a job like this:\n")
        script = batch_script(cluster, sweep.store, sweep.config.name)
        console.print(script, soft_wrap=True)


def _estimates(
    sweep: OpenSweep, statuses: Sequence[Status]
) -> dict[str, tuple[dict[str, float], int]]:
    """Run or row -> (seconds left by stage, number of similar finished runs), if there are any."""
    finished = history(sweep.store)
    estimates = {}
    for s in statuses:
        if s.state in ENDED:
            continue
        config = sweep.configs[s.run]
        left, similar = measured_seconds(config, finished, s.of - s.student_updates)
        if not similar:
            continue
        if s.run in sweep.rows:
            row, _ = sweep.rows[s.run]
            left = further_seconds(config, finished, [row.sampling], row.network)
        else:
            further = sweep.samplings[s.run]
            missing = unsampled(sweep.store / s.run, (way.name for way in further))
            ways = [way for way in further if way.name in missing]
            own = {} if s.state == "unsampled" else left
            left = summed(own, further_seconds(config, finished, ways))
        estimates[s.run] = dict(left), similar
    return estimates


def _print_runs(
    sweep: OpenSweep,
    statuses: Sequence[Status],
    estimates: dict[str, tuple[dict[str, float], int]],
) -> None:
    axes = [key for key in sweep.config.axes(sweep.runs.values()) if key != "method"]
    heads = ("run", "method", *axes, "seed", "updates", "state", "estimate")
    table = Table(*heads, box=None, pad_edge=False)
    presets = sweep.config.presets()
    for s in statuses:
        estimate = "" if s.state in ENDED else "unknown"
        if s.run in estimates:
            seconds, similar = estimates[s.run]
            estimate = f"{duration(sum(seconds.values()))} (from {similar} similar runs)"
        if s.run in sweep.rows:
            row, _ = sweep.rows[s.run]
            table.add_row(s.run, row.label, *("" for _ in axes), "", "", s.state, estimate)
            continue
        config = sweep.runs[s.run]
        values = [_formatted(run_value(config, key)) for key in axes]
        method, seed = method_title(config, presets), str(config.seed)
        table.add_row(s.run, method, *values, seed, str(s.of), s.state, estimate)
    print_rows(table)


def _formatted(value: Any) -> str:
    if is_scale_per_expert(value):
        return guidance_in_words(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _print_cluster(sweep: OpenSweep) -> None:
    """Print the batch script and the shortfalls of the cluster."""
    from distill_bench.sweep.slurm.submit import batch_script  # Submitit takes a second to import

    wanted = sweep.config.cluster
    partition = read_partition(wanted.partition)
    console.print(
        f"SLURM: partition {partition.name}, {wanted.nodes} nodes x {wanted.processes} processes "
        f"x {wanted.cpus} CPUs, {wanted.gpus} GPUs per node, {wanted.hours:g} h, "
        f"{wanted.runs_per_job} runs per job, {wanted.jobs or 16} jobs at once"
    )
    for shortfall in partition.shortfalls(wanted):
        warn(shortfall)
    script = batch_script(wanted, sweep.store, sweep.config.name)
    console.print(script, soft_wrap=True)
