"""What every run is doing: from its folder first, from SLURM second. Reads small files only, and never imports torch.

A run's state is `store.state`; here it gets its progress, its history and, where it failed or was lost, the reason and the log.
"""

import contextlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from distill_bench.store.claims import attempts, end_of, start_of
from distill_bench.store.files import last_lines, read_json
from distill_bench.store.runs import result_of, state
from distill_bench.sweep.provenance import code_fingerprint
from distill_bench.sweep.queue import KINDS, Queue, ended_as

ENDED = ("done", "collapsed")
TO_LAUNCH = ("missing", "lost", "stopped")
WAITING = ("queued", "preempted", "requeued", "running")


@dataclass(frozen=True)
class Known:
    """What the sweep's manifest says of a run."""

    method: str
    student_updates: int


@dataclass(frozen=True)
class Status:
    """One line of `--status`."""

    run: str
    state: str
    student_updates: int
    of: int
    seconds: float  # of training so far
    seconds_left: float | None  # of training
    attempts: int
    requeues: int
    job: str | None
    kind: str | None = None  # of a failure
    note: str = ""
    log: str | None = None
    stale: bool = False  # done under other code than the present one

    @property
    def rate(self) -> float | None:
        """Student updates a second."""
        return (
            self.student_updates / self.seconds if self.seconds and self.student_updates else None
        )


def read_statuses(store: Path, runs: Mapping[str, Known], queue: Queue) -> list[Status]:
    """The status of every run."""
    codes = {
        method: code_fingerprint(method) for method in {known.method for known in runs.values()}
    }
    statuses = [
        _read(store / run, known, queue, codes[known.method]) for run, known in runs.items()
    ]
    unexplained = [s.job for s in statuses if s.job and s.state in ("lost", "stopped")]
    ended = dict.fromkeys(queue.cancelled, "CANCELLED") | (
        ended_as(unexplained) if unexplained else {}
    )
    full = any(s.state == "lost" for s in statuses) and _full(store)
    return [_explained(s, ended.get(s.job or ""), full) for s in statuses]


def _full(store: Path) -> bool:
    """Whether the store's disk has no room left: then nothing could say why it ended."""
    with contextlib.suppress(OSError):
        return os.statvfs(store).f_bavail == 0
    return False


def _read(folder: Path, known: Known, queue: Queue, code: str) -> Status:
    run, store = folder.name, folder.parent
    jobs = queue.jobs.get(run, [])
    now = state(folder, queued=bool(queue.active(run)))
    if now == "missing" and jobs:
        now = "lost"  # submitted, and gone without an attempt
    tried = attempts(folder)
    starts = [start_of(attempt) for attempt in tried]
    result = result_of(folder) if now in ENDED else None
    updates, seconds = _progress(folder, result)
    left = (
        (known.student_updates - updates) * seconds / updates
        if now == "running" and updates
        else None
    )
    end = (end_of(tried[-1]) if tried else None) or {}
    outside = read_json(store / "errors" / f"{run}.json")
    if now == "failed" and outside is not None:
        end = outside
    log = (outside or {}).get("log") or (starts[-1].get("log") if starts else None)
    if log is None and jobs:
        log = str(queue.log(run))
    note, kind = "", None
    if now == "failed":
        note, kind = _one_line(end.get("error")), end.get("kind", "exception")
    elif now == "collapsed":
        note = str(result.get("reason"))
    elif now == "stopped":
        note = (
            f"stopped by {end.get('signal')} at student update {end.get('student_updates')}, saved"
        )
    elif now == "lost":
        note = _one_line(end.get("error")) or (_last_word(Path(log)) if log else "")
    elif now in WAITING:
        note = queue.stuck(run) or ""
        note = note and f"SLURM will not start it: {note}"
    return Status(
        run=run,
        state=now,
        student_updates=updates,
        of=known.student_updates,
        seconds=seconds,
        seconds_left=left,
        attempts=len(tried),
        requeues=sum(
            a["job"] is not None and a["job"] == b["job"]
            for a, b in zip(starts, starts[1:], strict=False)
        ),
        job=jobs[-1] if jobs else None,
        kind=kind,
        note=note,
        log=log,
        stale=result is not None and result.get("code_fingerprint") not in (None, code),
    )


