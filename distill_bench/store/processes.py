"""Identity of a process that holds across hosts, containers and reused process ids.

Containers may share a hostname but have process ids of their own, so a process is identified by the
machine's boot, the namespace of its id, its id, and its start time.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_bench.store.stop import slurm_job

PROC = Path("/proc")
NAMESPACES = ("pid", "time")  # start times are relative to the time namespace


def process_identity() -> dict[str, Any]:
    """Host, process and time; under SLURM also the job and its restart count."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_space": pid_space(),
        "began": _start_time(os.getpid()),
        "job": slurm_job(),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "time": time.time(),
    }


def pid_space() -> str | None:
    """Name of the set of processes in which a process id is unique; None if it is unknown.

    On Linux, this boot of the machine and this process's namespaces; elsewhere the host.
    """
    if sys.platform != "linux":
        return f"{sys.platform} {socket.gethostname()}"
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        links = [PROC / "self/ns" / name for name in NAMESPACES]
        spaces = [os.readlink(link) for link in links if link.is_symlink()]
    except OSError:
        return None
    return " ".join([boot, *spaces]) if spaces else None


def is_running(identity: Mapping[str, Any]) -> bool | None:
    """True if a process exists, False if it has ended, None if this process cannot tell.

    Args:
        identity: a `process_identity`.
    """
    if identity.get("pid_space") is None or identity["pid_space"] != pid_space():
        return None
    pid = identity["pid"]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # a process of another user
    if sys.platform == "linux":
        began = _start_time(pid)
        if began is None:  # hidden from this user, or it has just ended
            return None
        return began == identity.get("began") and _state(pid) != "Z"
    return None


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the command, which may hold spaces; [] if unreadable."""
    with contextlib.suppress(OSError):
        return (
            (PROC / str(pid) / "stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()
        )
    return []


def _start_time(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None if unknown."""
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else None


def _state(pid: int) -> str | None:
    """State of a process: a zombie (Z) has ended, but its parent has not reaped it."""
    return next(iter(_stat(pid)), None)
