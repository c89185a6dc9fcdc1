"""Sweeps on a real SLURM of four nodes (tests/slurm/up.sh).

Whatever the cluster does to a run, the run ends with the bits of an undisturbed run. Runs are held
while something happens to them, so that no test depends on the speed of the machine. The first test
has the nodes n1 and n2 to itself.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lab import SLOW, Lab, command, last_job, moving, pid_of_rank, quiet, read_ends
from runs import assert_same_results, training_curve
from safetensors.torch import load_file
from submitit import helpers

from distill_bench.config.cluster import ClusterConfig
from distill_bench.config.errors import ConfigError
from distill_bench.store.claims import attempts
from distill_bench.store.files import read_json
from distill_bench.sweep.slurm.queue import SchedulerError, read_partition, read_queue
from distill_bench.sweep.slurm.submit import KILLED_RETRIES, make_executor, submit
from distill_bench.sweep.status import Status
from distill_bench.train import checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1200)]
# a lost node that returns before its jobs have ended is drained ("Duplicate jobid") until resumed
BACK_IN_SERVICE = "while sleep 1; do scontrol update nodename=n2 state=resume; done"
BOTH_DRIVERS = f"""#!/bin/sh
# sbatch that waits for a second process: both drivers select their runs before either submits
touch "$0.$PPID"
while [ "$(ls "$0".* | wc -l)" -lt 2 ]; do sleep 0.1; done
exec {shutil.which("sbatch")} "$@"
"""


@pytest.fixture
def lab(tiny_wan: Path, tmp_path: Path):
    """Make labs that obey the same orders; their jobs do not outlive the test."""
    made: list[Lab] = []

    def make(base: dict | None = None, cluster: dict | None = None, **keys) -> Lab:
        folder, orders = tmp_path / f"lab{len(made)}", tmp_path / "orders"
        made.append(Lab(folder, tiny_wan, orders, base or {}, cluster or {}, **keys))
        return made[-1]

    yield make
    for sweep in made:
        sweep.end()


def test_whatever_happens_to_an_array_each_run_is_done_once_with_the_same_bits(
    lab, tmp_path, request
):
    """Two drivers, one killed; requeue, SIGKILL, scancel, a lost node, preemption, an error."""
    sweep = lab(cluster={"partition": "low", "sbatch": {"exclude": "n[3-4]"}}, seeds=6)
    sweep.order("raise", 5)
    sweep.order("hold", *range(5))
    path = tmp_path / "bin"
    path.mkdir()
    (path / "sbatch").write_text(BOTH_DRIVERS)
    (path / "sbatch").chmod(0o755)
    first, second = sweep.start("--wait", slow=0.2, path=path), sweep.start(slow=0.2, path=path)
    assert second.wait() == 0
    statuses = sweep.until(lambda now: sum(moving(run)(now) for run in now) == 5)
    first.kill()
    (broken,) = [run for run in statuses if not moving(run)(statuses)]

    victims = [run for run in statuses if run != broken]
    jobs = {run: last_job(sweep.store / run) for run in victims}
    nodes = {run: command("squeue", "-h", "-j", jobs[run], "-o", "%N").strip() for run in victims}
    # a node has 4 CPUs, so both are in use
    on_n1, on_n2 = ([run for run in victims if nodes[run] == node] for node in ("n1", "n2"))
    cancelled, preempted, requeued, killed, on_lost_node = on_n1 + on_n2
    command("scontrol", "requeue", jobs[requeued])
    os.kill(sweep.pid(killed), signal.SIGKILL)
    command("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    operator = subprocess.Popen(
        ["sh", "-c", BACK_IN_SERVICE], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    request.addfinalizer(operator.kill)
    command("scancel", jobs[cancelled])
    sweep.withdraw("hold", *(run for run in victims if run != preempted))
    sweep.until(
        lambda now: (
            now[on_lost_node].attempts >= 2 or now[on_lost_node].state in ("requeued", "preempted")
        )
    )
    sweep.until(moving(preempted))
    size = ("--nodes=2", "--nodelist=n[1-2]", "--ntasks-per-node=1", "--cpus-per-task=4")
    preemptor = subprocess.Popen(["srun", "--partition=main", *size, "true"])
    while {"JobState=RUNNING", "PreemptTime=None"} <= job_fields(last_job(sweep.store / preempted)):
        time.sleep(0.1)
    sweep.withdraw("hold", preempted)
    assert preemptor.wait() == 0

    statuses = sweep.until(quiet)
    signals = [end.get("signal") for end in read_ends(sweep.store / cancelled)]
    assert "SIGTERM" in signals, "the cancelled run saved"
    # the other driver's job may have resumed it
    cancelled_states = [("stopped", "cancelled"), ("done", None)]
    assert (statuses[cancelled].state, statuses[cancelled].kind) in cancelled_states
    assert [run for run in statuses if statuses[run].state == "failed"] == [broken]
    assert statuses[broken].note == "RuntimeError: the method is broken"
    assert "the method is broken" in Path(statuses[broken].log).read_text()
    ends = [end.get("status") for end in read_ends(sweep.store / broken)]
    assert ends.count("error") == 1, "the other driver does not try it again"
    for run in (requeued, killed, on_lost_node, preempted):
        assert statuses[run].attempts >= 2

    sweep.withdraw("raise", broken)
    assert sweep.go("--retry-failed=cuda_oom") == 0, "resumes the cancelled run"
    assert sweep.statuses()[broken].state == "failed"
    assert sweep.go("--retry-failed=exception") == 0
    reference = sweep.reference()
    assert sweep.go("--wait") == 0
    assert_same_results(sweep.store, reference)
    for run in statuses:
        ends = [end.get("status") for end in read_ends(sweep.store / run)]
        assert ends.count("done") == 1
    assert (sweep.folder / "results" / sweep.name / "table.csv").read_text().count("\n") > 2


def job_fields(job: str) -> set[str]:
    """SLURM's description of a job: KEY=VALUE, ..."""
    return {*command("scontrol", "--oneliner", "show", "job", job).split()}


