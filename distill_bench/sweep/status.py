"""State, progress and history of every run, and how --status, --json and --explain print them.

Reads small files only and never imports torch. `store.runs.run_state` decides a run's state; this
module adds progress and, for a run that failed or was lost, the reason and the log.
"""

import contextlib
import itertools
import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from distill_bench.store.claims import attempts, read_exit, read_start
from distill_bench.store.durations import duration
from distill_bench.store.files import last_lines, read_json, text_lines
from distill_bench.store.runs import (
    error_path,
    read_initial,
    read_result,
    run_state,
    unsampled,
)
from distill_bench.sweep.provenance import code_fingerprint
from distill_bench.sweep.slurm.queue import KIND_OF_END, Queue, final_states

ENDED = ("done", "collapsed")
TO_LAUNCH = ("missing", "lost", "stopped", "unsampled")
WAITING = ("queued", "preempted", "requeued", "running")


@dataclass(frozen=True)
class ManifestEntry:
    """A run as recorded in its sweep's manifest."""

    method: str  # "" for a row that trains nothing
    student_updates: int
    samplings: tuple[str, ...] = ()  # names of further ways in which its student is sampled
    init_run: str | None = None  # id of the run from whose student it starts


@dataclass(frozen=True)
class Status:
    """One line of --status."""

    run: str
    state: str
    student_updates: int
    of: int
    seconds: float  # of training so far
    seconds_left: float | None  # of training
    attempts: int
    requeues: int
    job: str | None
    kind: str | None = None  # of failure
    note: str = ""
    log: str | None = None
    stale: bool = False  # the result was made by different code, or from another start

    @property
    def rate(self) -> float | None:
        """Student updates per second."""
        if not self.seconds or not self.student_updates:
            return None
        return self.student_updates / self.seconds


def read_statuses(store: Path, entries: Mapping[str, ManifestEntry], queue: Queue) -> list[Status]:
    """The status of every run."""
    codes = {method: code_fingerprint(method) for method in {e.method for e in entries.values()}}
    statuses = [
        _read_status(store / run, entry, queue, codes[entry.method])
        for run, entry in entries.items()
    ]
    unexplained = [s.job for s in statuses if s.job and s.state in ("lost", "stopped")]
    ends = dict.fromkeys(queue.cancelled, "CANCELLED")
    if unexplained:
        ends |= final_states(unexplained)
    disk_full = any(s.state == "lost" for s in statuses) and _is_full(store)
    return [_explained(s, ends.get(s.job or ""), disk_full) for s in statuses]


def waits_for(folder: Path, init_run: str | None, queue: Queue | None = None) -> str | None:
    """Reason why a run cannot start yet: its initial run is not done; None if it can.

    Args:
        queue: jobs, for the state of the initial run in the message.
    """
    if init_run is None or read_result(folder) is not None:
        return None
    queued = queue is not None and bool(queue.active(init_run))
    state = run_state(folder.parent / init_run, queued)
    return None if state == "done" else f"waits for {init_run}, which is {state}"


def _is_full(store: Path) -> bool:
    """True if the store's disk is full, so that runs could not record their end."""
    with contextlib.suppress(OSError):
        return os.statvfs(store).f_bavail == 0
    return False


def _read_status(folder: Path, entry: ManifestEntry, queue: Queue, code: str) -> Status:
    """The status of one run, from its folder and the queue."""
    run = folder.name
    jobs = queue.jobs.get(run, [])
    state = run_state(folder, bool(queue.active(run)), entry.samplings)
    waits = waits_for(folder, entry.init_run, queue)
    if state == "missing" and jobs and waits is None:
        state = "lost"  # its job ended before the first attempt
    if state == "missing" and not jobs:  # most of a new sweep: nothing more to read
        return Status(
            run=run,
            state=state,
            student_updates=0,
            of=entry.student_updates,
            seconds=0.0,
            seconds_left=None,
            attempts=0,
            requeues=0,
            job=None,
            note=waits or "",
        )
    tried = attempts(folder)
    starts = [read_start(attempt) for attempt in tried]
    result = read_result(folder) if state in ENDED else None
    error = read_json(error_path(folder))
    updates, seconds = _progress(folder, result)
    seconds_left = None
    if state == "running" and updates:
        seconds_left = (entry.student_updates - updates) * seconds / updates
    log = (error or {}).get("log") or (starts[-1].get("log") if starts else None)
    if log is None and jobs:
        log = str(queue.log(run))

    note, kind = "", None
    end = (read_exit(tried[-1]) if tried else None) or {}
    if state == "failed":
        end = end if error is None else error
        note, kind = _last_line(end.get("error")), end.get("kind", "exception")
    elif state == "collapsed":
        note = str(result.get("reason"))
    elif state == "stopped":
        update = end.get("student_updates")
        note = f"stopped by {end.get('signal')} at student update {update}, saved"
    elif state == "unsampled":
        note = f"to be sampled in {len(unsampled(folder, entry.samplings))} further ways"
    elif waits is not None and state != "running":
        note = waits
    elif state == "lost":
        note = _last_line(end.get("error")) or (_last_words(Path(log)) if log else "")
    elif reason := queue.never_starts(run):
        note = f"SLURM will not start it: {reason}"
    stale = result is not None and (
        result.get("code_fingerprint") not in (None, code)
        or (entry.init_run is not None and _has_other_start(folder))
    )
    return Status(
        run=run,
        state=state,
        student_updates=updates,
        of=entry.student_updates,
        seconds=seconds,
        seconds_left=seconds_left,
        attempts=len(tried),
        requeues=_requeues(starts),
        job=jobs[-1] if jobs else None,
        kind=kind,
        note=note,
        log=log,
        stale=stale,
    )


