"""Sweeps on a real SLURM (tests/slurm/up.sh): whatever the cluster does to a run, it ends in the bits of an undisturbed one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import assert_same_results
from safetensors.torch import load_file
from submitit import helpers

from distill_bench.config.cluster import ClusterConfig
from distill_bench.config.errors import ConfigError
from distill_bench.config.sweep_file import load_sweep
from distill_bench.store.claims import attempts
from distill_bench.store.files import read_json
from distill_bench.sweep.__main__ import main
from distill_bench.sweep.manifest import open_sweep
from distill_bench.sweep.queue import SchedulerError, read_partition, read_queue
from distill_bench.sweep.status import Status, read_statuses
from distill_bench.sweep.submit import KILLED_RETRIES, batch_script, make_executor, submit
from distill_bench.train import checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
SLOW = Path(__file__).with_name("slow.py")
# a lost node that comes back before what ran on it has ended is drained ("Duplicate jobid") until somebody resumes it
BACK_IN_SERVICE = "while sleep 1; do scontrol update nodename=n2 state=resume; done"


class Lab:
    """A sweep of small runs in a folder of its own, and what one does to it."""

    def __init__(self, folder: Path, teacher: Path, base: dict, cluster: dict, **keys) -> None:
        base = {
            "teacher": str(teacher),
            "student_updates": 10,
            "fake_score_updates": 1,
            "batch_size": 2,
            "nfe": 2,
            "frames": 5,
            "height": 16,
            "width": 16,
            "checkpoint_every": 1,
            "log_every": 1,
            "trackers": [],
            "evaluations": 2,
            "threads": 1,
            "protocol": {"clips": 2, "teacher_steps": 2, "evaluators": ["motion"]},
        } | base
        cluster = {"cpus": 1, "mem_gb": 1, "hours": 0.2, "signal_seconds": 30} | cluster
        sweep = {
            "question": "Does it survive?",
            "base": base,
            "cluster": cluster,
            "grid": {"method": [f"{SLOW}:Slow"]},
        } | keys
        self.folder, self.store, self.known = folder, folder / "runs", {}
        folder.mkdir(parents=True)
        self.file = folder / "lab.yaml"
        self.file.write_text(json.dumps(sweep))

    def argv(self, *more: str, where: Path | None = None) -> list[str]:
        where = where or self.folder
        return [
            str(self.file),
            "--store",
            str(where / "runs"),
            "--out",
            str(where / "results"),
            *more,
        ]

    def start(
        self, *more: str, slow: float = 0.0, python: str = sys.executable
    ) -> subprocess.Popen:
        """The command, as a user would give it."""
        env = os.environ | {"SLOW_SECONDS": str(slow), "PYTHONPATH": str(ROOT)}
        log = (self.folder / f"driver-{time.monotonic_ns()}.txt").open("w")
        argv = [python, "-m", "distill_bench.sweep", *self.argv(*more)]
        return subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)

    def go(self, *more: str, slow: float = 0.0) -> int:
        """The command to its end; its exit code."""
        return self.start(*more, slow=slow).wait()

    def statuses(self) -> dict[str, Status]:
        self.known = (
            self.known
            or open_sweep(load_sweep(self.file), self.store, self.folder / "results").entries
        )
        return {s.run: s for s in read_statuses(self.store, self.known, read_queue(self.store))}

    def until(
        self, condition: Callable[[dict[str, Status]], bool], seconds: float = 300.0
    ) -> dict[str, Status]:
        """Wait for a condition on the statuses."""
        end = time.monotonic() + seconds
        while not condition(statuses := self.statuses()):
            if time.monotonic() > end:
                pytest.fail("\n".join(f"{s}" for s in statuses.values()) + f"\n{command('squeue')}")
            time.sleep(0.2)
        return statuses

    def pid(self, run: str) -> int:
        return read_json(attempts(self.store / run)[-1] / "start.json")["pid"]

    def end(self) -> None:
        """Cancel what is left of its jobs."""
        jobs = [job for runs in read_queue(self.store).jobs.values() for job in runs]
        subprocess.run(["scancel", *jobs, *prepare_jobs()], capture_output=True)

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
        each.end()


LIVES = f"""
echo life >>"$0"
[ $(wc -l <"$0") -gt {KILLED_RETRIES} ] || {{ scontrol requeue $SLURM_JOB_ID; sleep 60; }}
[ $(wc -l <"$0") -ne {KILLED_RETRIES + 1} ] || {{ kill -KILL $PPID; exit; }}
touch "$(dirname "$0")/ended"
"""


@pytest.fixture(scope="module", autouse=True)
def often_requeued(tmp_path_factory: pytest.TempPathFactory):
    """A job that is requeued as often as one may be killed, and then killed."""
    folder = tmp_path_factory.mktemp("requeued")
    executor = make_executor(
        ClusterConfig(cpus=1, mem_gb=1, hours=0.2), folder, "distill-bench-test", 1
    )
    job = executor.submit(
        helpers.CommandFunction(["bash", "-c", LIVES, str(folder / "lives.txt")])
    ).job_id
    yield folder
    subprocess.run(["scancel", job], check=True)


@pytest.fixture(scope="module", autouse=True)
def timed(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory):
    """Two runs side by side in a job of two minutes that need much longer; they sleep while the other tests run."""
    cluster = {"runs_per_job": 2, "cpus": 1, "hours": 2 / 60, "signal_seconds": 30}
    it = Lab(
        tmp_path_factory.mktemp("timed") / "lab",
        tiny_wan,
        {"student_updates": 200},
        cluster,
        seeds=2,
    )
    assert (
        it.go(slow=2.0) == 0
    )  # an update ends well within the time that a cancelled job has to save
    yield it
    it.end()


def command(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def quiet(statuses: dict[str, Status]) -> bool:
    return all(s.state in ("done", "failed", "stopped", "lost") for s in statuses.values())


def moving(*runs: str) -> Callable[[dict[str, Status]], bool]:
    """Whether the runs train and have a checkpoint."""
    return lambda statuses: all(
        statuses[run].state == "running" and statuses[run].student_updates > 1 for run in runs
    )


def test_whatever_happens_to_an_array_each_run_is_done_once_and_in_the_same_bits(
    lab, tmp_path, request
):
    """Two drivers at once, one killed; then requeue, SIGKILL, scancel, a lost node, preemption, and a run that raises."""
    broken, held = tmp_path / "broken", tmp_path / "held"
    broken.write_text("7")
    held.touch()  # however far apart they start, they are caught amid their updates
    method = {"name": f"{SLOW}:Slow", "broken": str(broken), "held": str(held)}
    it = lab({"method": method}, {"partition": "low"}, grid={}, seeds=8)
    drivers = [it.start("--wait", slow=0.6), it.start(slow=0.6)]
    assert drivers[1].wait() == 0
    statuses = it.until(
        lambda now: sum(moving(run)(now) for run in now) >= 5
    )  # other tests' jobs have the other CPUs
    drivers[0].kill()
    victims = [run for run, s in statuses.items() if moving(run)(statuses)]
    jobs = {run: read_json(attempts(it.store / run)[-1] / "start.json")["job"] for run in victims}
    nodes = {run: command("squeue", "-h", "-j", jobs[run], "-o", "%N").strip() for run in victims}
    on_n1, on_n2 = ([run for run in victims if nodes[run] == node] for node in ("n1", "n2"))
    requeued, killed, cancelled = (on_n1 + on_n2[1:])[:3]
    held.unlink()
    command("scontrol", "requeue", jobs[requeued])
    os.kill(it.pid(killed), signal.SIGKILL)
    command("scancel", jobs[cancelled])
    command("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    operator = subprocess.Popen(
        ["sh", "-c", BACK_IN_SERVICE], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    request.addfinalizer(operator.kill)
    it.until(
        lambda now: now[on_n2[0]].attempts >= 2 or now[on_n2[0]].state in ("requeued", "preempted")
    )
    command(
        "srun", "--partition=main", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=3", "true"
    )  # preempts most
    statuses = it.until(quiet)
    ends = [read_json(attempt / "exit.json") or {} for attempt in attempts(it.store / cancelled)]
    assert any(end.get("signal") == "SIGTERM" for end in ends), (
        "it saved; the other driver's job may have gone on with it"
    )
    assert (statuses[cancelled].state, statuses[cancelled].kind) in (
        ("stopped", "cancelled"),
        ("done", None),
    )
    (failed,) = [s for s in statuses.values() if s.state == "failed"]
    assert (
        failed.note == "RuntimeError: the method is broken"
        and "the method is broken" in Path(failed.log).read_text()
    )
    assert all(statuses[run].attempts >= 2 for run in (requeued, killed, on_n2[0]))
    assert len(attempts(it.store / failed.run)) == 1, (
        "what failed for one driver is not tried by the other"
    )
    broken.unlink()
    assert it.go("--wait") == 1, (
        "the cancelled run goes on, the failed one waits for --retry-failed"
    )
    assert it.go("--wait", "--retry-failed=cuda_oom") == 1
    assert it.go("--wait", "--retry-failed=exception") == 0
    assert_same_results(it.store, it.reference())
    for run in statuses:
        ends = [read_json(attempt / "exit.json") for attempt in attempts(it.store / run)]
        assert [end["status"] for end in ends if end and end["status"] == "done"] == ["done"], (
            "done once"
        )
    assert (it.folder / "results" / "lab" / "table.csv").read_text().count("\n") > 2


def test_a_run_over_many_processes_is_the_run_of_one(lab):
    """2 nodes x 1 task and 1 node x 2 tasks against one process, in float64; one rank is lost on the way."""
    base = {
        "precision": "float64",
        "batch_size": 4,
        "student_updates": 8,
        "method": "sgmd",
        "ema": None,
        "exit_step": "last",
    }
    across, within = (lab(base, layout, grid={}) for layout in ({"nodes": 2}, {"tasks": 2}))
    drivers = [each.start("--wait") for each in (across, within)]
    reference = across.reference()
    (run,) = across.statuses()
    within.until(lambda now: now[run].student_updates >= 1)
    ranks = command("pgrep", "-f", f"submitit.core._submit {within.store}/slurm").split()
    lost = next(
        int(pid)
        for pid in ranks
        if b"SLURM_PROCID=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
    os.kill(lost, signal.SIGKILL)
    assert [driver.wait() for driver in drivers] == [0, 0]
    for store in (across.store, within.store):
        assert_close_ends(store / run, reference / run)
    assert across.statuses()[run].attempts == 1 and within.statuses()[run].requeues == 1
    end = read_json(attempts(within.store / run)[0] / "exit.json")
    assert end is None or end["status"] == "lost", (
        "the other rank's complaint is no failure of the run"
    )
    start = read_json(attempts(across.store / run)[0] / "start.json")
    assert (
        start["slurm"]["SLURM_NNODES"] == "2"
        and start["slurm"]["SLURM_NTASKS"] == "2"
        and start["code_fingerprint"]
    )


def assert_close_ends(a: Path, b: Path) -> None:
    """Curves, costs and weights within 1e-9."""
    curves = [
        [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
        for run in (a, b)
    ]
    assert len(curves[0]) == len(curves[1]) == 8
    for one, other in zip(*curves, strict=True):
        assert one.keys() == other.keys()
        assert one | {"seconds": 0} == pytest.approx(other | {"seconds": 0}, rel=1e-9, abs=1e-12)
    weights = [load_file(list(checkpoint.students(run).values())[-1]) for run in (a, b)]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-9, atol=1e-9)
    results = [read_json(run / "result.json") for run in (a, b)]
    assert results[0]["cost"] == results[1]["cost"] and results[0].keys() == results[1].keys()


def test_each_thing_that_breaks_is_one_line_of_its_run_and_the_others_go_on(lab, tmp_path):
    """A full disk, a folder that cannot be written, code that changed between two lives of a job."""
    code = tmp_path / "own" / "slow.py"
    code.parent.mkdir()
    shutil.copy(SLOW, code)
    it = lab(grid={"method": [f"{code}:Slow"]}, seeds=4)
    full, unwritable, changed, sound = (
        runs := sorted(open_sweep(load_sweep(it.file), it.store, it.folder / "results").runs)
    )
    for run in runs:
        (it.store / run).mkdir(parents=True)
    command("mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(it.store / full))
    command("mount", "-t", "tmpfs", "-o", "size=64k,ro", "tmpfs", str(it.store / unwritable))
    try:
        assert it.go(slow=0.5) == 0
        it.until(moving(changed))
        job = read_json(attempts(it.store / changed)[-1] / "start.json")["job"]
        command("scontrol", "requeue", job)
        code.write_text(code.read_text().replace("x0, scores.x0_fake", "x0, 2 * scores.x0_fake"))
        statuses = it.until(lambda now: quiet(now) and now[changed].attempts == 2)
        kinds = {run: (s.state, s.kind) for run, s in statuses.items()}
        assert (
            kinds[full] == ("failed", "disk_full")
            and "No space left on device" in statuses[full].note
        )
        assert (
            kinds[unwritable] == ("failed", "read_only")
            and "cannot write" in statuses[unwritable].note
        )
        assert (
            kinds[changed] == ("failed", "code_changed")
            and "--allow-changed-code" in statuses[changed].note
        )
        assert statuses[sound].state == "done"
    finally:
        for run in (full, unwritable):
            command("umount", "-l", str(it.store / run))
    assert it.go("--wait", "--retry-failed=disk_full,read_only") == 1
    assert it.go("--wait", "--retry-failed", "--allow-changed-code") == 0
    first, second = read_json(it.store / changed / "result.json")["code_fingerprint"].split("+")
    assert first != second == read_json(it.store / full / "result.json")["code_fingerprint"]


def test_a_python_that_is_gone_is_said_and_the_run_started_again(lab, tmp_path):
    it = lab({"student_updates": 2}, {"sbatch": {"hold": True}})
    environment = tmp_path / "environment"
    environment.symlink_to(sys.prefix)
    assert it.start(python=str(environment / "bin" / "python")).wait() == 0
    environment.unlink()
    command(
        "scontrol",
        "release",
        *[job for runs in read_queue(it.store).jobs.values() for job in runs],
        *prepare_jobs(),
    )
    (status,) = it.until(quiet).values()
    assert (
        status.state == "lost"
        and status.kind == "not_started"
        and "No such file or directory" in status.note
    )
    assert it.go("--wait", "--set", "cluster.sbatch={}") == 0


def prepare_jobs() -> list[str]:
    return command("squeue", "--noheader", "--name=distill-bench-prepare", "--format=%i").split()


def test_two_hundred_runs_are_submitted_in_seconds_in_arrays_that_the_cluster_takes(lab):
    it = lab(cluster={"sbatch": {"hold": True}, "jobs": 8}, seeds=200)
    began = time.monotonic()
    assert it.go() == 0
    seconds = time.monotonic() - began
    print(f"200 runs expanded, hashed, checked and submitted in {seconds:.1f} s")
    queue = read_queue(it.store)
    assert (
        len(queue.states) >= 200
        and len({job.partition("_")[0] for jobs in queue.jobs.values() for job in jobs}) > 1
    )
    assert it.go() == 0 and len(read_queue(it.store).states) == len(queue.states), (
        "what is queued is not submitted again"
    )
    (prepare,) = set(queue.first.values())
    assert main(it.argv("--cancel", "--only", "seed == 0")) == 0 and prepare in prepare_jobs(), (
        "the other runs need it"
    )
    assert main(it.argv("--cancel")) == 0 and prepare not in prepare_jobs()
    assert {(s.state, s.kind) for s in it.statuses().values()} == {("lost", "cancelled")}
    assert seconds < 10


def test_what_a_cluster_block_becomes_and_what_sbatch_refuses(lab, capsys):
    it = lab(
        cluster={
            "sbatch": {"hold": True},
            "partition": "main,low",
            "nodes": 3,
            "cpus": 9,
            "hours": 200,
            "mem_gb": 9,
        }
    )
    assert main(it.argv()) == 0
    said = capsys.readouterr().out
    assert "submitted 1 runs" in said
    assert all(
        text in said
        for text in ("200 h is over", "3 nodes are more", "1 x 9 CPUs are more", "9 GB are more")
    )
    assert read_partition("main,low").preemptible and not read_partition("main").preemptible
    with pytest.raises(SchedulerError, match="no partition 'moon'; known: main, low"):
        read_partition("main,moon")
    text = batch_script(
        ClusterConfig(
            mem_gb=None, sbatch={"mem-per-cpu": 500, "requeue": False, "exclusive": False}
        ),
        it.store,
    )
    assert (
        "--mem-per-cpu=500" in text
        and "--no-requeue\n" in text
        and "False" not in text
        and "--mem=" not in text
    )
    (run,) = (it.store / run for run in it.statuses())
    assert main(it.argv("--cancel")) == 0
    before = prepare_jobs()
    with pytest.raises(ConfigError, match="--gpus < -N; Invalid generic resource"):
        submit([run], ClusterConfig(nodes=2, sbatch={"gpus": 1, "hold": True}), it.store, [run])
    assert prepare_jobs() == before, "nobody would wait for it"


def test_a_job_that_was_requeued_often_survives_a_kill(often_requeued):
    end = time.monotonic() + 200
    while not (often_requeued / "ended").exists():
        assert time.monotonic() < end, (often_requeued / "lives.txt").read_text()
        time.sleep(0.5)
    assert [path.read_text() for path in often_requeued.glob("slurm/*/*.killed")] == ["137\n"]


def test_a_time_limit_is_no_end_and_runs_can_share_a_job(timed):
    """Saved at the signal, requeued, and on from there; then `--cancel`, and on again."""
    it = timed

    def on_from_there(status: Status) -> bool:
        lives = attempts(it.store / status.run)
        return len(lives) > 1 and status.student_updates > (
            read_json(lives[0] / "exit.json") or {}
        ).get("student_updates", 200)

    it.until(
        lambda now: all(
            s.requeues and s.state == "running" and on_from_there(s) for s in now.values()
        )
    )
    assert it.go("--cancel") == 0
    statuses = it.until(quiet)
    assert {s.state for s in statuses.values()} == {"stopped"} and 0 < min(
        s.student_updates for s in statuses.values()
    ) < 200
    for run in statuses:
        first = read_json(attempts(it.store / run)[0] / "exit.json")
        assert (
            first["status"] == "stopped"
            and first["signal"] == "SIGUSR2"
            and first["student_updates"] > 0
        )
    assert it.go("--wait") == 0
    assert_same_results(it.store, it.reference())
