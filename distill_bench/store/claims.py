"""Claims on a folder: numbered attempts, each kept alive by a heartbeat; work done only once."""

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill_bench.store.files import read_record, write_json, write_once
from distill_bench.store.processes import is_running, process_identity

STALE_SECONDS = 120.0  # an attempt whose process cannot be seen is dead after this silence
BEAT_SECONDS = 5.0


def try_claim(
    folder: Path, start: dict[str, Any], stale_seconds: float = STALE_SECONDS
) -> "Claim | None":
    """Claim a folder; None if another process holds the claim or takes it first.

    An attempt without exit.json is dead if its process has ended, or if this SLURM job was requeued
    after the attempt began. If its process cannot be seen from here (another host, another
    container), the attempt is dead once its heartbeat is older than `stale_seconds`.
    """
    earlier = attempts(folder)
    if earlier and is_alive(earlier[-1], stale_seconds):
        return None
    attempt = folder / "attempts" / f"{len(earlier) + 1:03d}"
    attempt.parent.mkdir(parents=True, exist_ok=True)
    try:
        attempt.mkdir()
    except FileExistsError:
        return None
    try:
        return Claim(attempt, process_identity() | start)
    except OSError:
        shutil.rmtree(attempt, ignore_errors=True)  # an attempt without a worker would look alive
        raise


class Claim:
    """Exclusive claim on a folder: a heartbeat in the folder's newest attempt until `close`."""

    def __init__(self, attempt: Path, start: dict[str, Any]) -> None:
        self.attempt = attempt
        self.taken_over = False
        write_json(attempt / "start.json", start)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                (self.attempt / "heartbeat").touch()
                self.taken_over = not self.is_newest()
            if self._closing.wait(BEAT_SECONDS):
                return

    def is_newest(self) -> bool:
        """False once another process has taken over the folder; write no results after that."""
        return attempts(self.attempt.parent.parent)[-1:] == [self.attempt]

    def close(self, status: str, **details: Any) -> None:
        """Stop the heartbeat and record how the attempt ended (`end_attempt`)."""
        self._closing.set()
        self._thread.join()
        end_attempt(self.attempt, status, **details)


def attempts(folder: Path) -> list[Path]:
    """The attempts at a folder, oldest first."""
    root = folder / "attempts"
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def end_attempt(attempt: Path, status: str, **details: Any) -> None:
    """Write an attempt's exit.json, unless another rank has already written it.

    Args:
        status: "done", "collapsed", "stopped", "superseded" (another process took over), "lost"
            (another rank of the run died) or "error".
        details: for "error", `error` (its message) and `kind` (one of FAILURE_KINDS).
    """
    write_once(attempt / "exit.json", {"status": status, "time": time.time()} | details)


def read_start(attempt: Path) -> dict[str, Any]:
    """An attempt's start.json (process and provenance), with neutral values for missing keys."""
    unknown = {"host": None, "pid": 0, "job": None, "restart": 0, "time": 0.0}
    return unknown | (read_record(attempt / "start.json") or {})


def read_exit(attempt: Path) -> dict[str, Any] | None:
    """An attempt's exit.json; None if it is missing or damaged."""
    return read_record(attempt / "exit.json", status=str)


def is_alive(attempt: Path, stale_seconds: float) -> bool:
    """True if a process still works in an attempt; see `try_claim` for the rules."""
    if (attempt / "exit.json").is_file():
        return False
    start, here = read_start(attempt), process_identity()
    if start["job"] and start["job"] == here["job"] and here["restart"] > start["restart"]:
        return False
    if (running := is_running(start)) is not None:
        return running
    beats = (p.stat().st_mtime for p in (attempt / "heartbeat", attempt) if p.exists())
    beat = next(beats, 0.0)
    if time.time() - beat < stale_seconds:
        return True
    return _file_time(attempt.parent.parent) - beat < stale_seconds


def _file_time(folder: Path) -> float:
    """The clock that dates the files of a folder: a file server's may differ from this host's."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(b"\0")
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # a read-only folder, which nobody can claim
        return time.time()


def once(
    folder: Path,
    ready: Callable[[], bool],
    make: Callable[[], None],
    wait: bool = True,
    poll_seconds: float = 0.5,
) -> None:
    """Have one of several processes make a shared artefact; the others wait until it is `ready`.

    The process that claims `folder` calls `make`. If it dies or `make` raises, the next process
    tries; the error is raised only in the process that called `make`.

    Args:
        wait: if False, return at once while another process is making the artefact.
    """
    while not ready():
        claim = try_claim(folder, {})
        if claim is None:
            if not wait:
                return
            time.sleep(poll_seconds)
            continue
        try:
            if not ready():
                make()
        except BaseException as error:
            status = "error" if isinstance(error, Exception) else "stopped"
            claim.close(status, error=f"{type(error).__name__}: {error}")
            raise
        claim.close("done")