def _explained(status: Status, ended: str | None, full: bool) -> Status:
    """With SLURM's word for the end of a run that has not said itself why it ended."""
    if status.state == "stopped":
        return Status(**asdict(status) | {"kind": KINDS.get(ended or "")})
    if status.state == "lost":
        kind = KINDS.get(
            ended or "", "disk_full" if full else "killed" if status.attempts else "not_started"
        )
        said = f": {status.note}" if status.note else ""
        return Status(**asdict(status) | {"kind": kind, "note": f"{kind}{said}"})
    return status


def _progress(folder: Path, result: Mapping[str, Any] | None) -> tuple[int, float]:
    """Student updates and seconds of training so far."""
    if result is not None:
        return result["student_updates"], result["train_seconds"]
    for line in last_lines(folder / "train.jsonl"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
            found = json.loads(line)
            return found["student_updates"], found["seconds"]
    return 0, 0.0


def _last_word(log: Path) -> str:
    """The last line of a log that is not srun's, which only repeats that something ended."""
    return next((line for line in last_lines(log) if not line.startswith("srun:")), "")[:300]


def _one_line(text: Any) -> str:
    lines = str(text or "").strip().splitlines()
    return lines[-1][:300] if lines else ""


# --- shown ---


def as_table(statuses: Sequence[Status]) -> Table:
    """The table of `--status`."""
    table = Table(
        "run", "state", "student updates", "updates/s", "left", "note", box=None, pad_edge=False
    )
    for s in statuses:
        notes = (
            [f"requeued {s.requeues} times" if s.requeues > 1 else "requeued once"]
            if s.requeues
            else []
        )
        notes += ["other code than now"] if s.stale else []
        notes += [s.note] if s.note else []
        notes += [f"log: {s.log}"] if s.log and s.state in ("failed", "lost") else []
        shown = s.state if s.kind is None or s.state == "lost" else f"{s.state} ({s.kind})"
        rate = "" if s.rate is None or s.state in ENDED else f"{s.rate:.3g}"
        left = "" if s.seconds_left is None else duration(s.seconds_left)
        table.add_row(s.run, shown, f"{s.student_updates}/{s.of}", rate, left, "; ".join(notes))
    return table


def counts(statuses: Iterable[Status]) -> str:
    """ "3 done, 1 running": in a line."""
    return ", ".join(f"{count} {now}" for now, count in Counter(s.state for s in statuses).items())


def as_json(statuses: Iterable[Status]) -> str:
    """One list of objects, for scripts."""
    return json.dumps([asdict(s) | {"rate": s.rate} for s in statuses], indent=2)


def exit_code(statuses: Iterable[Status]) -> int:
    """0: all have ended; 4: something failed; 3: there is work left."""
    states = {s.state for s in statuses}
    if states <= set(ENDED):
        return 0
    return 4 if "failed" in states else 3


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def explain(store: Path, run: str, swept: Mapping[str, Any], queue: Queue, known: Known) -> str:
    """Everything about one run: config, attempts, the end of its log, how to do it again here."""
    folder = store / run
    (status,) = read_statuses(store, {run: known}, queue)
    lines = [f"{run}: {status.state} {status.student_updates}/{status.of} {status.note}".rstrip()]
    lines += [f"config    {folder / 'run.yaml'}"] + [
        f"          {key} = {value}" for key, value in swept.items()
    ]
    for job in queue.jobs.get(run, []):
        lines.append(
            f"job       {job} {queue.states.get(job, 'not in the queue')}, log {queue.logs[job]}"
        )
    for attempt in attempts(folder):
        start, end = start_of(attempt), end_of(attempt) or {}
        ended = (
            " ".join(str(end[key]) for key in ("status", "signal", "kind", "error") if end.get(key))
            or "no end recorded"
        )
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start["time"]))
        where = f"{start['host']} pid {start['pid']}" + (
            f" job {start['job']}" if start["job"] else ""
        )
        lines.append(
            f"attempt   {attempt.name} {began} on {where}, code {start.get('code_fingerprint')}: {ended}"
        )
        if (attempt / "dirty.diff").is_file():
            lines.append(f"          commit {start.get('commit')} with {attempt / 'dirty.diff'}")
    if status.log and Path(status.log).is_file():
        tail = Path(status.log).read_text(errors="replace").splitlines()[-20:]
        lines += [f"log       {status.log}", *(f"          {line}" for line in tail)]
    return "\n".join([*lines, f"by hand   distill-bench job {folder}"])
