"""Write run folders by hand, in the states that a run passes through."""

import os
import time
from pathlib import Path
from typing import Any

from distill_bench.store.files import write_json
from distill_bench.store.processes import process_identity

HERE = process_identity() | {"job": None, "restart": 0}
GONE = HERE | {"pid": 2**22 + 1}  # above the largest process id
ELSEWHERE = HERE | {"host": "another", "pid_space": "another boot"}


def write_attempt(
    run: Path,
    number: int,
    start: dict[str, Any],
    end: dict[str, Any] | None = None,
    heartbeat_age: float = 0.0,
) -> None:
    """Write an attempt with its start.json, exit.json if it has ended, and heartbeat."""
    folder = run / "attempts" / f"{number:03d}"
    write_json(folder / "start.json", start)
    if end is not None:
        write_json(folder / "exit.json", end)
    (folder / "heartbeat").touch()
    for path in (folder / "heartbeat", folder):
        os.utime(path, (time.time() - heartbeat_age,) * 2)


def write_result(run: Path, **fields: Any) -> None:
    """Write the result.json of a finished run."""
    result = {"run_id": run.name, "status": "done", "student_updates": 10, "train_seconds": 5.0}
    write_json(run / "result.json", result | fields)
