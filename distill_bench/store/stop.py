"""Stop requests: signals set a flag, which training checks between updates.

- SIGUSR2: SLURM's warning before a time limit or a preemption (the job's --signal).
- SIGTERM: preemption without a warning, `scontrol requeue`, `scancel`, or `--cancel`.
- SIGINT: Ctrl-C on this machine; a second one ends the process at once.

A worker also stops if its driver has ended, because nothing would start the next run.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

DRIVER = "DISTILL_BENCH_DRIVER"  # environment variable of a worker: pid of the driver


class Stopped(BaseException):
    """Raised on a stop request during an all-or-nothing stage; the next attempt repeats it."""


class StopRequest:
    """Callable flag: True once this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._at_once = False
        self._driver = int(os.environ.get(DRIVER, 0))

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
        if self.signal is None and self._driver and os.getppid() != self._driver:
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


def slurm_job() -> str | None:
    """Id of this process's SLURM job, as `squeue --array` shows it; None outside SLURM."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")
