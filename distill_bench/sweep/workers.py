"""A bounded queue of workers on this machine: at most `jobs` at once, each with its share of the cores and GPUs.

Where there is no GPU a worker may be a fork of a process that has imported the libraries: that saves some seconds. Of our own
code nothing is imported before the fork, so that a worker runs what its provenance says. A GPU may be in use by whatever imports
torch, and would be lost to a fork.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from distill_bench.store.stop import DRIVER

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0  # for ranks to say that one of them is gone
LIBRARIES = [
    "torch.distributed.fsdp",
    "accelerate",
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "transformers.modeling_utils",
    "peft",
    "open_clip",
    "torch.utils.tensorboard",
    "pydantic",
    "rich.progress",
]

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(LIBRARIES)


@dataclass
class Task:
    """One worker: what it is called, its command line, and where its output goes."""

    name: str
    argv: list[str]
    log: Path
    forks: bool = False  # a module of this package, which may run in a fork
    processes: int = 1  # that work together, each with a GPU where there are any
    process: "subprocess.Popen | _Fork | _Ranks | None" = field(default=None, repr=False)
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
                told = [
                    task for task in running.values() if task.name not in dropped and drop(task)
                ]
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
    threads = str(max(1, len(os.sched_getaffinity(0)) // (jobs * task.processes)))
    # idle OpenMP threads that spin would take the cores from the other workers
    env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    devices = gpus()
    if devices:
        first = slot * task.processes
        env["CUDA_VISIBLE_DEVICES"] = ",".join(
            devices[(first + i) % len(devices)] for i in range(task.processes)
        )
    try:
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("ab") as log:
            if task.processes > 1:
                task.process = _Ranks(
                    task.argv, env | {DRIVER: str(os.getpid())}, log, task.processes
                )
            elif task.forks and not devices and _forked_with(threads):
                task.process = _Fork(task, env)
            else:
                task.process = _popen(
                    task.argv, env | {DRIVER: str(os.getpid())}, log, start_new_session=True
                )
    except (
        OSError
    ) as error:  # a folder that cannot be written, a Python that is gone: this task's trouble alone
        task.error = f"cannot start: {error.strerror}: {error.filename}"


_threads_of_forks: list[str] = []


def _forked_with(threads: str) -> bool:
    """Whether forks have so many threads: their libraries took the number of the first one's as they were imported."""
    _threads_of_forks[:] = _threads_of_forks or [threads]
    return _threads_of_forks == [threads]


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
    """A task of several processes, started as torchrun starts them, with as much of Popen as is used here.

    They are one process group. Where one dies or fails the others, who may wait for it for ever, are soon killed.
    """

    def __init__(self, argv: list[str], env: dict[str, str], log: BinaryIO, processes: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        self._ranks: list[subprocess.Popen] = []
        self._broken: tuple[float, int] | None = None  # when the first died or failed, and its code
        for rank in range(processes):
            group = self._ranks[0].pid if rank else 0
            own = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            self._ranks.append(_popen(argv, env | own, log, process_group=group))
        self.pid = self._ranks[0].pid

    def poll(self) -> int | None:
        """When all have ended the code of the first that died or failed, else of the first rank."""
        codes = [rank.poll() for rank in self._ranks]
        bad = [code for code in codes if code is not None and (code < 0 or code == 1)]
        if bad and self._broken is None:
            self._broken = time.monotonic(), bad[0]
        if None not in codes:
            return codes[0] if self._broken is None else self._broken[1]
        if self._broken is not None and time.monotonic() - self._broken[0] > GRACE_SECONDS:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        return None

    def wait(self) -> None:
        """Return when all have ended."""
        while self.poll() is None:
            time.sleep(POLL_SECONDS)


class _Fork:
    """A task as a fork, with as much of Popen as is used here."""

    def __init__(self, task: Task, env: dict[str, str]) -> None:
        before = {key: os.environ.get(key) for key in env}
        os.environ.update(env)  # libraries read it as they are imported
        try:
            self._process = _forks.Process(
                target=_run_module, args=(task.argv[2:], os.environ.copy(), str(task.log))
            )
            self._process.start()
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it has none."""
        return self._process.exitcode

    def wait(self) -> None:
        """Return when it has ended."""
        self._process.join()


def _run_module(argv: list[str], env: dict[str, str], log: str) -> None:
    """In the fork: what `python -m MODULE ...` does in a session of its own."""
    os.setsid()
    with open(log, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(
        env | {DRIVER: str(os.getppid())}
    )  # with the driver goes the process that forks
    module, *sys.argv[1:] = argv
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _signal(tasks: Iterable[Task], number: signal.Signals) -> None:
    for task in tasks:
        if task.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(task.process.pid, number)
