"""TODO: sweep.cancel."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterable
from pathlib import Path

from distill_bench.config.errors import ConfigError
from distill_bench.store.claims import attempts, start_of
from distill_bench.store.runs import note_cancel, state
from distill_bench.sweep import queue as scheduler
from distill_bench.sweep.queue import Queue
from distill_bench.sweep.status import ENDED
from distill_bench.sweep.watch import console


def cancel(store: Path, runs: Iterable[str], queue: Queue) -> int:
    """Cancel the jobs of the runs and what was to be prepared for them alone, ask those that work on this machine to save and
    stop, and tell the drivers of local sweeps to start them no more; returns how many jobs and processes were told.

    Raises:
        ConfigError: if a job has further runs: it would end them too.
    """
    runs = set(runs)
    jobs = {job for run in runs for job in queue.active(run)}
    for run in queue.jobs.keys() - runs:
        if (shared := jobs.intersection(queue.active(run))) and state(store / run) not in (
            *ENDED,
            "failed",
        ):
            raise ConfigError(
                f"job {shared.pop()} does {run} too (runs_per_job): choose all runs of a job, or none of them"
            )
    waiting = {job: first for job, first in queue.first.items() if job in queue.states}
    prepare = {waiting[job] for job in jobs & waiting.keys()} & queue.states.keys()
    prepare -= {first for job, first in waiting.items() if job not in jobs}  # others need it
    try:
        note_cancel(store, runs, jobs)
    except OSError as error:
        say = f"cannot write into {store} ({error.strerror}): a local sweep goes on with its other runs"
        console.print(f"[yellow]warning[/yellow]: {say}")
    if jobs:
        scheduler.cancel(sorted(jobs | prepare))
    stopped = len(jobs | prepare)
    for run in runs:
        start = start_of(attempts(store / run)[-1]) if attempts(store / run) else {}
        here = start.get("host") == socket.gethostname() and start["job"] is None and start["pid"]
        if here and state(store / run) == "running":
            with contextlib.suppress(ProcessLookupError):
                os.kill(start["pid"], signal.SIGTERM)
                stopped += 1
    return stopped
