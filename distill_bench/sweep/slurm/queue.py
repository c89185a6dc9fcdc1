"""Query SLURM: queued jobs, final states of jobs, limits of partitions (squeue, sacct, scontrol).

This module reads and cancels jobs, but submits none. The state of a run is in its folder; SLURM
only adds the states of its jobs. Everything works without accounting.
"""

import contextlib
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from distill_bench.config.cluster import ClusterConfig, slurm_hours
from distill_bench.store.files import read_record, text_lines
from distill_bench.store.runs import read_cancels

KIND_OF_END = {  # SLURM's final state of a job -> kind of failure shown by --status
    "TIMEOUT": "timeout",
    "NODE_FAIL": "node_fail",
    "OUT_OF_MEMORY": "host_oom",
    "CANCELLED": "cancelled",
    "PREEMPTED": "preempted",
    "BOOT_FAIL": "node_fail",
    "DEADLINE": "timeout",
}
# pending reasons that do not go away by themselves
NEVER_STARTS = re.compile(
    r"Partition\w*(Limit|Down|Inactive|Config)|Invalid|NotAllowed|BadConstraints|NeverSatisfied"
    r"|[Hh]eld|PerJob"
)


class SchedulerError(RuntimeError):
    """SLURM does not answer or reports an error; the message is one line."""


def slurm_available() -> bool:
    """True if this machine can submit to a cluster: `sbatch` is installed and configured.

    Raises:
        SchedulerError: if sbatch is configured but the cluster does not answer.
    """
    if shutil.which("sbatch") is None:
        return False
    try:
        _call("sinfo", "--noheader", "--format=%P")
    except SchedulerError as error:
        if "configuration source" in str(error):  # SLURM is installed, but no cluster is configured
            return False
        raise
    return True


@dataclass(frozen=True)
class Queue:
    """The user's jobs in SLURM's queue, and the jobs of a store's runs."""

    states: dict[str, str] = field(default_factory=dict)  # queued job -> PENDING, RUNNING, ...
    jobs: dict[str, list[str]] = field(default_factory=dict)  # run -> its jobs, oldest first
    logs: dict[str, Path] = field(default_factory=dict)  # job -> its log
    reasons: dict[str, str] = field(default_factory=dict)  # queued job -> why it is pending
    prepared_by: dict[str, str] = field(default_factory=dict)  # job -> the job that it waits for
    cancelled: frozenset[str] = frozenset()  # jobs named by a --cancel

    def active(self, run: str) -> list[str]:
        """The run's jobs that are in the queue."""
        return [job for job in self.jobs.get(run, []) if job in self.states]

    def never_starts(self, run: str) -> str | None:
        """SLURM's reason if none of the run's jobs can ever start, else None."""
        reasons = [self.reasons.get(job, "") for job in self.active(run)]
        return reasons[0] if reasons and all(map(NEVER_STARTS.search, reasons)) else None

    def log(self, run: str) -> Path | None:
        """The log of the run's newest job."""
        jobs = self.jobs.get(run)
        return self.logs[jobs[-1]] if jobs else None


def read_queue(store: Path, on_slurm: bool = True) -> Queue:
    """Read a store's submissions and, with one call of squeue, this user's queue.

    Raises:
        SchedulerError: if squeue does not answer; nothing may be launched then.
    """
    jobs: dict[str, list[str]] = {}
    logs: dict[str, Path] = {}
    prepared_by: dict[str, str] = {}
    for path in sorted((store / "submissions").glob("*.json")):
        submission = read_record(path, jobs=dict)
        if submission is None:
            continue
        for run, job in submission["jobs"].items():
            jobs.setdefault(run, []).append(job)
            logs[job] = store / "slurm" / job.partition("_")[0] / f"{job}_0_log.out"
            if "dependency" in submission:
                prepared_by[job] = submission["dependency"].partition(":")[2]
    states: dict[str, str] = {}
    reasons: dict[str, str] = {}
    if on_slurm:
        listing = _call("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r")
        for line in text_lines(listing):
            job, states[job], reasons[job] = line.split("|", 2)
    cancelled = frozenset(job for call in read_cancels(store) for job in call["jobs"])
    return Queue(states, jobs, logs, reasons, prepared_by, cancelled)


def final_states(jobs: Iterable[str]) -> dict[str, str]:
    """Final states (TIMEOUT, CANCELLED, ...) of jobs that left the queue, if SLURM knows them."""
    ids = ",".join(sorted(set(jobs)))
    if not ids:
        return {}
    sacct = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State"]
    squeue = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T"]
    states: dict[str, str] = {}
    for command in (sacct, squeue):  # squeue remembers a job for minutes, even without accounting
        with contextlib.suppress(SchedulerError):
            lines = text_lines(_call(*command, f"--jobs={ids}"))
            states |= dict(line.split("|", 1) for line in lines if "|" in line)
    return {job: state.split()[0] for job, state in states.items()}  # "CANCELLED by 0"


