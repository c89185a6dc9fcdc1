"""Run sweeps of small runs on the test cluster, and query their jobs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import TINY_RUN

from distill_bench.config.sweep_file import load_sweep
from distill_bench.store.claims import attempts
from distill_bench.store.files import read_json
from distill_bench.sweep.__main__ import main
from distill_bench.sweep.manifest import open_sweep
from distill_bench.sweep.slurm.queue import read_queue
from distill_bench.sweep.status import ManifestEntry, Status, read_statuses

ROOT = Path(__file__).parents[2]
SLOW = Path(__file__).with_name("slow.py")


class Lab:
    """A sweep of small runs in a folder of its own, and the commands given to it."""

    def __init__(self, folder: Path, teacher: Path, base: dict, cluster: dict, **keys) -> None:
        tiny = TINY_RUN | {"teacher": str(teacher), "student_updates": 10}
        tiny |= {"fake_score_updates": 1, "batch_size": 2, "evaluations": 2, "threads": 1}
        del tiny["method"]
        cluster = {"cpus": 1, "mem_gb": 1, "hours": 0.2, "signal_seconds": 30} | cluster
        sweep = {
            "question": "Does it survive?",
            "base": tiny | base,
            "cluster": cluster,
            "grid": {"method": [f"{SLOW}:Slow"]},
        } | keys
        self.folder, self.store = folder, folder / "runs"
        self.entries: dict[str, ManifestEntry] = {}
        folder.mkdir(parents=True)
        self.file = folder / "lab.yaml"
        self.file.write_text(json.dumps(sweep))

    def argv(self, *more: str, where: Path | None = None) -> list[str]:
        where = where or self.folder
        return [str(self.file), f"--store={where / 'runs'}", f"--out={where / 'results'}", *more]

    def start(
        self, *more: str, slow: float = 0.0, python: str = sys.executable
    ) -> subprocess.Popen:
        """Start the command as a user would."""
        env = os.environ | {"SLOW_SECONDS": str(slow), "PYTHONPATH": str(ROOT)}
        log = (self.folder / f"driver-{time.monotonic_ns()}.txt").open("w")
        argv = [python, "-m", "distill_bench.sweep", *self.argv(*more)]
        return subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)

    def go(self, *more: str, slow: float = 0.0) -> int:
        """Run the command to its end; returns its exit code."""
        return self.start(*more, slow=slow).wait()

    def statuses(self) -> dict[str, Status]:
        if not self.entries:
            sweep = open_sweep(load_sweep(self.file), self.store, self.folder / "results")
            self.entries = sweep.entries
        statuses = read_statuses(self.store, self.entries, read_queue(self.store))
        return {s.run: s for s in statuses}

    def until(
        self, condition: Callable[[dict[str, Status]], bool], seconds: float = 300.0
    ) -> dict[str, Status]:
        """Wait until a condition on the statuses holds; returns them."""
        end = time.monotonic() + seconds
        while not condition(statuses := self.statuses()):
            if time.monotonic() > end:
                pytest.fail("\n".join(f"{s}" for s in statuses.values()) + f"\n{command('squeue')}")
            time.sleep(0.2)
        return statuses

    def pid(self, run: str) -> int:
        return read_json(attempts(self.store / run)[-1] / "start.json")["pid"]

    def end(self) -> None:
        """Cancel the remaining jobs."""
        jobs = [job for runs in read_queue(self.store).jobs.values() for job in runs]
        subprocess.run(["scancel", *jobs, *prepare_jobs()], capture_output=True)

    def reference(self) -> Path:
        """Store of the same sweep, run undisturbed in this process."""
        where = self.folder / "undisturbed"
        assert main(self.argv("--cluster", "debug", where=where)) == 0
        return where / "runs"


def command(*argv: str) -> str:
    """Run a command; returns its output."""
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def quiet(statuses: dict[str, Status]) -> bool:
    """Condition on statuses: no run is waiting or running."""
    return all(s.state in ("done", "failed", "stopped", "lost") for s in statuses.values())


def last_job(run_dir: Path) -> str:
    """The job of a run's newest attempt."""
    return read_json(attempts(run_dir)[-1] / "start.json")["job"]


def read_ends(run_dir: Path) -> list[dict]:
    """End records of a run's attempts; {} for an attempt without a record."""
    return [read_json(attempt / "exit.json") or {} for attempt in attempts(run_dir)]


def moving(*runs: str) -> Callable[[dict[str, Status]], bool]:
    """Condition on statuses: the runs are training and have a checkpoint."""
    return lambda statuses: all(
        statuses[run].state == "running" and statuses[run].student_updates > 1 for run in runs
    )


def pid_of_rank(rank: int, store: Path) -> int:
    """Process id of a rank of the store's only job."""
    wanted = {f"SLURM_PROCID={rank}".encode(), f"SLURM_JOB_ID={job_of(store)}".encode()}
    pids = command("pgrep", "-f", "submitit.core._submit").split()
    return next(
        int(pid)
        for pid in pids
        if wanted <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    )


def job_of(store: Path) -> str:
    """Id of the store's only job, without the index of its array."""
    (job,) = {job for runs in read_queue(store).jobs.values() for job in runs}
    return job.partition("_")[0]


def prepare_jobs() -> list[str]:
    """Prepare jobs in the queue."""
    return command("squeue", "--noheader", "--name=lab-prepare", "--format=%i").split()
