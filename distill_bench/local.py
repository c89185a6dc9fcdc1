"""A bounded queue of worker processes on this machine: at most `jobs` at once, each with its share of the cores."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL_SECONDS = 0.1
DRIVER = "DISTILL_BENCH_DRIVER"  # tells a worker whose child it is: a worker whose driver is gone saves and stops


@dataclass
class Task:
    """One worker process: what it is called, its command line, and where its output goes."""

    name: str
    argv: list[str]
    log: Path
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def code(self) -> int | None:
        """The exit code; None while it has none."""
        return None if self.process is None else self.process.poll()


def python(module: str, *arguments: str) -> list[str]:
    """The command line of a module of this package, in this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def run_queue(
    tasks: Sequence[Task],
    jobs: int,
    changed: Callable[[Task], None] = lambda task: None,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Run every task to its end, at most `jobs` at once; `changed` is told of each start and end, `tick` called once a second.

    A task is a process group of its own. Ctrl-C asks the running ones to stop, waits for them to save, and raises
    KeyboardInterrupt; a second Ctrl-C kills them at once.
    """
    waiting, running, ticked = list(tasks), [], 0.0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                _start(task, jobs)
                running.append(task)
                changed(task)
            for task in [t for t in running if t.code is not None]:
                running.remove(task)
                changed(task)
            if time.monotonic() - ticked > 1:
                tick()
                ticked = time.monotonic()
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        _signal(running, signal.SIGTERM)
        try:
            for task in running:
                task.process.wait()
        except KeyboardInterrupt:
            _signal(running, signal.SIGKILL)
        raise
    except BaseException:
        _signal(running, signal.SIGKILL)
        raise


def _start(task: Task, jobs: int) -> None:
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    # idle OpenMP threads that spin would take the cores from the other workers
    env = {DRIVER: str(os.getpid()), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("ab") as log:
        task.process = subprocess.Popen(
            task.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | env,
            start_new_session=True,
        )


def _signal(tasks: Sequence[Task], number: signal.Signals) -> None:
    for task in tasks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(task.process.pid, number)
