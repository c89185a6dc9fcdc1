"""Run worker processes on this machine, several at once, each with its cores and GPUs."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from distill_bench.store.failures import os_error
from distill_bench.store.machine import usable_cores, visible_gpus
from distill_bench.store.stop import DRIVER
from distill_bench.sweep.local.forks import Fork, fork

# Exit codes of a worker (job.py); 2 is a bad command line.
DONE, FAILED, STOPPED, CLAIMED_ELSEWHERE = 0, 1, 3, 4

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0  # for ranks to report that another rank is gone, before they are killed


@dataclass
class Task:
    """One worker: its name, command line and log."""

    name: str
    argv: list[str]
    log: Path
    forks: bool = False  # argv runs a Python module, so that a fork can run it (forks.py)
    processes: int = 1  # ranks of the task, each with a GPU if there are any
    process: "subprocess.Popen | Fork | _Ranks | None" = field(default=None, repr=False)
    error: str | None = None  # reason why the task could not be started

    @property
    def exit_code(self) -> int | None:
        """None while the task runs, negative for a signal, 127 if it could not be started."""
        if self.error is not None:
            return 127
        return None if self.process is None else self.process.poll()


def python_command(module: str, *arguments: str) -> list[str]:
    """Command line that runs a module in this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def run_tasks(
    tasks: Sequence[Task],
    jobs: int,
    changed: Callable[[Task], None] = lambda task: None,
    tick: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
    cancelled: Callable[[Task], bool] = lambda task: False,
    ready: Callable[[Task], bool] = lambda task: True,
) -> None:
    """Run all tasks in order, at most `jobs` at once, each in its own process group.

    Ctrl-C asks the running tasks to save and raises KeyboardInterrupt when they have ended; a
    second Ctrl-C kills them.

    Args:
        changed: called at each start and end of a task.
        tick: called about once per second.
        stop: once it returns True, running tasks are asked to save and no more tasks are started.
        cancelled: if it returns True, the task is asked to save, or not started.
        ready: if it returns False, the task is passed over until another task has ended; it is not
            started if it is not ready after the last one.
    """
    waiting: list[Task] = list(tasks)
    running: dict[int, Task] = {}  # by slot
    signalled: set[str] = set()  # names of running tasks that were asked to save
    ticked = 0.0
    stopping = False
    blocked = False  # no waiting task is ready
    try:
        while waiting or running:
            if not stopping and stop():
                stopping = True
                waiting.clear()
                _signal(running.values(), signal.SIGTERM)
            while waiting and len(running) < jobs and not blocked:
                task = next(filter(ready, waiting), None)
                if task is None:
                    blocked = True
                    if not running:
                        waiting.clear()
                    break
                waiting.remove(task)
                if not cancelled(task):
                    slot = next(i for i in range(jobs) if i not in running)
                    _start(task, slot, jobs)
                    running[slot] = task
                    changed(task)
            for slot in [slot for slot, task in running.items() if task.exit_code is not None]:
                changed(running.pop(slot))
                blocked = False
            if time.monotonic() - ticked > 1:
                tick()
                to_stop = [t for t in running.values() if t.name not in signalled and cancelled(t)]
                _signal(to_stop, signal.SIGTERM)
                signalled.update(task.name for task in to_stop)
                ticked = time.monotonic()
            time.sleep(POLL_SECONDS)
    except BaseException as error:
        _end(running.values(), patient=isinstance(error, KeyboardInterrupt))
        raise


def _end(tasks: Iterable[Task], patient: bool) -> None:
    """Kill tasks; if `patient`, ask them to save first and kill them at a second Ctrl-C."""
    if patient:
        _signal(tasks, signal.SIGTERM)
        with contextlib.suppress(KeyboardInterrupt):
            for task in tasks:
                if task.process is not None:
                    task.process.wait()
            return
    _signal(tasks, signal.SIGKILL)


def _signal(tasks: Iterable[Task], number: signal.Signals) -> None:
    for task in tasks:
        if task.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(task.process.pid, number)


def _start(task: Task, slot: int, jobs: int) -> None:
    """Start a task in one of `jobs` slots; a failure to start is recorded in `task.error`."""
    threads = max(1, usable_cores() // (jobs * task.processes))
    env = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning idle threads would take other workers' cores
        DRIVER: str(os.getpid()),
    }
    gpus = visible_gpus()
    if gpus:
        own = range(slot * task.processes, (slot + 1) * task.processes)
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[i % len(gpus)] for i in own)
    try:
        task.log.parent.mkdir(parents=True, exist_ok=True)
        if task.forks and task.processes == 1 and not gpus:
            task.process = fork(task.argv[2:], env, task.log, threads)
            if task.process is not None:
                return
        with task.log.open("ab") as log:
            if task.processes > 1:
                task.process = _Ranks(task.argv, env, log, task.processes)
            else:
                task.process = _popen(task.argv, env, log, start_new_session=True)
    except OSError as error:  # a read-only folder or a missing Python affects only this task
        task.error = f"cannot start: {os_error(error)}"


def _popen(
    argv: list[str], env: dict[str, str], log: BinaryIO, **group: object
) -> subprocess.Popen:
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | env,
        **group,
    )


class _Ranks:
    """The ranks of one task in one process group, with the methods of Popen that are used here.

    Sets the environment variables of torchrun. torchrun itself is not used, because it kills ranks
    30 s after a SIGTERM and saving may take longer. If a rank dies or fails, the others might wait
    for it for ever, so they are killed after GRACE_SECONDS.
    """

    def __init__(self, argv: list[str], env: dict[str, str], log: BinaryIO, processes: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        self._ranks: list[subprocess.Popen] = []
        self._failed_at: float | None = None
        self._failed_code = 0
        for rank in range(processes):
            group = self._ranks[0].pid if rank else 0
            numbers = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            self._ranks.append(_popen(argv, env | numbers, log, process_group=group))
        self.pid = self._ranks[0].pid

    def poll(self) -> int | None:
        """Exit code once all ranks have ended: of the first failed rank, else of rank 0."""
        codes = [rank.poll() for rank in self._ranks]
        failed = [code for code in codes if code is not None and (code < 0 or code == FAILED)]
        if failed and self._failed_at is None:
            self._failed_at = time.monotonic()
            self._failed_code = failed[0]
        if None not in codes:
            return codes[0] if self._failed_at is None else self._failed_code
        if self._failed_at is not None and time.monotonic() - self._failed_at > GRACE_SECONDS:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        return None

    def wait(self) -> None:
        """Wait until all ranks have ended."""
        while self.poll() is None:
            time.sleep(POLL_SECONDS)
