"""Start the unfinished runs of a sweep: in worker processes, in this process, or on SLURM.

The state of a run is read from its folder, so runs that another call or another sweep has finished
are skipped.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from distill_bench.config.cluster import ClusterConfig
from distill_bench.config.protocol import protocol_hash, student_key
from distill_bench.config.resolve import method_of
from distill_bench.config.schema import RunConfig
from distill_bench.store.machine import usable_cores, visible_gpus
from distill_bench.store.runs import read_cancels, run_state
from distill_bench.sweep.local.workers import Task, python_command, run_tasks
from distill_bench.sweep.manifest import OpenSweep
from distill_bench.sweep.slurm.queue import Queue, read_partition, read_queue
from distill_bench.sweep.status import TO_LAUNCH, WAITING, read_statuses, waits_for
from distill_bench.sweep.watch import ProgressBoard, console, warn

TRIES = 3  # starts of a run per call, if its worker dies


@dataclass(frozen=True)
class LaunchOptions:
    """Options that select the runs to start, and set their flags."""

    retry: frozenset[str] = frozenset()  # kinds of failure to try again, or "all"
    stale: str = "warn"
    allow_changed_code: bool = False

    @property
    def job_flags(self) -> list[str]:
        """Options of `distill-bench job`."""
        return ["--allow-changed-code"] if self.allow_changed_code else []


def select_runs(sweep: OpenSweep, queue: Queue, options: LaunchOptions) -> list[str]:
    """Select the runs to start, and write their run.yaml files.

    With `stale` = "rerun", stale runs are first moved aside.
    """
    selected = []
    for s in read_statuses(sweep.store, sweep.entries, queue):
        if s.stale and options.stale == "rerun":
            _move_aside(sweep.store / s.run)
            selected.append(s.run)
        elif s.state in TO_LAUNCH or (s.state == "failed" and options.retry & {"all", s.kind}):
            selected.append(s.run)

    def in_progress(run: str) -> bool:
        return run_state(sweep.store / run, bool(queue.active(run))) in WAITING

    selected = _in_stages(sweep, selected, in_progress)
    sweep.write_runs(selected)
    return selected


def _in_stages(
    sweep: OpenSweep, runs: Iterable[str], in_progress: Callable[[str], bool] = lambda run: False
) -> list[str]:
    """The runs that can start now or after others of them, each after its initial run.

    Args:
        in_progress: if it returns True for an initial run, runs may wait for it.
    """
    kept: dict[str, None] = {}  # in order
    for run in sorted(runs, key=lambda run: len(sweep.chain(run))):
        initial = sweep.runs[run].init_run if run in sweep.runs else None
        ready = initial is None or waits_for(sweep.store / run, initial) is None
        if ready or initial in kept or in_progress(str(initial)):
            kept[run] = None
    return list(kept)


def _move_aside(folder: Path) -> None:
    """Rename a run's folder, results included, so that the run counts as missing."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.stale-{number}")).exists():
        number += 1
    folder.rename(aside)
    console.print(f"{folder.name}: made by other code; moved to {aside.name}")


# --- in this process ---


def run_debug(sweep: OpenSweep, options: LaunchOptions) -> None:
    """Do every unfinished run in this process, one after the other."""
    from distill_bench.sweep.job import execute  # torch takes seconds

    for run in select_runs(sweep, Queue(), options):
        console.print(run, style="bold")
        execute(sweep.store / run, allow_changed_code=options.allow_changed_code)


# --- on this machine ---