def test_a_run_of_several_processes_equals_the_run_of_one(lab):
    """Two nodes, and one node of which a rank is killed, against one process; in float64."""
    base = {
        "precision": "float64",
        "batch_size": 4,
        "student_updates": 8,
        "ema": None,
        "exit_step": "last",
    }
    across, within = (lab(base, layout) for layout in ({"nodes": 2}, {"tasks": 2}))
    across.order("hold", 0)
    for sweep in (across, within):
        sweep.prepare()
        assert sweep.go() == 0
    (run,) = within.until(lambda now: moving(*now)(now))
    os.kill(pid_of_rank(1, within.store), signal.SIGKILL)
    within.withdraw("hold", run)
    reference = across.reference()
    for sweep in (across, within):
        assert sweep.until(quiet)[run].state == "done"
        assert_close_results(sweep.store / run, reference / run)
    assert across.statuses()[run].attempts == 1
    assert within.statuses()[run].requeues == 1
    # the loss of a rank is no failure of the run, whatever the other rank records
    assert read_ends(within.store / run)[0].get("status") in (None, "lost")
    start = read_json(attempts(across.store / run)[0] / "start.json")
    assert start["slurm"]["SLURM_NNODES"] == "2"
    assert start["slurm"]["SLURM_NTASKS"] == "2"
    assert start["code_fingerprint"]


def assert_close_results(run: Path, other: Path) -> None:
    """Curves, costs and weights agree within 1e-9."""
    curves = [training_curve(folder) for folder in (run, other)]
    assert len(curves[0]) == 8
    for line, other_line in zip(*curves, strict=True):
        assert line == pytest.approx(other_line, rel=1e-9, abs=1e-12)
    weights, other_weights = (
        load_file(list(checkpoint.students(folder).values())[-1]) for folder in (run, other)
    )
    torch.testing.assert_close(weights, other_weights, rtol=1e-9, atol=1e-9)
    result, other_result = (read_json(folder / "result.json") for folder in (run, other))
    assert result["cost"] == other_result["cost"]
    assert result.keys() == other_result.keys()


def test_two_hundred_runs_are_submitted_as_two_arrays_below_the_limit(lab):
    """They take less CPU time than the plans of two hundred sweeps of one run, without imports."""
    sweep = lab(cluster={"sbatch": {"hold": True}, "jobs": 8}, seeds=200)
    assert sweep.go("--dry-run", "--set", "seeds=1") == 0
    began = time.process_time()
    assert sweep.go("--dry-run", "--set", "seeds=1") == 0
    planned = time.process_time()
    assert sweep.go() == 0
    seconds = time.process_time() - planned
    print(f"200 runs submitted in {seconds:.1f} s, one planned in {planned - began:.2f} s")
    queue = read_queue(sweep.store)
    assert len(queue.states) >= 200
    assert len({job.partition("_")[0] for job in sweep.jobs()}) == 2
    assert sweep.go() == 0
    assert read_queue(sweep.store).jobs == queue.jobs, "no run is submitted twice"
    (prepare,) = set(queue.prepared_by.values())
    assert sweep.go("--cancel", "--only", "seed == 0") == 0
    assert prepare in sweep.prepare_jobs(), "the other runs need it"
    assert sweep.go("--cancel") == 0
    assert prepare not in sweep.prepare_jobs()
    assert {(s.state, s.kind) for s in sweep.statuses().values()} == {("lost", "cancelled")}
    assert seconds < 200 * (planned - began)