def _has_other_start(folder: Path) -> bool:
    """True if a run started from a student that its initial run, trained again, no longer has."""
    initial = read_initial(folder)
    if initial is None:
        return False
    now = (read_result(folder.parent / initial["run_id"]) or {}).get("student_content")
    return now not in (None, initial["content"])


def _requeues(starts: Sequence[Mapping[str, Any]]) -> int:
    """Number of attempts in the same SLURM job as the attempt before."""
    pairs = itertools.pairwise(starts)
    return sum(a["job"] is not None and a["job"] == b["job"] for a, b in pairs)


def _explained(status: Status, end: str | None, disk_full: bool) -> Status:
    """Add the kind of end, from SLURM's final state `end`, if the run recorded none."""
    kind = KIND_OF_END.get(end or "")
    if status.state == "stopped":
        return replace(status, kind=kind)
    if status.state == "lost":
        unknown = "killed" if status.attempts else "not_started"
        kind = kind or ("disk_full" if disk_full else unknown)
        note = f"{kind}: {status.note}" if status.note else kind
        return replace(status, kind=kind, note=note)
    return status


def _progress(folder: Path, result: Mapping[str, Any] | None) -> tuple[int, float]:
    """Student updates and seconds of training so far."""
    if result is not None:
        return result["student_updates"], result["train_seconds"]
    for line in last_lines(folder / "train.jsonl"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
            logged = json.loads(line)
            return logged["student_updates"], logged["seconds"]
    return 0, 0.0


def _last_words(log: Path) -> str:
    """Last line of a log, ignoring the lines of srun."""
    return next((line for line in last_lines(log) if not line.startswith("srun:")), "")[:300]


def _last_line(text: Any) -> str:
    lines = text_lines(str(text or "").strip())
    return lines[-1][:300] if lines else ""


# --- printing ---


def status_table(statuses: Sequence[Status]) -> Table:
    """The table of --status."""
    heads = ("run", "state", "student updates", "updates/s", "left", "note")
    table = Table(*heads, box=None, pad_edge=False)
    for s in statuses:
        state = s.state if s.kind is None or s.state == "lost" else f"{s.state} ({s.kind})"
        rate = "" if s.rate is None or s.state in ENDED else f"{s.rate:.3g}"
        left = "" if s.seconds_left is None else duration(s.seconds_left)
        progress = f"{s.student_updates}/{s.of}"
        table.add_row(s.run, state, progress, rate, left, "; ".join(_notes(s)))
    return table


def _notes(s: Status) -> list[str]:
    notes = []
    if s.requeues:
        notes.append(f"requeued {s.requeues} times" if s.requeues > 1 else "requeued once")
    if s.stale:
        notes.append("made by other code")
    if s.note:
        notes.append(s.note)
    if s.log and s.state in ("failed", "lost"):
        notes.append(f"log: {s.log}")
    return notes


def count_states(statuses: Iterable[Status]) -> str:
    """Number of runs in each state, e.g. "3 done, 1 running"."""
    numbers = Counter(s.state for s in statuses)
    return ", ".join(f"{number} {state}" for state, number in numbers.items())


def status_json(statuses: Iterable[Status]) -> str:
    """The statuses as one JSON list of objects, for scripts."""
    return json.dumps([asdict(s) | {"rate": s.rate} for s in statuses], indent=2)


def exit_code(statuses: Iterable[Status]) -> int:
    """0 if all runs ended, 4 if a run failed, else 3."""
    states = {s.state for s in statuses}
    if states <= set(ENDED):
        return 0
    return 4 if "failed" in states else 3


def explanation(
    store: Path, run: str, axes: Mapping[str, Any], queue: Queue, entry: ManifestEntry
) -> str:
    """The text of --explain: config, jobs, attempts, end of the log, command to run it by hand.

    Args:
        axes: the run's values of the keys that vary in the sweep.
    """
    folder = store / run
    (status,) = read_statuses(store, {run: entry}, queue)
    lines = [f"{run}: {status.state} {status.student_updates}/{status.of} {status.note}".rstrip()]
    lines.append(f"config    {folder / 'run.yaml'}")
    lines += [f"          {key} = {value}" for key, value in axes.items()]
    if entry.init_run is not None:
        lines.append(f"init      the student of {entry.init_run}")
    for job in queue.jobs.get(run, []):
        state = queue.states.get(job, "not in the queue")
        lines.append(f"job       {job} {state}, log {queue.logs[job]}")
    for attempt in attempts(folder):
        lines += _attempt_lines(attempt)
    if status.log and Path(status.log).is_file():
        tail = text_lines(Path(status.log).read_bytes().decode(errors="replace"))[-20:]
        lines += [f"log       {status.log}", *(f"          {line}" for line in tail)]
    lines.append(f"by hand   distill-bench job {shlex.quote(str(folder))}")
    return "\n".join(lines)


def _attempt_lines(attempt: Path) -> list[str]:
    start, end = read_start(attempt), read_exit(attempt) or {}
    words = [str(end[key]) for key in ("status", "signal", "kind", "error") if end.get(key)]
    ended = " ".join(words) or "no end recorded"
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start["time"]))
    job = f" job {start['job']}" if start["job"] else ""
    worker = f"{start['host']} pid {start['pid']}{job}"
    code = start.get("code_fingerprint")
    lines = [f"attempt   {attempt.name} {began} on {worker}, code {code}: {ended}"]
    if (attempt / "dirty.diff").is_file():
        lines.append(f"          commit {start.get('commit')} with {attempt / 'dirty.diff'}")
    return lines
