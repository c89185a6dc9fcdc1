"""TODO: store.runs."""

import os
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill_bench.store.claims import STALE_SECONDS, attempts, end_of, is_alive
from distill_bench.store.files import read_record, write_json

FAILURES = (  # kinds of failure, for `--retry-failed=KIND`
    "cuda_oom",
    "host_oom",
    "disk_full",
    "read_only",
    "timeout",
    "code_changed",
    "not_started",
    "exception",
)


def sweep_called(sweep: str | Path) -> str:
    """The name of the sweep that a name, its YAML, its manifest or its folder of results means; names may have dots."""
    path = Path(sweep)
    return path.stem if path.suffix in (".yaml", ".yml", ".json") else path.name


def result_of(run_dir: Path) -> dict[str, Any] | None:
    """The result of a run that has one."""
    found = read_record(
        run_dir / "result.json",
        run_id=str,
        status=str,
        student_updates=int,
        train_seconds=(int, float),
    )
    return found if found is not None and found["run_id"] == run_dir.name else None


def file_of_call(folder: Path) -> Path:
    """A file for what one call of a command leaves; sorted by name they are sorted by time."""
    return folder / f"{time.time():.3f}-{socket.gethostname()}-{os.getpid()}.json"


def record_outside(run_dir: Path, **said: Any) -> None:
    """Leave a run's error where its own folder cannot hold it; what cannot be written at all is in the log."""
    print(f"{run_dir.name}: {said['error']}", file=sys.stderr, flush=True)
    path = run_dir.parent / "errors" / f"{run_dir.name}.json"
    try:
        write_json(path, {"status": "error", "time": time.time(), "log": output_file()} | said)
    except OSError as error:
        print(f"and cannot write {path}: {error.strerror}", file=sys.stderr, flush=True)


def output_file() -> str | None:
    """The file that this process's output goes to."""
    path = Path(os.path.realpath("/proc/self/fd/1"))
    return str(path) if path.is_file() else None


def note_cancel(store: Path, runs: Iterable[str], jobs: Iterable[str]) -> None:
    """Note which runs are to stop and not to be started: for the drivers of local sweeps, wherever they are, and for --status."""
    write_json(file_of_call(store / "cancels"), {"runs": sorted(runs), "jobs": sorted(jobs)})


def cancels(store: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """What was cancelled after a moment, in seconds since the epoch."""
    paths = sorted(
        path for path in (store / "cancels").glob("*.json") if path.name > f"{since:.3f}"
    )
    return [found for path in paths if (found := read_record(path, runs=list, jobs=list))]


def state(run_dir: Path, queued: bool = False) -> str:
    """What a run is doing, from its folder; `queued`: one of its jobs is in the scheduler's queue.

    - "done", "collapsed": it has a result
    - "running": somebody works in it
    - "queued": it waits for its first attempt; "preempted": for its next one, saved; "requeued": for its next one, after a
      loss without warning (the checkpoint before serves)
    - "failed": its last attempt ended with an error; "stopped": on request, saved; "lost": without a word
    - "missing": nothing was tried
    """
    result = result_of(run_dir)
    if result is not None:
        return result["status"]
    tried = attempts(run_dir)
    if tried and is_alive(tried[-1], STALE_SECONDS):
        return "running"
    ended = end_of(tried[-1]) if tried else None
    if not queued and read_record(run_dir.parent / "errors" / f"{run_dir.name}.json") is not None:
        return "failed"
    if not tried:
        return "queued" if queued else "missing"
    if ended is None or ended["status"] == "lost":
        return "requeued" if queued else "lost"
    if ended["status"] == "stopped":
        return "preempted" if queued else "stopped"
    return "queued" if queued else {"error": "failed"}.get(ended["status"], "lost")
