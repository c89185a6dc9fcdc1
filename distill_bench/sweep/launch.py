"""A sweep from its YAML to its tables: expand, hash, launch what is not done, report.

    python -m distill_bench.sweep sweeps/quick.yaml

Runs go to SLURM where a cluster is configured, else to worker processes on this machine. Started again it goes on where it was:
a run's state is read from its folder, so nothing that is done, here or in another sweep, is done again.
"""

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from distill_bench.config.cluster import ClusterConfig
from distill_bench.config.protocol import protocol_hash, student_key
from distill_bench.config.resolve import method_of
from distill_bench.config.schema import RunConfig
from distill_bench.plan.cost import declared, priced
from distill_bench.store.runs import cancels
from distill_bench.sweep import queue as scheduler
from distill_bench.sweep import workers as local
from distill_bench.sweep.manifest import OpenSweep
from distill_bench.sweep.plan import warn
from distill_bench.sweep.queue import Queue
from distill_bench.sweep.status import TO_LAUNCH, read_statuses
from distill_bench.sweep.watch import Board, console

TRIES = 3  # of a run whose worker process died, in one call


@dataclass(frozen=True)
class Launch:
    """Which runs a call may start, and how."""

    retry: frozenset[str] | None = None  # kinds of failure to try again; {"all"} is every one
    stale: str = "warn"
    allow_changed_code: bool = False

    def chosen(self, sweep: OpenSweep, queue: Queue) -> list[str]:
        """Runs to start; with stale "rerun" those of other code are first set aside."""
        chosen = []
        for s in read_statuses(sweep.store, sweep.known, queue):
            if s.stale and self.stale == "rerun":
                _set_aside(sweep.store / s.run)
                chosen.append(s.run)
            elif s.state in TO_LAUNCH or (
                s.state == "failed" and self.retry and self.retry & {"all", s.kind}
            ):
                chosen.append(s.run)
        sweep.write_runs()
        return chosen


def _set_aside(folder: Path) -> None:
    """Move a run's folder away, results and all, so that the run is missing."""
    for n in range(1, 1000):
        aside = folder.with_name(f"{folder.name}.stale-{n}")
        if not aside.exists():
            folder.rename(aside)
            console.print(f"{folder.name}: made by other code; set aside as {aside.name}")
            return


def shares(cluster: ClusterConfig) -> tuple[int, int]:
    """How many runs this machine does at once, and by how many processes each: one a GPU, as on the cluster, if it has as many.

    Without GPUs a run has several processes where `tasks` says so.
    """
    gpus = len(local.gpus())
    wanted = cluster.nodes * cluster.processes if gpus else cluster.tasks or 1
    processes = min(wanted, gpus) if gpus else wanted
    if processes < wanted:
        console.print(
            f"[yellow]warning[/yellow]: {wanted} processes a run are asked for, here are {gpus} GPUs: each has {gpus}"
        )
    return cluster.jobs or max(1, (gpus or os.cpu_count() or 1) // processes), processes


def run_local(sweep: OpenSweep, jobs: int, launch: Launch, processes: int = 1) -> None:
    """Do every run that is not done by workers of this machine; returns when none is left to do.

    Args:
        jobs: runs at once.
        processes: that train a run together.
    """
    tries: Counter[str] = Counter()
    began, todo = time.time(), []

    def cancelled() -> set[str]:
        return {run for call in cancels(sweep.store, began) for run in call["runs"]}

    def drop(task: local.Task) -> bool:
        told = cancelled()
        return (
            task.name in told if task.name in sweep.runs else told.issuperset(todo)
        )  # what nobody needs is not prepared

    with Board(sweep, jobs, processes) as board:
        while True:
            todo = [
                run
                for run in launch.chosen(sweep, Queue())
                if tries[run] < TRIES and run not in cancelled()
            ]
            launch = dataclasses.replace(
                launch, retry=None
            )  # what fails in this call is not tried again
            if todo:
                tries.update(todo)
                todo.sort(key=lambda run: _place_in_queue(sweep.runs[run]))
                tasks = [
                    *_preparations(sweep, todo),
                    *(_task(sweep, run, launch, processes) for run in todo),
                ]
                local.run_queue(tasks, jobs, board.changed, board, drop=drop)
            elif "running" in sweep.states().values():
                time.sleep(1)  # another process has them; should it die, they are taken over
                board()
            else:
                return


def _place_in_queue(config: RunConfig) -> tuple[int, float]:
    """Seed by seed, so that rows can soon be compared; of one seed the longest first, so that all cores end together."""
    return config.seed, -config.student_updates * priced(declared(config), {})


def _task(sweep: OpenSweep, run: str, launch: Launch, processes: int) -> local.Task:
    folder = sweep.store / run
    flags = ["--allow-changed-code"] if launch.allow_changed_code else []
    return local.Task(
        run,
        local.python("distill_bench.sweep.job", str(folder), *flags),
        folder / "log.txt",
        True,
        processes,
    )


def sharing(sweep: OpenSweep, todo: Iterable[str]) -> dict[str, str]:
    """One run for each set of shared data that is not there yet: name -> run."""
    first: dict[tuple, str] = {}
    for run in todo:
        config = sweep.runs[run]
        needs = ", ".join(sorted(method_of(config).needs))
        first.setdefault(
            (protocol_hash(config), student_key(config), needs, needs and config.guidance_scale),
            run,
        )
    ready = {
        key: (sweep.store / "references" / key[0] / f"ready-{key[1]}.json").is_file()
        for key in first
    }
    return {
        ", ".join(filter(None, (f"references {key[0]}", key[2]))): run
        for key, run in first.items()
        if not ready[key]
    }


def _preparations(sweep: OpenSweep, todo: list[str]) -> list[local.Task]:
    """Tasks that make what the runs share: first in the queue, so that no run waits for them long."""
    logs = sweep.store / "logs"
    return [
        local.Task(
            name,
            local.python("distill_bench.sweep.job", "--prepare", str(sweep.store / run)),
            logs / f"{run}.txt",
            forks=True,
        )
        for name, run in sharing(sweep, todo).items()
    ]


def run_debug(sweep: OpenSweep, launch: Launch) -> None:
    """Do every run that is not done in this process, one after the other."""
    from distill_bench.sweep.job import execute

    for run in launch.chosen(sweep, Queue()):
        console.print(f"[bold]{run}[/bold]")
        execute(sweep.store / run, allow_changed_code=launch.allow_changed_code)


def run_slurm(sweep: OpenSweep, launch: Launch) -> None:
    """Submit every run that is not done, and return."""
    from distill_bench.sweep import submit as slurm

    todo = launch.chosen(sweep, scheduler.read_queue(sweep.store))
    if not todo:
        console.print("nothing to submit")
        return
    warn(sweep.config.cluster)
    shared = [sweep.store / run for run in sharing(sweep, todo).values()]
    cluster, folders = sweep.config.cluster, [sweep.store / run for run in todo]
    ids = slurm.submit(folders, cluster, sweep.store, shared, launch.allow_changed_code)
    arrays = list(dict.fromkeys(job.partition("_")[0] for job in ids))
    console.print(f"submitted {len(ids)} runs as {len(set(ids))} jobs: {', '.join(arrays)}")
    console.print("watch: this command with --status or --wait, or squeue --me")
