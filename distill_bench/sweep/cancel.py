"""Implement --cancel: end the jobs and workers of runs; running work is saved first."""

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from distill_bench.config.errors import ConfigError
from distill_bench.store.claims import attempts, read_start
from distill_bench.store.failures import os_error
from distill_bench.store.processes import is_running
from distill_bench.store.runs import record_cancel, run_state
from distill_bench.sweep.slurm.queue import Queue, scancel
from distill_bench.sweep.status import ENDED
from distill_bench.sweep.watch import warn


def cancel_runs(store: Path, runs: Iterable[str], queue: Queue) -> int:
    """Cancel runs; returns the number of jobs and processes signalled.

    Cancels their jobs and any prepare job only they need, signals local workers to save and stop,
    and keeps local drivers from starting the runs again.

    Raises:
        ConfigError: if a job also does a run that is not selected.
    """
    runs = set(runs)
    jobs = {job for run in runs for job in queue.active(run)}
    _check_alone(store, runs, jobs, queue)
    prepare = _needed_only_by(jobs, queue)
    try:
        record_cancel(store, runs, jobs)
    except OSError as error:
        warn(f"cannot write into {store} ({os_error(error)}): local drivers start the next runs")
    if jobs:
        scancel(sorted(jobs | prepare))
    return len(jobs | prepare) + sum(_stop_worker(store / run) for run in runs)


def _check_alone(store: Path, runs: set[str], jobs: set[str], queue: Queue) -> None:
    """Raise ConfigError if one of the jobs also does an unfinished run that is not in `runs`."""
    for run in queue.jobs.keys() - runs:
        shared = jobs.intersection(queue.active(run))
        if shared and run_state(store / run) not in (*ENDED, "failed"):
            raise ConfigError(
                f"job {shared.pop()} also does {run} (cluster.runs_per_job): "
                "select all runs of a job, or none of them"
            )


def _needed_only_by(jobs: set[str], queue: Queue) -> set[str]:
    """Queued prepare jobs that only these jobs wait for."""
    waiting = {job: first for job, first in queue.prepared_by.items() if job in queue.states}
    needed = {waiting[job] for job in jobs & waiting.keys()} & queue.states.keys()
    return needed - {first for job, first in waiting.items() if job not in jobs}


def _stop_worker(run_dir: Path) -> bool:
    """Tell a run's worker to save and stop; returns True if this process can signal it."""
    tried = attempts(run_dir)
    if not tried or run_state(run_dir) != "running":
        return False
    start = read_start(tried[-1])
    if start["job"] is not None or not is_running(start):
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(start["pid"], signal.SIGTERM)
        return True
    return False
