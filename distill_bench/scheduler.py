"""What SLURM knows: which jobs are in its queue, how others ended, what the cluster offers. Reads and cancels, never submits.

Truth about a run is in its folder; this is for what no folder can know. Everything works without accounting.
"""

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from distill_bench.store import read_json

# how SLURM calls the end of a job -> the kind of a failure
KINDS = {
    "TIMEOUT": "timeout", "NODE_FAIL": "node_fail", "OUT_OF_MEMORY": "host_oom", "CANCELLED": "cancelled",
    "PREEMPTED": "preempted", "BOOT_FAIL": "node_fail", "DEADLINE": "timeout",
}  # fmt: skip


class SchedulerError(RuntimeError):
    """SLURM does not answer; the message is one line."""


def available() -> bool:
    """Whether this machine submits to a cluster: `sbatch` is here and configured.

    Raises:
        SchedulerError: if it is, but the cluster does not answer.
    """
    if shutil.which("sbatch") is None:
        return False
    try:
        _call("sinfo", "--noheader", "--format=%P")
    except SchedulerError as error:
        if "configuration source" in str(error):  # the programs are installed, no cluster is configured
            return False
        raise
    return True


@dataclass(frozen=True)
class Queue:
    """Jobs in SLURM's queue, and which runs were submitted as what."""

    states: dict[str, str] = field(default_factory=dict)  # job -> PENDING, RUNNING, ...; those that have ended are not here
    jobs: dict[str, list[str]] = field(default_factory=dict)  # run -> its jobs, oldest first
    logs: dict[str, Path] = field(default_factory=dict)  # job -> its log

    def active(self, run: str) -> list[str]:
        """The run's jobs that are in the queue."""
        return [job for job in self.jobs.get(run, []) if job in self.states]

    def log(self, run: str) -> Path | None:
        """The log of the run's newest job."""
        jobs = self.jobs.get(run)
        return self.logs[jobs[-1]] if jobs else None


def read_queue(store: Path, on_slurm: bool = True) -> Queue:
    """The queue of this user, by one call of squeue, and the submissions of a store.

    Raises:
        SchedulerError: if squeue does not answer: then nothing is known, and nothing may be launched.
    """
    jobs: dict[str, list[str]] = {}
    logs: dict[str, Path] = {}
    with contextlib.suppress(FileNotFoundError):
        for path in sorted((store / "submissions").iterdir()):
            for run, job in (read_json(path) or {}).get("jobs", {}).items():
                jobs.setdefault(run, []).append(job)
                logs[job] = store / "slurm" / job.partition("_")[0] / f"{job}_0_log.out"
    lines = _call("squeue", "--me", "--noheader", "--array", "--format=%i %T").splitlines() if on_slurm else []
    return Queue(dict(line.split() for line in lines), jobs, logs)


def ended_as(jobs: Iterable[str]) -> dict[str, str]:
    """How jobs that have left the queue ended (TIMEOUT, CANCELLED, ...), as far as SLURM still remembers."""
    ids = ",".join(sorted(set(jobs)))
    if not ids:
        return {}
    ended: dict[str, str] = {}
    for command in (
        ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", f"--jobs={ids}"],
        ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T", f"--jobs={ids}"],
    ):
        with contextlib.suppress(SchedulerError):
            ended |= dict(line.split("|", 1) for line in _call(*command).splitlines() if "|" in line)
    return {job: state.split()[0] for job, state in ended.items()}  # "CANCELLED by 0"


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs."""
    _call("scancel", *jobs)


@dataclass(frozen=True)
class Cluster:
    """What a partition offers, from `scontrol show`."""

    partition: str
    max_array: int
    max_hours: float | None
    accounting: bool
    preemptible: bool
    preemption_signal: bool
    requeue: bool
    gpus: bool


def cluster(partition: str | None) -> Cluster:
    """The facts about a partition, by default the default one.

    Raises:
        SchedulerError: if there is no such partition.
    """
    config = _fields(_call("scontrol", "show", "config"))
    blocks = [_fields(block) for block in _call("scontrol", "--oneliner", "show", "partition").splitlines()]
    known = {block["PartitionName"]: block for block in blocks}
    name = partition or next((n for n, block in known.items() if block.get("Default") == "YES"), None)
    if name not in known:
        raise SchedulerError(f"no partition {name!r}; known: {', '.join(known)}" if name else "no default partition: name one")
    found = known[name]
    return Cluster(
        partition=name,
        max_array=int(config.get("MaxArraySize", 1001)),
        max_hours=_hours(found.get("MaxTime", "UNLIMITED")),
        accounting="none" not in config.get("AccountingStorageType", "none"),
        preemptible=found.get("PreemptMode", config.get("PreemptMode", "OFF")) not in ("OFF", "GANG"),
        preemption_signal="preempt_send_user_signal" in config.get("SlurmctldParameters", ""),
        requeue=config.get("JobRequeue", "1") == "1",
        gpus="gpu" in _call("sinfo", "--noheader", f"--partition={name}", "--format=%G"),
    )


def _fields(text: str) -> dict[str, str]:
    return {key: value.strip() for key, value in re.findall(r"(\w+)\s*=\s*(\S+)", text)}


def _hours(limit: str) -> float | None:
    """Hours of SLURM's [days-]hours:minutes:seconds; None without a limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 24 * days + hours + minutes / 60 + seconds / 3600


def _call(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SchedulerError(f"{command[0]} does not answer: {error}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SchedulerError(f"{command[0]}: {said[-1]}")
    return done.stdout
