"""Run folders: state, result and errors of a run, and the cancellations in a store."""

import os
import secrets
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill_bench.store.claims import STALE_SECONDS, attempts, is_alive, read_exit
from distill_bench.store.failures import os_error
from distill_bench.store.files import read_record, write_json


def run_state(run_dir: Path, queued: bool = False, samplings: Iterable[str] = ()) -> str:
    """The state of a run, from its folder and whether one of its jobs is in the scheduler's queue.

    Args:
        samplings: names of further ways in which the run's student must have been sampled.

    - "done", "collapsed": the status in its result
    - "running": a process is working in its folder
    - "queued": its job waits to start it, or to repeat a failed attempt
    - "preempted": its job waits to resume a run that was stopped and saved
    - "requeued": its job waits to resume a lost run from the last checkpoint
    - "failed": the last attempt ended with an error
    - "stopped": the last attempt was asked to stop and saved a checkpoint
    - "lost": the last attempt ended without a record or without a result
    - "missing": never attempted
    - "unsampled": it has its result, but not those of all further ways of sampling
    """
    result = read_result(run_dir)
    if result is not None and not (result["status"] == "done" and unsampled(run_dir, samplings)):
        return result["status"]
    tried = attempts(run_dir)
    if tried and is_alive(tried[-1], STALE_SECONDS):
        return "running"
    if not queued and read_record(error_path(run_dir)) is not None:
        return "failed"
    if not tried:
        idle = "missing" if result is None else "unsampled"
        return "queued" if queued else idle
    ended = (read_exit(tried[-1]) or {"status": "lost"})["status"]
    if ended == "lost":
        return "requeued" if queued else "lost"
    if ended == "stopped":
        return "preempted" if queued else "stopped"
    if queued:
        return "queued"
    if ended == "error":
        return "failed"
    return "lost" if result is None else "unsampled"


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


def initial_path(run_dir: Path) -> Path:
    """Record of the student of another run that a run started from (`init`)."""
    return run_dir / "initial.json"


def read_initial(run_dir: Path) -> dict[str, Any] | None:
    """Run id, content and cost of the student that a run started from; None without one.

    The cost includes that of every earlier stage, in the run's own unit.
    """
    return read_record(
        initial_path(run_dir),
        run_id=str,
        content=str,
        cost_forward_equivalents=(int, float),
        train_seconds=(int, float),
    )


def requested_samplings(run_dir: Path) -> dict[str, Path]:
    """Further ways to sample a run's student: name -> the file that states the way."""
    return {path.stem: path for path in sorted((run_dir / "samplings").glob("*.yaml"))}


def unsampled(run_dir: Path, names: Iterable[str]) -> list[str]:
    """The ways of sampling, among these names, that have no result yet."""
    folders = {name: run_dir / "samplings" / name for name in names}
    return [
        name
        for name, folder in folders.items()
        if read_record(folder / "result.json", protocol=str) is None
    ]


def sweep_name(sweep: str | Path) -> str:
    """Name of a sweep, given its name (dots allowed), YAML file, manifest or results folder."""
    path = Path(sweep)
    return path.stem if path.suffix in (".yaml", ".yml", ".json") else path.name


def error_path(run_dir: Path) -> Path:
    """Record of an error that could not be written to the run's folder, e.g. on a full disk."""
    return run_dir.parent / "errors" / f"{run_dir.name}.json"


def record_error(run_dir: Path, error: str, kind: str) -> None:
    """Print a run's error and record it beside the run folders until the run is claimed again."""
    print(f"{run_dir.name}: {error}", file=sys.stderr, flush=True)
    path = error_path(run_dir)
    record = {"status": "error", "time": time.time(), "log": output_file()}
    try:
        write_json(path, record | {"error": error, "kind": kind})
    except OSError as failure:
        print(f"cannot write {path}: {os_error(failure)}", file=sys.stderr, flush=True)


def output_file() -> str | None:
    """File that receives this process's standard output; None if it is not a file."""
    path = Path(os.path.realpath("/proc/self/fd/1"))
    return str(path) if path.is_file() else None


def call_file(folder: Path) -> Path:
    """Path of a new file for one call of a command; the names sort by time."""
    # containers may share a hostname and a process id
    token = secrets.token_hex(4)
    return folder / f"{time.time():.3f}-{socket.gethostname()}-{os.getpid()}-{token}.json"


def record_cancel(store: Path, runs: Iterable[str], jobs: Iterable[str]) -> None:
    """Record a `--cancel` call, which stops local drivers and explains lost jobs."""
    write_json(call_file(store / "cancels"), {"runs": sorted(runs), "jobs": sorted(jobs)})


def read_cancels(store: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """Records of `--cancel` calls after `since`, in seconds since the epoch."""
    paths = sorted(p for p in (store / "cancels").glob("*.json") if p.name > f"{since:.3f}")
    records = (read_record(path, runs=list, jobs=list) for path in paths)
    return [record for record in records if record is not None]
