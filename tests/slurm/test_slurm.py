"""Sweeps on a real SLURM (tests/slurm/up.sh): whatever the cluster does to a run, it ends in the bits of an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill_bench import checkpoint
from distill_bench.config import load_sweep
from distill_bench.scheduler import read_queue
from distill_bench.status import Status, read_statuses
from distill_bench.store import attempts, read_json
from distill_bench.sweep import main, open_sweep

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(280)]
ROOT = Path(__file__).parents[2]
SLOW = Path(__file__).with_name("slow.py")


class Lab:
    """A sweep of small runs in a folder of its own, and what one does to it."""

    def __init__(self, folder: Path, teacher: Path, base: dict, cluster: dict, **keys) -> None:
        base = {
            "teacher": str(teacher), "student_updates": 10, "fake_score_updates": 1, "batch_size": 2, "nfe": 2, "frames": 5,
            "height": 16, "width": 16, "checkpoint_every": 1, "log_every": 1, "trackers": [], "evaluations": 2, "threads": 1,
            "protocol": {"clips": 2, "teacher_steps": 2, "evaluators": ["motion"]},
        } | base  # fmt: skip
        cluster = {"cpus": 1, "mem_gb": 1, "hours": 0.2, "signal_seconds": 30} | cluster
        sweep = {"question": "Does it survive?", "base": base, "cluster": cluster, "grid": {"method": [f"{SLOW}:Slow"]}} | keys
        self.folder, self.store, self.known = folder, folder / "runs", {}
        folder.mkdir(parents=True)
        self.file = folder / "lab.yaml"
        self.file.write_text(json.dumps(sweep))

    def argv(self, *more: str, where: Path | None = None) -> list[str]:
        where = where or self.folder
        return [str(self.file), "--store", str(where / "runs"), "--out", str(where / "results"), *more]

    def start(self, *more: str, slow: float = 0.0, python: str = sys.executable) -> subprocess.Popen:
        """The command, as a user would give it."""
        env = os.environ | {"SLOW_SECONDS": str(slow), "PYTHONPATH": str(ROOT)}
        log = (self.folder / f"driver-{time.monotonic_ns()}.txt").open("w")
        argv = [python, "-m", "distill_bench.sweep", *self.argv(*more)]
        return subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)

    def go(self, *more: str, slow: float = 0.0) -> int:
        """The command to its end; its exit code."""
        return self.start(*more, slow=slow).wait()

    def statuses(self) -> dict[str, Status]:
        self.known = self.known or open_sweep(load_sweep(self.file), self.store, self.folder / "results").known
        return {s.run: s for s in read_statuses(self.store, self.known, read_queue(self.store))}

    def until(self, condition: Callable[[dict[str, Status]], bool], seconds: float = 150.0) -> dict[str, Status]:
        """Wait for a condition on the statuses."""
        end = time.monotonic() + seconds
        while not condition(statuses := self.statuses()):
            if time.monotonic() > end:
                pytest.fail("\n".join(f"{s}" for s in statuses.values()) + f"\n{command('squeue')}")
            time.sleep(0.2)
        return statuses

    def pid(self, run: str) -> int:
        return read_json(attempts(self.store / run)[-1] / "start.json")["pid"]

    def reference(self) -> "Path":
        """The store of the same sweep, undisturbed, in this process."""
        where = self.folder / "undisturbed"
        assert main(self.argv("--cluster", "debug", where=where)) == 0
        return where / "runs"


@pytest.fixture
def lab(tiny_wan: Path, tmp_path: Path):
    """Makes labs; their jobs do not outlive the test."""
    made: list[Lab] = []

    def make(base: dict | None = None, cluster: dict | None = None, **keys) -> Lab:
        made.append(Lab(tmp_path / f"lab{len(made)}", tiny_wan, base or {}, cluster or {}, **keys))
        return made[-1]

    yield make
    for each in made:
        jobs = [job for runs in read_queue(each.store).jobs.values() for job in runs]
        subprocess.run(["scancel", *jobs], capture_output=True)


def command(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def quiet(statuses: dict[str, Status]) -> bool:
    return all(s.state in ("done", "failed", "stopped", "lost") for s in statuses.values())


def moving(*runs: str) -> Callable[[dict[str, Status]], bool]:
    """Whether the runs train and have a checkpoint."""
    return lambda statuses: all(statuses[run].state == "running" and statuses[run].student_updates > 1 for run in runs)


def assert_same_ends(a: Path, b: Path) -> None:
    """The same runs, weights, scores and curves."""
    names = [sorted(p.parent.name for p in store.glob("*/result.json")) for store in (a, b)]
    assert names[0] and names[0] == names[1]
    for run in names[0]:
        first, second = (list(checkpoint.students(store / run).items()) for store in (a, b))
        assert [update for update, _ in first] == [update for update, _ in second]
        for (_, one), (_, other) in zip(first, second, strict=True):
            one, other = load_file(one), load_file(other)
            assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
        assert (a / run / "metrics.jsonl").read_text() == (b / run / "metrics.jsonl").read_text()
        curves = [[json.loads(line) for line in (store / run / "train.jsonl").read_text().splitlines()] for store in (a, b)]
        assert [line | {"seconds": 0} for line in curves[0]] == [line | {"seconds": 0} for line in curves[1]]


def test_whatever_happens_to_an_array_each_run_is_done_once_and_in_the_same_bits(lab, tmp_path):
    """Two drivers at once, one killed; then requeue, SIGKILL, scancel, a lost node, preemption, and a run that raises."""
    broken = tmp_path / "broken"
    broken.write_text("7")
    it = lab({"method": {"name": f"{SLOW}:Slow", "broken": str(broken)}}, {"partition": "low"}, grid={}, seeds=8)
    drivers = [it.start("--wait", slow=0.6), it.start(slow=0.6)]
    assert drivers[1].wait() == 0
    statuses = it.until(lambda now: sum(moving(run)(now) for run in now) >= 6)
    drivers[0].kill()
    victims = [run for run, s in statuses.items() if moving(run)(statuses)]
    jobs = {run: read_json(attempts(it.store / run)[-1] / "start.json")["job"] for run in victims}
    nodes = {run: command("squeue", "-h", "-j", jobs[run], "-o", "%N").strip() for run in victims}
    on_n1, on_n2 = ([run for run in victims if nodes[run] == node] for node in ("n1", "n2"))
    requeued, killed, cancelled = (on_n1 + on_n2[1:])[:3]
    command("scontrol", "requeue", jobs[requeued])
    os.kill(it.pid(killed), signal.SIGKILL)
    command("scancel", jobs[cancelled])
    command("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    time.sleep(1)
    subprocess.run(["scontrol", "update", "nodename=n2", "state=resume"], capture_output=True)  # or it is back by itself
    it.until(lambda now: now[on_n2[0]].attempts >= 2 or now[on_n2[0]].state in ("requeued", "preempted"))
    command("srun", "--partition=main", "--nodes=2", "--ntasks-per-node=1", "--exclusive", "--mem=0", "true")  # preempts all
    statuses = it.until(quiet)
    assert statuses[cancelled].state == "stopped" and statuses[cancelled].kind == "cancelled"
    (failed,) = [s for s in statuses.values() if s.state == "failed"]
    assert failed.note == "RuntimeError: the method is broken" and "the method is broken" in Path(failed.log).read_text()
    assert statuses[requeued].requeues and statuses[killed].requeues and statuses[on_n2[0]].requeues
    broken.unlink()
    assert it.go("--wait") == 1, "the cancelled run goes on, the failed one waits for --retry-failed"
    assert it.go("--wait", "--retry-failed=cuda_oom") == 1
    assert it.go("--wait", "--retry-failed=exception") == 0
    assert_same_ends(it.store, it.reference())
    for run in statuses:
        ends = [read_json(attempt / "exit.json") for attempt in attempts(it.store / run)]
        assert [end["status"] for end in ends if end and end["status"] == "done"] == ["done"], "done once"
    assert (it.folder / "results" / "lab" / "table.csv").read_text().count("\n") > 2
