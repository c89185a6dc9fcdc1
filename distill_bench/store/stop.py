"""Stop requests: signals set a flag, which training checks between updates.

- SIGUSR2: SLURM's warning before a time limit or a preemption (the job's --signal).
- SIGTERM: preemption without a warning, `scontrol requeue`, `scancel`, or `--cancel`.
- SIGINT: Ctrl-C on this machine; a second one ends the process at once.

A worker also stops if its driver has ended, because nothing would start the next run.
"""

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator

DRIVER = "DISTILL_BENCH_DRIVER"  # environment variable of a worker: pid of the driver


class Stopped(BaseException):
    """Raised on a stop request during an all-or-nothing stage; the next attempt repeats it."""


class StopRequest:
    """Callable flag: True once this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._at_once = False
        driver = int(os.environ.get(DRIVER, 0))
        self._driver_has_ended = has_ended(driver) if driver else lambda: False

    def listen(self) -> "StopRequest":
        """Install the handlers. Call this before slow imports: an unhandled SIGUSR2 kills."""
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        # a SIGTERM after SIGUSR2 changes nothing: the job is requeued
        if self.signal != signal.SIGUSR2:
            self.signal = signal.Signals(number)
        if self._at_once:
            raise Stopped

    def __call__(self) -> bool:
        if self.signal is None and self._driver_has_ended():
            self.signal = signal.SIGTERM
        return self.signal is not None

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Context in which a stop request sets the flag and raises `Stopped` at once."""
        self._at_once = True
        try:
            if self():
                raise Stopped
            yield
        finally:
            self._at_once = False


def has_ended(pid: int) -> Callable[[], bool]:
    """A function that tells if a process of this machine has ended since this call.

    The process need not be the parent: that of a forked worker is the fork server, which lives as
    long as any fork.
    """
    if not hasattr(os, "pidfd_open"):  # only Linux has it
        return lambda: not _exists(pid)
    try:
        file = os.pidfd_open(pid)  # never of a later process with the same id
    except ProcessLookupError:
        return lambda: True
    ended = select.poll()
    ended.register(file, select.POLLIN)
    return lambda: bool(ended.poll(0))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def slurm_job() -> str | None:
    """Id of this process's SLURM job, as `squeue --array` shows it; None outside SLURM."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")