def test_each_failure_is_one_line_of_its_run_and_the_others_go_on(lab, tmp_path):
    """A missing Python, a full disk, a read-only folder, code that changed before a requeue."""
    code = tmp_path / "own" / "slow.py"
    code.parent.mkdir()
    shutil.copy(SLOW, code)
    sweep = lab(method=code, seeds=4)
    full, unwritable, changed, sound = sorted(
        sweep.sweep.runs, key=lambda r: sweep.sweep.runs[r].seed
    )
    environment = tmp_path / "environment"
    environment.symlink_to(sys.prefix)
    held = ("--only", "seed == 3", "--set", 'cluster.sbatch={"hold": true}')
    assert sweep.start(*held, python=str(environment / "bin" / "python")).wait() == 0
    environment.unlink()
    command("scontrol", "release", *sweep.jobs(), *sweep.prepare_jobs())
    status = sweep.until(lambda now: quiet({sound: now[sound]}))[sound]
    assert (status.state, status.kind) == ("lost", "not_started")
    assert "No such file or directory" in status.note

    sweep.prepare()
    for run in (full, unwritable):
        (sweep.store / run).mkdir(exist_ok=True)
    command("mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(sweep.store / full))
    command("mount", "-t", "tmpfs", "-o", "size=64k,ro", "tmpfs", str(sweep.store / unwritable))
    try:
        sweep.order("hold", 2)
        assert sweep.go() == 0
        sweep.until(moving(changed))
        command("scontrol", "requeue", last_job(sweep.store / changed))
        code.write_text(code.read_text() + "\n\nCHANGED = True\n")
        sweep.withdraw("hold", changed)
        statuses = sweep.until(lambda now: quiet(now) and now[changed].attempts == 2)
        failures = {
            full: ("disk_full", "No space left on device"),
            unwritable: ("read_only", "cannot write"),
            changed: ("code_changed", "--allow-changed-code"),
        }
        for run, (kind, note) in failures.items():
            assert (statuses[run].state, statuses[run].kind) == ("failed", kind)
            assert note in statuses[run].note
        assert statuses[sound].state == "done"
    finally:
        for run in (full, unwritable):
            command("umount", "-l", str(sweep.store / run))
    kinds = ",".join(kind for kind, _ in failures.values())
    assert sweep.go(f"--retry-failed={kinds}", "--allow-changed-code") == 0
    assert {s.state for s in sweep.until(quiet).values()} == {"done"}
    results = {run: read_json(sweep.store / run / "result.json") for run in (changed, full)}
    before, after = results[changed]["code_fingerprint"].split("+")
    assert before != after
    assert after == results[full]["code_fingerprint"]


LIVES = f"""
echo life >>"$0"
[ $(wc -l <"$0") -gt {KILLED_RETRIES} ] || {{ scontrol requeue $SLURM_JOB_ID; sleep 60; }}
[ $(wc -l <"$0") -ne {KILLED_RETRIES + 1} ] || {{ kill -KILL $PPID; exit; }}
touch "$(dirname "$0")/ended"
"""


def test_a_job_that_was_requeued_as_often_as_a_job_may_be_killed_survives_a_kill(tmp_path):
    cluster = ClusterConfig(cpus=1, mem_gb=1, hours=0.2, sbatch={"exclude": "n[1-2]"})
    executor = make_executor(cluster, tmp_path, "distill-bench-test", 1)
    lives = ["bash", "-c", LIVES, str(tmp_path / "lives.txt")]
    job = executor.submit(helpers.CommandFunction(lives)).job_id
    try:
        end = time.monotonic() + 600
        while not (tmp_path / "ended").exists():
            assert time.monotonic() < end, (tmp_path / "lives.txt").read_text()
            time.sleep(0.5)
        assert [path.read_text() for path in tmp_path.glob("slurm/*/*.killed")] == ["137\n"]
    finally:
        command("scancel", job)


def test_runs_that_share_a_job_go_on_after_its_time_limit(lab):
    """They save at the signal and resume after the requeue, and again after `--cancel`."""
    sweep = lab({"student_updates": 48}, {"runs_per_job": 2, "cpus": 1}, seeds=2)
    sweep.prepare()
    sweep.order("hold", 0, 1)
    # an update ends well within the time to save, and all of them after the signal
    assert sweep.go(slow=2.5) == 0
    sweep.until(lambda now: moving(*now)(now))
    (job,) = set(sweep.jobs())
    (elapsed,) = (f for f in job_fields(job) if f.startswith("RunTime="))
    _, minutes, seconds = map(int, elapsed.partition("=")[2].split(":"))
    # at least 30 s are left, which is when SLURM sends the signal
    limit = minutes + 1 + (seconds > 30)
    command("scontrol", "update", f"jobid={job}", f"timelimit={limit}")
    sweep.withdraw("hold", *sweep.sweep.runs)

    def saved(run: str) -> int:
        """Student updates that the run saved at the signal before the time limit."""
        ends = read_ends(sweep.store / run)
        return max((e["student_updates"] for e in ends if e.get("signal") == "SIGUSR2"), default=0)

    sweep.until(lambda now: min(map(saved, now)) > 0)
    command("scontrol", "update", f"jobid={job}", "timelimit=60")

    def has_resumed(status: Status) -> bool:
        resumed = status.student_updates > saved(status.run)
        return resumed and status.state == "running" and status.requeues > 0

    sweep.until(lambda now: all(map(has_resumed, now.values())))
    assert sweep.go("--cancel") == 0
    statuses = sweep.until(quiet)
    assert {s.state for s in statuses.values()} == {"stopped"}
    assert max(s.student_updates for s in statuses.values()) < 48
    assert sweep.go() == 0
    reference = sweep.reference()
    assert {s.state for s in sweep.until(quiet).values()} == {"done"}
    assert_same_results(sweep.store, reference)


def test_a_second_stage_starts_after_its_first_and_a_failed_first_stage_leaves_one_line(lab):
    """The first stage of seed 0 is held while there are free nodes; that of seed 1 fails."""
    stages = {"first": {"student_lr": 1e-3}}
    sweep = lab({"student_updates": 4}, stages=stages, grid={"init": ["first"]}, seeds=2)
    sweep.prepare()
    sweep.order("hold", 0)
    sweep.order("raise", 1)
    assert sweep.go() == 0
    runs = sweep.sweep.runs
    second, never = sorted((r for r in runs if runs[r].init_run), key=lambda r: runs[r].seed)
    first, failed = (str(runs[run].init_run) for run in (second, never))
    statuses = sweep.until(lambda now: moving(first)(now) and quiet({failed: now[failed]}))
    assert {"JobState=PENDING", "Reason=Dependency"} <= job_fields(str(statuses[second].job))
    assert statuses[second].note == f"waits for {first}, which is running"

    sweep.withdraw("hold", first)
    statuses = sweep.until(lambda now: now[second].state == "done" and now[never].state != "queued")
    (end,), (start,) = (attempts(sweep.store / run) for run in (first, second))
    assert read_json(start / "start.json")["time"] >= read_json(end / "exit.json")["time"]
    assert read_json(sweep.store / second / "initial.json")["run_id"] == first
    waits = f"waits for {failed}, which is failed"
    assert (statuses[never].state, statuses[never].note) == ("missing", waits)
    assert not attempts(sweep.store / never)
    log = sweep.job_log(never).read_text()
    assert f"{never} {waits}" in log.splitlines()
    assert "Traceback" not in log


def test_limits_of_the_cluster_are_warned_of_and_sbatch_s_refusal_is_shown(lab, capsys):
    cluster = {"partition": "main,low", "nodes": 8, "cpus": 9, "hours": 200, "mem_gb": 9}
    sweep = lab({"batch_size": 8}, cluster | {"sbatch": {"hold": True}})
    assert sweep.go() == 0
    out = capsys.readouterr().out
    assert "submitted 1 runs" in out
    for shortfall in ("200 h is over", "8 nodes are more", "1 x 9 CPUs are", "9 GB are more"):
        assert shortfall in out
    assert read_partition("main,low").preemptible
    assert not read_partition("main").preemptible
    with pytest.raises(SchedulerError, match="no partition 'moon'; known: main, low"):
        read_partition("main,moon")
    (run,) = (sweep.store / run for run in sweep.sweep.runs)
    assert sweep.go("--cancel") == 0
    before = sweep.prepare_jobs()
    with pytest.raises(ConfigError, match="--gpus < -N; Invalid generic resource"):
        submit([run], ClusterConfig(nodes=2, sbatch={"gpus": 1, "hold": True}), sweep.store, [run])
    assert sweep.prepare_jobs() == before, "nobody would wait for it"
