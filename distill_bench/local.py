"""A bounded queue of worker processes on this machine: at most `jobs` at once, each with its share of the cores and GPUs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distill_bench.stop import DRIVER

POLL_SECONDS = 0.1


@dataclass
class Task:
    """One worker process: what it is called, its command line, and where its output goes."""

    name: str
    argv: list[str]
    log: Path
    process: subprocess.Popen | None = field(default=None, repr=False)
    error: str | None = None  # why it could not even be started

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it has none."""
        if self.error is not None:
            return 127
        return None if self.process is None else self.process.poll()


def python(module: str, *arguments: str) -> list[str]:
    """The command line of a module of this package, in this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def run_queue(
    tasks: Sequence[Task],
    jobs: int,
    changed: Callable[[Task], None] = lambda task: None,
    tick: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
    drop: Callable[[Task], bool] = lambda task: False,
) -> None:
    """Run every task to its end, at most `jobs` at once; `changed` is told of each start and end, `tick` called once a second.

    A task is a process group of its own. Once `stop()` is true nothing more is started and the running ones are asked to save;
    so are single tasks that are to `drop`.
    Ctrl-C does the same and raises KeyboardInterrupt when they have ended; a second Ctrl-C kills them at once.
    """
    waiting, running, ticked, asked, dropped = list(tasks), {}, 0.0, False, set()
    try:
        while waiting or running:
            if not asked and stop():
                asked = True
                waiting.clear()
                _signal(running.values(), signal.SIGTERM)
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                if drop(task):
                    continue
                slot = next(i for i in range(jobs) if i not in running)
                _start(task, slot, jobs)
                running[slot] = task
                changed(task)
            for slot, task in list(running.items()):
                if task.code is not None:
                    del running[slot]
                    changed(task)
            if time.monotonic() - ticked > 1:
                tick()
                told = [task for task in running.values() if task.name not in dropped and drop(task)]
                _signal(told, signal.SIGTERM)
                dropped.update(task.name for task in told)
                ticked = time.monotonic()
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        _signal(running.values(), signal.SIGTERM)
        try:
            for task in running.values():
                task.process.wait()
        except KeyboardInterrupt:
            _signal(running.values(), signal.SIGKILL)
        raise
    except BaseException:
        _signal(running.values(), signal.SIGKILL)
        raise


def _start(task: Task, slot: int, jobs: int) -> None:
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    # idle OpenMP threads that spin would take the cores from the other workers
    env = {DRIVER: str(os.getpid()), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    devices = gpus()
    if devices:
        env["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    try:
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
    except OSError as error:  # a folder that cannot be written, a Python that is gone: this task's trouble alone
        task.error = f"cannot start: {error.strerror}: {error.filename}"


def _signal(tasks: Iterable[Task], number: signal.Signals) -> None:
    for task in tasks:
        if task.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(task.process.pid, number)
