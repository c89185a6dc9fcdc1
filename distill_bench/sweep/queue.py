"""What SLURM knows: which jobs are in its queue, how others ended, what the cluster offers. Reads and cancels, never submits.

Truth about a run is in its folder; this is for what no folder can know. Everything works without accounting.
"""

import contextlib
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from distill_bench.store.files import read_record
from distill_bench.store.runs import cancels

# how SLURM calls the end of a job -> the kind of a failure
KINDS = {
    "TIMEOUT": "timeout",
    "NODE_FAIL": "node_fail",
    "OUT_OF_MEMORY": "host_oom",
    "CANCELLED": "cancelled",
    "PREEMPTED": "preempted",
    "BOOT_FAIL": "node_fail",
    "DEADLINE": "timeout",
}
# reasons of a waiting job that do not end by themselves
ENDLESS = re.compile(
    r"Partition\w*(Limit|Down|Inactive|Config)|Invalid|NotAllowed|BadConstraints|NeverSatisfied|[Hh]eld|PerJob"
)


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
        if "configuration source" in str(
            error
        ):  # the programs are installed, no cluster is configured
            return False
        raise
    return True


@dataclass(frozen=True)
class Queue:
    """Jobs in SLURM's queue, and which runs were submitted as what."""

    states: dict[str, str] = field(
        default_factory=dict
    )  # job -> PENDING, RUNNING, ...; those that have ended are not here
    jobs: dict[str, list[str]] = field(default_factory=dict)  # run -> its jobs, oldest first
    logs: dict[str, Path] = field(default_factory=dict)  # job -> its log
    reasons: dict[str, str] = field(default_factory=dict)  # job -> why it waits
    first: dict[str, str] = field(
        default_factory=dict
    )  # job -> the job that prepares what its runs share
    cancelled: frozenset[str] = frozenset()  # jobs that this program was told to cancel

    def active(self, run: str) -> list[str]:
        """The run's jobs that are in the queue."""
        return [job for job in self.jobs.get(run, []) if job in self.states]

    def stuck(self, run: str) -> str | None:
        """Why the run's jobs will never start, as SLURM says it; None where they will."""
        reasons = [self.reasons.get(job, "") for job in self.active(run)]
        return next(iter(reasons)) if reasons and all(map(ENDLESS.search, reasons)) else None

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
    first: dict[str, str] = {}
    for path in sorted((store / "submissions").glob("*.json")):
        found = read_record(path, jobs=dict) or {"jobs": {}}
        for run, job in found["jobs"].items():
            jobs.setdefault(run, []).append(job)
            logs[job] = store / "slurm" / job.partition("_")[0] / f"{job}_0_log.out"
            if "dependency" in found:
                first[job] = found["dependency"].partition(":")[2]
    told = frozenset(job for call in cancels(store) for job in call["jobs"])
    lines = (
        _call("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r").splitlines()
        if on_slurm
        else []
    )
    rows = [line.split("|", 2) for line in lines]
    states, reasons = (
        {job: state for job, state, _ in rows},
        {job: reason for job, _, reason in rows},
    )
    return Queue(states, jobs, logs, reasons, first, told)


def ended_as(jobs: Iterable[str]) -> dict[str, str]:
    """How jobs that have left the queue ended (TIMEOUT, CANCELLED, ...), as far as SLURM still remembers."""
    ids = ",".join(sorted(set(jobs)))
    if not ids:
        return {}
    ended: dict[str, str] = {}
    for command in (
        [
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            "--format=JobID,State",
            f"--jobs={ids}",
        ],
        ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T", f"--jobs={ids}"],
    ):
        with contextlib.suppress(SchedulerError):
            ended |= dict(
                line.split("|", 1) for line in _call(*command).splitlines() if "|" in line
            )
    return {job: state.split()[0] for job, state in ended.items()}  # "CANCELLED by 0"


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs."""
    _call("scancel", *jobs)


@dataclass(frozen=True)
class Cluster:
    """What a partition offers, from `scontrol show`."""

    partition: str  # or several: a job starts in one of them
    nodes: int
    cpus: int  # of the largest node
    mem_gb: float  # of the largest node
    gpus: int  # of the largest node
    max_array: int
    max_hours: float | None
    accounting: bool
    preemptible: bool
    preemption_signal: bool
    requeue: bool


def cluster(partition: str | None) -> Cluster:
    """The facts about a partition, by default the default one; of several, "a,b", the best of each.

    Raises:
        SchedulerError: if there is no such partition.
    """
    config = _fields(_call("scontrol", "show", "config"))
    blocks = [
        _fields(block)
        for block in _call("scontrol", "--oneliner", "show", "partition").splitlines()
    ]
    known = {block["PartitionName"]: block for block in blocks}
    name = partition or next(
        (n for n, block in known.items() if block.get("Default") == "YES"), None
    )
    if not name:
        raise SchedulerError("no default partition: name one")
    if missing := [each for each in name.split(",") if each not in known]:
        raise SchedulerError(f"no partition {missing[0]!r}; known: {', '.join(known)}")
    found = [known[each] for each in name.split(",")]
    hours = [_hours(each.get("MaxTime", "UNLIMITED")) for each in found]
    lines = _call(
        "sinfo", "--noheader", "--Node", f"--partition={name}", "--format=%R|%c|%m|%G"
    ).splitlines()
    nodes = [line.split("|", 3) for line in lines]
    counts = Counter(node[0] for node in nodes)
    limits = {each["PartitionName"]: each.get("MaxNodes", "UNLIMITED") for each in found}
    return Cluster(
        partition=name,
        nodes=max(
            (min(n, int(limits[p])) if limits[p].isdigit() else n for p, n in counts.items()),
            default=0,
        ),
        cpus=max((int(cpus) for _, cpus, _, _ in nodes), default=0),
        mem_gb=max((int(mb) for _, _, mb, _ in nodes), default=0) / 1024,
        gpus=max(
            (int(n) for *_, gres in nodes for n in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres)),
            default=0,
        ),
        max_array=int(config.get("MaxArraySize", 1001)),
        max_hours=None if None in hours else max(hours),
        accounting="none" not in config.get("AccountingStorageType", "none"),
        preemptible=any(
            each.get("PreemptMode", config.get("PreemptMode", "OFF")) not in ("OFF", "GANG")
            for each in found
        ),
        preemption_signal="preempt_send_user_signal" in config.get("SlurmctldParameters", ""),
        requeue=config.get("JobRequeue", "1") == "1",
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
