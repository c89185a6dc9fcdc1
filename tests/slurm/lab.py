"""Run sweeps of small runs on the test cluster, and query their jobs."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from unittest import mock

import pytest
from runs import TINY_RUN

from distill_bench.config.sweep_file import load_sweep
from distill_bench.store.claims import attempts
from distill_bench.store.files import read_json
from distill_bench.sweep.__main__ import main
from distill_bench.sweep.launch import LaunchOptions, missing_artefacts, run_debug
from distill_bench.sweep.manifest import OpenSweep, open_sweep
from distill_bench.sweep.prepare import prepare_run
from distill_bench.sweep.slurm.queue import SchedulerError, read_queue
from distill_bench.sweep.status import Status, read_statuses

ROOT = Path(__file__).parents[2]
SLOW = Path(__file__).with_name("slow.py")


class Lab:
    """A sweep of small runs in a folder of its own, and the commands given to it.

    Args:
        orders: folder of the files that the runs obey; see `slow.Slow`.
        method: file of the method.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Path,
        orders: Path,
        base: dict,
        cluster: dict,
        method: Path = SLOW,
        **keys,
    ) -> None:
        tiny = TINY_RUN | {"teacher": str(teacher), "student_updates": 10}
        tiny |= {"fake_score_updates": 1, "batch_size": 2, "evaluations": 2, "threads": 1}
        tiny |= {"method": {"name": f"{method}:Slow", "orders": str(orders)}}
        resources = {"cpus": 1, "mem_gb": 1, "hours": 0.2, "signal_seconds": 30}
        cluster = resources | {"sbatch": {"exclude": "n[1-2]"}} | cluster
        question = "Does it survive?"
        sweep = {"question": question, "base": tiny | base, "cluster": cluster, "grid": {}} | keys
        self.folder, self.store, self.orders = folder, folder / "runs", orders
        self.name = f"lab-{time.monotonic_ns()}"  # the jobs of another test have another name
        folder.mkdir(parents=True)
        orders.mkdir(exist_ok=True)
        self.file = folder / f"{self.name}.yaml"
        self.file.write_text(json.dumps(sweep))

    def argv(self, *more: str) -> list[str]:
        return [str(self.file), f"--store={self.store}", f"--out={self.folder / 'results'}", *more]

    def open(self, where: Path) -> OpenSweep:
        return open_sweep(load_sweep(self.file), where / "runs", where / "results")

    @cached_property
    def sweep(self) -> OpenSweep:
        return self.open(self.folder)

    def start(
        self, *more: str, slow: float = 0.0, python: str = sys.executable, path: str = ""
    ) -> subprocess.Popen:
        """Start the command as a user would.

        Args:
            path: folder in front of PATH.
        """
        env = os.environ | self.environment(slow) | {"PATH": f"{path}:{os.environ['PATH']}"}
        log = (self.folder / f"driver-{time.monotonic_ns()}.txt").open("w")
        argv = [python, "-m", "distill_bench.sweep", *self.argv(*more)]
        return subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)

    def go(self, *more: str, slow: float = 0.0) -> int:
        """Give the command in this process, which saves seconds of imports; returns its code."""
        with mock.patch.dict(os.environ, self.environment(slow)):
            return main(self.argv(*more))

    @staticmethod
    def environment(slow: float) -> dict[str, str]:
        """Environment variables of a driver, which its jobs inherit."""
        return {"SLOW_SECONDS": str(slow), "PYTHONPATH": str(ROOT)}

    def prepare(self) -> None:
        """Make the artefacts that the runs share in this process: no prepare job is submitted."""
        for run in missing_artefacts(self.sweep, self.sweep.runs).values():
            self.sweep.write_runs([run])
            prepare_run(self.store / run)

    def order(self, word: str, *seeds: int) -> None:
        """Give an order to the runs of these seeds."""
        for seed in seeds:
            (self.orders / f"{word}-{seed}").touch()

    def withdraw(self, word: str, *runs: str) -> None:
        """Withdraw an order, if it was given to these runs."""
        for run in runs:
            (self.orders / f"{word}-{self.sweep.runs[run].seed}").unlink(missing_ok=True)

    def statuses(self) -> dict[str, Status]:
        statuses = read_statuses(self.store, self.sweep.entries, read_queue(self.store))
        return {s.run: s for s in statuses}

    def until(self, condition: Callable[[dict[str, Status]], bool]) -> dict[str, Status]:
        """Wait until a condition on the statuses holds; returns them."""
        end = time.monotonic() + 600
        while True:
            try:
                statuses = self.statuses()
            except SchedulerError as error:  # a busy machine
                statuses = {}
                print(error)
            if statuses and condition(statuses):
                return statuses
            if time.monotonic() > end:
                pytest.fail("\n".join(f"{s}" for s in statuses.values()) + f"\n{command('squeue')}")
            time.sleep(0.2)

    def pid(self, run: str) -> int:
        return read_json(attempts(self.store / run)[-1] / "start.json")["pid"]

    def jobs(self) -> list[str]:
        """The jobs of the runs, also those that have ended."""
        return [job for jobs in read_queue(self.store).jobs.values() for job in jobs]

    def job_log(self, run: str) -> Path:
        """Log of a run's newest job."""
        log = read_queue(self.store).log(run)
        assert log is not None, f"{run} has no job"
        return log

    def prepare_jobs(self) -> list[str]:
        """Prepare jobs in the queue."""
        name = f"--name={self.name}-prepare"
        return command("squeue", "--noheader", name, "--format=%i").split()

    def end(self) -> None:
        """Cancel the remaining jobs."""
        subprocess.run(["scancel", *self.jobs(), *self.prepare_jobs()], capture_output=True)

    def reference(self) -> Path:
        """Store of the same sweep, run undisturbed in this process."""
        sweep = self.open(self.folder / "undisturbed")
        run_debug(sweep, LaunchOptions())
        return sweep.store


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
    (jobs,) = read_queue(store).jobs.values()
    wanted = {f"SLURM_PROCID={rank}".encode(), f"SLURM_JOB_ID={jobs[0]}".encode()}
    for pid in command("pgrep", "-f", "submitit.core._submit").split():
        with contextlib.suppress(OSError):  # a process of another test has ended
            if wanted <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                return int(pid)
    raise AssertionError(f"no process of rank {rank}")
