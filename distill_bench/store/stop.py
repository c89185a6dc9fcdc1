"""How a worker is asked to stop, and what it then owes the scheduler.

A handler only sets a flag; training looks at it between updates, saves and ends, and `obey` does the rest. Measured on SLURM:

- SIGUSR2 (the job's --signal: a time limit near, or a preemption): save, put the job back into the queue, wait to be killed.
- SIGTERM (preemption without a signal, `scontrol requeue`, `scancel`): save, wait to be killed. SLURM alone knows whether the job
  comes back; a job that exits by itself counts as failed and does not.
- SIGINT (Ctrl-C on this machine): save and end; a second one ends at once.

A worker whose driver is gone stops too: nobody would start the next one.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

DRIVER = "DISTILL_BENCH_DRIVER"  # a worker's environment: the process that started it
PATIENCE_SECONDS = 900.0  # for SLURM to kill a job that it has told to stop


class Stopped(BaseException):
    """Asked to stop in a stage whose output is written whole or not at all: it begins again next time."""


class StopRequest:
    """True once the process was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._at_once = False
        self._driver = int(os.environ.get(DRIVER, 0))

    def listen(self) -> "StopRequest":
        """Install the handlers. Do it first: imports take seconds, and SIGUSR2 kills a process that does not listen."""
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, _: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if (
            self.signal != signal.SIGUSR2
        ):  # a SIGTERM that follows it changes nothing: the job goes back into the queue
            self.signal = signal.Signals(number)
        if self._at_once:
            raise Stopped

    def __call__(self) -> bool:
        if self.signal is None and self._driver and os.getppid() != self._driver:
            self.signal = signal.SIGTERM
        return self.signal is not None

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a request is not noted but raised, as `Stopped`."""
        self._at_once = True
        try:
            if self():
                raise Stopped
            yield
        finally:
            self._at_once = False


def slurm_job() -> str | None:
    """The id of the SLURM job that this process works in, as `squeue --array` shows it."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def obey(stop: StopRequest, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """In a SLURM job that has saved: requeue it where that is ours to do, and wait to be killed.

    Returns only where SLURM does not requeue (then the run stays stopped, and the sweep's next call starts it again).
    """
    if stop.signal != signal.SIGUSR2:
        _sleep(patience_seconds)  # then nobody meant to kill the job: a signal by hand
    if int(os.environ.get("SLURM_PROCID", 0)) == 0:
        print(f"saved; {slurm_job()} goes back into the queue", flush=True)
        done = subprocess.run(["scontrol", "requeue", slurm_job()], capture_output=True, text=True)
        if done.returncode:
            print(f"SLURM does not requeue {slurm_job()}: {done.stderr.strip()}", flush=True)
            return
    _sleep(patience_seconds)


def _sleep(seconds: float) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(left)