def local_slots(cluster: ClusterConfig) -> tuple[int, int]:
    """Number of runs at once on this machine, and of processes per run.

    With GPUs, a run has as many processes as on the cluster, but at most one per GPU. Without GPUs,
    it has `tasks` processes.
    """
    gpus = len(visible_gpus())
    wanted = cluster.nodes * cluster.processes if gpus else cluster.tasks or 1
    processes = min(wanted, gpus) if gpus else wanted
    if processes < wanted:
        warn(f"the sweep asks for {wanted} processes per run; this machine has {gpus} GPUs")
    return cluster.jobs or max(1, (gpus or usable_cores()) // processes), processes


def run_local(sweep: OpenSweep, jobs: int, options: LaunchOptions, processes: int = 1) -> None:
    """Do every unfinished run in worker processes on this machine; returns when none is left.

    Args:
        jobs: runs at once.
        processes: processes per run.
    """
    began = time.time()
    tries: Counter[str] = Counter()
    todo: list[str] = []

    def cancelled_runs() -> set[str]:
        return {run for call in read_cancels(sweep.store, began) for run in call["runs"]}

    def is_cancelled(task: Task) -> bool:
        runs = cancelled_runs()
        # a prepare task is cancelled together with the last run
        return task.name in runs if task.name in sweep.configs else runs.issuperset(todo)

    def is_ready(task: Task) -> bool:
        config = sweep.runs.get(task.name)
        return config is None or waits_for(sweep.store / task.name, config.init_run) is None

    with ProgressBoard(sweep, jobs, processes) as board:
        while True:
            selected = select_runs(sweep, Queue(), options)
            cancelled = cancelled_runs()
            left = (run for run in selected if tries[run] < TRIES and run not in cancelled)
            todo[:] = in_launch_order(sweep, _in_stages(sweep, left))
            options = replace(options, retry=frozenset())  # a failure in this call is final
            if todo:
                tasks = _prepare_tasks(sweep, todo)
                tasks += [_run_task(sweep.store / run, options, processes) for run in todo]
                run_tasks(
                    tasks,
                    jobs,
                    board.changed,
                    board.update,
                    cancelled=is_cancelled,
                    ready=is_ready,
                )
                started = [task.name for task in tasks if task.exit_code is not None]
                tries.update(started)
                stuck = [run for run in todo if run not in cancelled_runs()]
                if stuck and not started:  # the same tasks would be passed over for ever
                    warn(f"{len(stuck)} runs cannot start: {_reason_to_wait(sweep, stuck[0])}")
                    return
            elif "running" in sweep.states().values():
                time.sleep(1)  # another driver's runs; if their workers die, take them over
                board.update()
            else:
                return


def _reason_to_wait(sweep: OpenSweep, run: str) -> str:
    """A run that no task could start, and the initial run that it waits for."""
    config = sweep.runs.get(run)
    waits = config and waits_for(sweep.store / run, config.init_run)
    return f"{run} {waits or 'was not ready'}"


def in_launch_order(sweep: OpenSweep, runs: Iterable[str]) -> list[str]:
    """Runs and rows by seed, so that rows of a table become comparable early.

    Within a seed, runs of which others wait come first, then the longest. Rows that train nothing
    come after the runs of the first seed.
    """
    costs: dict[str, float] = {}  # by group: the seeds of a row cost the same

    def order(run: str) -> tuple[int, int, float]:
        if run not in sweep.runs:
            return 0, 1, 0.0
        config, group = sweep.runs[run], sweep.groups[run]
        if group not in costs:
            costs[group] = _training_cost(config)
        return config.seed, run not in sweep.awaited, -costs[group]

    return sorted(runs, key=order)


def _training_cost(config: RunConfig) -> float:
    """Forward equivalents of a run's training; 0 if they are unknown."""
    # needs torch, which takes seconds; a status must start fast
    from distill_bench.plan.cost import passes, priced

    try:
        return config.student_updates * priced(passes(config), {})
    except ValueError:  # a method that fails on stand-in networks may still train
        return 0.0


def _run_task(folder: Path, options: LaunchOptions, processes: int) -> Task:
    argv = python_command("distill_bench.sweep.job", str(folder), *options.job_flags)
    return Task(folder.name, argv, folder / "log.txt", forks=True, processes=processes)


def _prepare_tasks(sweep: OpenSweep, todo: list[str]) -> list[Task]:
    """Tasks that make shared artefacts, to be started before the runs that need them."""
    tasks = []
    for label, run in missing_artefacts(sweep, todo).items():
        folder, log = sweep.store / run, sweep.store / "logs" / f"{run}.txt"
        argv = python_command("distill_bench.sweep.job", "--prepare", str(folder))
        tasks.append(Task(label, argv, log, forks=True))
    return tasks


def missing_artefacts(sweep: OpenSweep, todo: Iterable[str]) -> dict[str, str]:
    """Missing sets of shared artefacts: label -> a run that needs the set."""
    sets: dict[tuple, str] = {}
    first_runs: dict[str, str] = {}  # of each row: its seeds need the same
    for run in todo:
        first_runs.setdefault(sweep.groups.get(run, run), run)
    for run in first_runs.values():
        config = sweep.configs[run]
        needs = "" if run in sweep.rows else ", ".join(sorted(method_of(config).needs))
        guidance = needs and str(config.guidance_scale)
        sets.setdefault((protocol_hash(config), student_key(config), needs, guidance), run)
    missing = {}
    for (protocol, student, needs, _), run in sets.items():
        if not (sweep.store / "references" / protocol / f"ready-{student}.json").is_file():
            missing[", ".join(filter(None, (f"references {protocol}", needs)))] = run
    return missing


# --- on SLURM ---


def run_slurm(sweep: OpenSweep, options: LaunchOptions) -> None:
    """Submit every unfinished run that is not in the queue, and return."""
    from distill_bench.sweep.slurm.submit import submit  # Submitit takes a second to import

    queue = read_queue(sweep.store)
    selected = select_runs(sweep, queue, options)
    todo = _in_stages(sweep, selected, lambda run: bool(queue.active(run)))
    if not todo:
        console.print("nothing to submit")
        return
    cluster = sweep.config.cluster
    for shortfall in read_partition(cluster.partition).shortfalls(cluster):
        warn(shortfall)
    folders = [sweep.store / run for run in todo]
    prepare = [sweep.store / run for run in missing_artefacts(sweep, todo).values()]
    changed = options.allow_changed_code
    initial = {
        run: str(config.init_run)
        for run in todo
        if (config := sweep.runs.get(run)) and waits_for(sweep.store / run, config.init_run)
    }
    queued = {run: queue.active(run)[-1] for run in initial.values() if queue.active(run)}
    name = sweep.config.name
    ids = submit(folders, cluster, sweep.store, prepare, changed, name, initial, queued)
    arrays = list(dict.fromkeys(job.partition("_")[0] for job in ids))
    console.print(f"submitted {len(ids)} runs as {len(set(ids))} jobs: {', '.join(arrays)}")
    console.print("watch: this command with --status or --wait, or squeue --me")