def scancel(jobs: Iterable[str]) -> None:
    """Cancel jobs."""
    _call("scancel", *jobs)


@dataclass(frozen=True)
class Partition:
    """The limits of one partition, or the best of each limit over several."""

    name: str  # as asked for, e.g. "a,b"
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

    def shortfalls(self, wanted: ClusterConfig) -> list[str]:
        """Describe the requirements that the partition cannot meet; such jobs may pend for ever."""
        cpus = wanted.processes * wanted.cpus
        memory = wanted.mem_gb or 0
        limited = self.max_hours is not None and wanted.sbatch.get("time") is not False
        too_long = limited and wanted.hours > (self.max_hours or 0)
        idle = wanted.gpus - wanted.processes if wanted.runs_per_job == 1 else 0
        unwarned = self.preemptible and not self.preemption_signal
        return [
            text
            for text, applies in {
                f"{wanted.hours:g} h is over the partition's {self.max_hours} h": too_long,
                f"{wanted.nodes} nodes are more than the partition's {self.nodes}": (
                    wanted.nodes > self.nodes
                ),
                f"{wanted.processes} x {wanted.cpus} CPUs are more than any node's {self.cpus}": (
                    cpus > self.cpus
                ),
                f"{memory} GB are more than any node's {self.mem_gb:.3g}": memory > self.mem_gb,
                f"{wanted.gpus} GPUs are more than any node's {self.gpus}": wanted.gpus > self.gpus,
                f"a process uses one GPU: {idle} of a node's {wanted.gpus} stay idle": idle > 0,
                "preemption sends no signal: a run must save within the partition's GraceTime": (
                    unwarned
                ),
                "this cluster does not requeue jobs: run the same command after a preemption": (
                    not self.requeue
                ),
                "no accounting: SLURM knows for a few minutes only how a lost job ended": (
                    not self.accounting
                ),
            }.items()
            if applies
        ]


def read_partition(partition: str | None) -> Partition:
    """Read a partition's limits; None is the default partition, "a,b" the best of both.

    Raises:
        SchedulerError: if there is no such partition.
    """
    config = _fields(_call("scontrol", "show", "config"))
    listing = text_lines(_call("scontrol", "--oneliner", "show", "partition"))
    known = {block["PartitionName"]: block for block in map(_fields, listing)}
    default = next((n for n, block in known.items() if block.get("Default") == "YES"), None)
    name = partition or default
    if not name:
        raise SchedulerError(
            f"no default partition; set cluster.partition to one of {', '.join(known)}"
        )
    if missing := [part for part in name.split(",") if part not in known]:
        raise SchedulerError(f"no partition {missing[0]!r}; known: {', '.join(known)}")
    blocks = [known[part] for part in name.split(",")]
    hours = [_hours(block.get("MaxTime", "UNLIMITED")) for block in blocks]
    mode = config.get("PreemptMode", "OFF")
    preemptible = any(block.get("PreemptMode", mode) not in ("OFF", "GANG") for block in blocks)
    listing = _call("sinfo", "--noheader", "--Node", f"--partition={name}", "--format=%R|%c|%m|%G")
    nodes = [line.split("|", 3) for line in text_lines(listing)]
    gpus = [re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres) for *_, gres in nodes]
    return Partition(
        name=name,
        nodes=_most_nodes(blocks, Counter(node[0] for node in nodes)),
        cpus=max((int(cpus) for _, cpus, _, _ in nodes), default=0),
        mem_gb=max((int(mb) for _, _, mb, _ in nodes), default=0) / 1024,
        gpus=max((int(count) for counts in gpus for count in counts), default=0),
        max_array=int(config.get("MaxArraySize", 1001)),
        max_hours=None if None in hours else max(hours),
        accounting="none" not in config.get("AccountingStorageType", "none"),
        preemptible=preemptible,
        preemption_signal="preempt_send_user_signal" in config.get("SlurmctldParameters", ""),
        requeue=config.get("JobRequeue", "1") == "1",
    )


def _most_nodes(blocks: list[dict[str, str]], nodes_of: Counter[str]) -> int:
    """Largest number of nodes that a job can get in any of the partitions."""
    most = 0
    for block in blocks:
        nodes = nodes_of[block["PartitionName"]]
        limit = block.get("MaxNodes", "UNLIMITED")
        most = max(most, min(nodes, int(limit)) if limit.isdigit() else nodes)
    return most


def _fields(text: str) -> dict[str, str]:
    return {key: value.strip() for key, value in re.findall(r"(\w+)\s*=\s*(\S+)", text)}


def _hours(limit: str) -> float | None:
    """Hours of a limit that SLURM prints; None without a limit."""
    try:
        return slurm_hours(limit)
    except ValueError:  # for instance INVALID
        return None


def _call(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SchedulerError(f"{command[0]} does not answer: {error}") from error
    if done.returncode:
        lines = text_lines(done.stderr.strip()) or [f"exit code {done.returncode}"]
        raise SchedulerError(f"{command[0]}: {lines[-1]}")
    return done.stdout
