"""TODO: store.claims."""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill_bench.store.files import (
    kind_of_write,
    read_record,
    write_bytes,
    write_json,
    write_once,
)
from distill_bench.store.stop import slurm_job

STALE_SECONDS = 120.0


BEAT_SECONDS = 5.0


RESERVED_BYTES = 4096  # that an attempt holds for its last word: the disk may be full by then


def start_of(attempt: Path) -> dict[str, Any]:
    """Who works in an attempt, and with what."""
    return {"host": None, "pid": 0, "job": None, "restart": 0, "time": 0.0} | (
        read_record(attempt / "start.json") or {}
    )


def end_of(attempt: Path) -> dict[str, Any] | None:
    """How an attempt ended, where it has said so."""
    return read_record(attempt / "exit.json", status=str)


class Claim:
    """The right to work on a folder: attempts/NNN, made by mkdir, kept alive by a heartbeat until `close`."""

    def __init__(self, attempt: Path, start: dict) -> None:
        self.attempt, self.taken_over = attempt, False
        write_json(attempt / "start.json", start)
        write_bytes(attempt / "reserve", bytes(RESERVED_BYTES))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                (self.attempt / "heartbeat").touch()
                self.taken_over = not self.newest()
            if self._stop.wait(BEAT_SECONDS):
                return

    def newest(self) -> bool:
        """False once another attempt has taken the folder over: this one must not write results."""
        return attempts(self.attempt.parent.parent)[-1:] == [self.attempt]

    def close(self, status: str, **more: Any) -> None:
        """Record how the attempt ended: "done", "collapsed", "stopped", "superseded" by another attempt, "lost" with another
        process of the run, or "error" (with `error`, its last line, and `kind`)."""
        self._stop.set()
        self._thread.join()
        end_attempt(self.attempt, status, **more)


def end_attempt(attempt: Path, status: str, **more: Any) -> None:
    """Write an attempt's exit.json, on a full disk in its reserve; of several ranks the first to end says why."""
    said, path, reserve = (
        {"status": status, "time": time.time()} | more,
        attempt / "exit.json",
        attempt / "reserve",
    )
    try:
        write_once(path, said)
    except OSError as error:
        if kind_of_write(error) != "disk_full":
            raise
        if "error" in said:
            said["error"] = said["error"][-500:]
        with reserve.open("r+b") as file:
            file.write(json.dumps(said).encode().ljust(RESERVED_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(reserve, path)
    with contextlib.suppress(OSError):
        reserve.unlink()


def attempts(folder: Path) -> list[Path]:
    """Attempts of a folder, oldest first."""
    root = folder / "attempts"
    return (
        sorted((p for p in root.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
        if root.is_dir()
        else []
    )


def claim(folder: Path, start: dict, stale_seconds: float = STALE_SECONDS) -> Claim | None:
    """Claim a folder, or None where somebody else is alive in it or came first.

    An attempt without exit.json is dead if its process is gone (same host), if this is the same SLURM job in a later life, or if
    its heartbeat is older than `stale_seconds`.
    """
    before = attempts(folder)
    if before and is_alive(before[-1], stale_seconds):
        return None
    attempt = folder / "attempts" / f"{len(before) + 1:03d}"
    attempt.parent.mkdir(parents=True, exist_ok=True)
    try:
        attempt.mkdir()
    except FileExistsError:
        return None
    try:
        return Claim(attempt, process_identity() | start)
    except OSError:
        shutil.rmtree(attempt, ignore_errors=True)  # nobody is in it: it must not look alive
        raise


def once(
    folder: Path,
    ready: Callable[[], bool],
    make: Callable[[], None],
    wait: bool = True,
    poll_seconds: float = 0.5,
) -> None:
    """Make what several processes share: whoever claims `folder` first makes it, the others `wait` until it is `ready`, or not.

    A maker that died is replaced; what `make` raises is raised in the process that made, and the next in line tries again.
    """
    while not ready():
        mine = claim(folder, {})
        if mine is None:
            if not wait:
                return
            time.sleep(poll_seconds)
            continue
        try:
            if not ready():
                make()
        except BaseException as error:
            mine.close("error", error=f"{type(error).__name__}: {error}")
            raise
        mine.close("done")


def process_identity() -> dict:
    """Who is working: host, process and, under SLURM, job and restart count."""
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": slurm_job(),
        "restart": restart,
        "time": time.time(),
    }


def is_alive(attempt: Path, stale_seconds: float) -> bool:
    if (attempt / "exit.json").is_file():
        return False
    start, me = start_of(attempt), process_identity()
    if start["job"] and start["job"] == me["job"] and me["restart"] > start["restart"]:
        return False
    if start["host"] == me["host"] and not _process_exists(start["pid"]):
        return False
    beats = (p.stat().st_mtime for p in (attempt / "heartbeat", attempt) if p.exists())
    return time.time() - next(beats, 0.0) < stale_seconds


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):  # a zombie has ended, though nobody has waited for it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True
