"""Run folders: the state and result of a run, its errors, and the runs cancelled in a store."""

import os
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill_bench.store.claims import STALE_SECONDS, attempts, is_alive, read_exit
from distill_bench.store.files import read_record, write_json


def run_state(run_dir: Path, queued: bool = False) -> str:
    """The state of a run, from its folder and whether one of its jobs is in the scheduler's queue.

    - "done", "collapsed": it has a result
    - "running": a process works in it
    - "queued": its job waits for the first attempt
    - "preempted": its job waits to resume a run that was stopped and saved
    - "requeued": its job waits to resume a run that was lost; the last checkpoint serves
    - "failed": the last attempt ended with an error
    - "stopped": the last attempt saved on request
    - "lost": the last attempt ended without a record
    - "missing": never attempted
    """
    result = read_result(run_dir)
    if result is not None:
        return result["status"]
    tried = attempts(run_dir)
    if tried and is_alive(tried[-1], STALE_SECONDS):
        return "running"
    if not queued and read_record(error_path(run_dir)) is not None:
        return "failed"
    if not tried:
        return "queued" if queued else "missing"
    ended = (read_exit(tried[-1]) or {"status": "lost"})["status"]
    if ended == "lost":
        return "requeued" if queued else "lost"
    if ended == "stopped":
        return "preempted" if queued else "stopped"
    if queued:
        return "queued"
    return "failed" if ended == "error" else "lost"


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """The result of a run; None if it has none."""
    result = read_record(
        run_dir / "result.json",
        run_id=str,
        status=str,
        student_updates=int,
        train_seconds=(int, float),
    )
    return result if result is not None and result["run_id"] == run_dir.name else None


def sweep_name(sweep: str | Path) -> str:
    """The name of a sweep given by name, YAML, manifest or results folder; names may have dots."""
    path = Path(sweep)
    return path.stem if path.suffix in (".yaml", ".yml", ".json") else path.name


def error_path(run_dir: Path) -> Path:
    """Record of an error that the run's own folder could not hold, e.g. because it is read-only."""
    return run_dir.parent / "errors" / f"{run_dir.name}.json"


def record_error(run_dir: Path, error: str, kind: str) -> None:
    """Print a run's error and record it beside the run folders; it is cleared by the next claim."""
    print(f"{run_dir.name}: {error}", file=sys.stderr, flush=True)
    path = error_path(run_dir)
    record = {"status": "error", "time": time.time(), "log": output_file()}
    try:
        write_json(path, record | {"error": error, "kind": kind})
    except OSError as failure:
        print(f"cannot write {path}: {failure.strerror}", file=sys.stderr, flush=True)


def output_file() -> str | None:
    """The file that this process's standard output goes to; None if it is no file."""
    path = Path(os.path.realpath("/proc/self/fd/1"))
    return str(path) if path.is_file() else None


def call_file(folder: Path) -> Path:
    """A new file for one call of a command; names sort by time."""
    return folder / f"{time.time():.3f}-{socket.gethostname()}-{os.getpid()}.json"


def record_cancel(store: Path, runs: Iterable[str], jobs: Iterable[str]) -> None:
    """Record a `--cancel`: local drivers on any host read it, and --status explains lost jobs."""
    write_json(call_file(store / "cancels"), {"runs": sorted(runs), "jobs": sorted(jobs)})


def read_cancels(store: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """Records of `--cancel` calls after `since`, in seconds since the epoch."""
    paths = sorted(p for p in (store / "cancels").glob("*.json") if p.name > f"{since:.3f}")
    records = (read_record(path, runs=list, jobs=list) for path in paths)
    return [record for record in records if record is not None]
