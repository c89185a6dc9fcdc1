"""Sweeps on a real SLURM (tests/slurm/up.sh).

Whatever the cluster does to a run, the run ends with the bits of an undisturbed run.
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
from lab import SLOW, Lab, command, last_job, moving, pid_of_rank, prepare_jobs, quiet, read_ends
from runs import assert_same_results, training_curve
from safetensors.torch import load_file
from submitit import helpers

from distill_bench.config.cluster import ClusterConfig
from distill_bench.config.errors import ConfigError
from distill_bench.config.sweep_file import load_sweep
from distill_bench.store.claims import attempts
from distill_bench.store.files import read_json
from distill_bench.sweep.__main__ import main
from distill_bench.sweep.manifest import open_sweep
from distill_bench.sweep.slurm.queue import SchedulerError, read_partition, read_queue
from distill_bench.sweep.slurm.submit import KILLED_RETRIES, make_executor, submit
from distill_bench.sweep.status import Status
from distill_bench.train import checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]
# a lost node that returns before its jobs have ended is drained ("Duplicate jobid") until resumed
BACK_IN_SERVICE = "while sleep 1; do scontrol update nodename=n2 state=resume; done"


@pytest.fixture
def lab(tiny_wan: Path, tmp_path: Path):
    """Make labs; their jobs do not outlive the test."""
    made: list[Lab] = []

    def make(base: dict | None = None, cluster: dict | None = None, **keys) -> Lab:
        made.append(Lab(tmp_path / f"lab{len(made)}", tiny_wan, base or {}, cluster or {}, **keys))
        return made[-1]

    yield make
    for sweep in made:
        sweep.end()


LIVES = f"""
echo life >>"$0"
[ $(wc -l <"$0") -gt {KILLED_RETRIES} ] || {{ scontrol requeue $SLURM_JOB_ID; sleep 60; }}
[ $(wc -l <"$0") -ne {KILLED_RETRIES + 1} ] || {{ kill -KILL $PPID; exit; }}
touch "$(dirname "$0")/ended"
"""


@pytest.fixture(scope="module", autouse=True)
def often_requeued(tmp_path_factory: pytest.TempPathFactory):
    """A job that is requeued as often as a job may be killed, and then killed."""
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
    """Two runs side by side that need much longer than their job's two minutes.

    They sleep while the other tests run.
    """
    cluster = {"runs_per_job": 2, "cpus": 1, "hours": 2 / 60, "signal_seconds": 30}
    folder = tmp_path_factory.mktemp("timed") / "lab"
    sweep = Lab(folder, tiny_wan, {"student_updates": 200}, cluster, seeds=2)
    # an update ends well within the time that a cancelled job has to save
    assert sweep.go(slow=2.0) == 0
    yield sweep
    sweep.end()


def test_whatever_happens_to_an_array_each_run_is_done_once_with_the_same_bits(
    lab, tmp_path, request
):
    """Two drivers, one killed; requeue, SIGKILL, scancel, a lost node, preemption, an error."""
    broken, held = tmp_path / "broken", tmp_path / "held"
    broken.write_text("7")
    held.touch()  # catches the runs amid their updates, however far apart they start
    method = {"name": f"{SLOW}:Slow", "broken": str(broken), "held": str(held)}
    sweep = lab({"method": method}, {"partition": "low"}, grid={}, seeds=8)

    first, second = sweep.start("--wait", slow=0.6), sweep.start(slow=0.6)
    assert second.wait() == 0
    # jobs of other tests have the other CPUs
    statuses = sweep.until(lambda now: sum(moving(run)(now) for run in now) >= 5)
    first.kill()

    victims = [run for run in statuses if moving(run)(statuses)]
    jobs = {run: last_job(sweep.store / run) for run in victims}
    nodes = {run: command("squeue", "-h", "-j", jobs[run], "-o", "%N").strip() for run in victims}
    on_n1, on_n2 = ([run for run in victims if nodes[run] == node] for node in ("n1", "n2"))
    on_lost_node = on_n2[0]
    requeued, killed, cancelled = (on_n1 + on_n2[1:])[:3]
    held.unlink()
    command("scontrol", "requeue", jobs[requeued])
    os.kill(sweep.pid(killed), signal.SIGKILL)
    command("scancel", jobs[cancelled])
    command("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    operator = subprocess.Popen(
        ["sh", "-c", BACK_IN_SERVICE], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    request.addfinalizer(operator.kill)
    sweep.until(
        lambda now: (
            now[on_lost_node].attempts >= 2 or now[on_lost_node].state in ("requeued", "preempted")
        )
    )
    # preempts most of the runs
    size = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=3")
    command("srun", "--partition=main", *size, "true")

    statuses = sweep.until(quiet)
    signals = [end.get("signal") for end in read_ends(sweep.store / cancelled)]
    assert "SIGTERM" in signals, "the cancelled run saved"
    # the other driver's job may have resumed it
    cancelled_states = [("stopped", "cancelled"), ("done", None)]
    assert (statuses[cancelled].state, statuses[cancelled].kind) in cancelled_states
    (failed,) = [s for s in statuses.values() if s.state == "failed"]
    assert failed.note == "RuntimeError: the method is broken"
    assert "the method is broken" in Path(failed.log).read_text()
    assert len(attempts(sweep.store / failed.run)) == 1, "the other driver does not try it again"
    for run in (requeued, killed, on_lost_node):
        assert statuses[run].attempts >= 2

    broken.unlink()
    assert sweep.go("--wait") == 1, "resumes the cancelled run; the failed one waits"
    assert sweep.go("--wait", "--retry-failed=cuda_oom") == 1
    assert sweep.go("--wait", "--retry-failed=exception") == 0
    assert_same_results(sweep.store, sweep.reference())
    for run in statuses:
        ends = [end.get("status") for end in read_ends(sweep.store / run)]
        assert ends.count("done") == 1
    assert (sweep.folder / "results" / "lab" / "table.csv").read_text().count("\n") > 2


def test_a_run_of_several_processes_equals_the_run_of_one(lab):
    """Two nodes, and one node of which a rank is killed, against one process; in float64."""
    base = {
        "precision": "float64",
        "batch_size": 4,
        "student_updates": 8,
        "method": "sgmd",
        "ema": None,
        "exit_step": "last",
    }
    across, within = (lab(base, layout, grid={}) for layout in ({"nodes": 2}, {"tasks": 2}))
    drivers = [sweep.start("--wait") for sweep in (across, within)]
    reference = across.reference()
    (run,) = across.statuses()
    within.until(lambda now: now[run].student_updates >= 1)
    os.kill(pid_of_rank(1, within.store), signal.SIGKILL)
    assert [driver.wait() for driver in drivers] == [0, 0]
    for store in (across.store, within.store):
        assert_close_results(store / run, reference / run)
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


def test_each_failure_is_one_line_of_its_run_and_the_others_go_on(lab, tmp_path):
    """A full disk, a read-only folder, code that changed before a job was requeued."""
    code = tmp_path / "own" / "slow.py"
    code.parent.mkdir()
    shutil.copy(SLOW, code)
    sweep = lab(grid={"method": [f"{code}:Slow"]}, seeds=4)
    runs = sorted(open_sweep(load_sweep(sweep.file), sweep.store, sweep.folder / "results").runs)
    full, unwritable, changed, sound = runs
    for run in runs:
        (sweep.store / run).mkdir(parents=True)
    command("mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(sweep.store / full))
    command("mount", "-t", "tmpfs", "-o", "size=64k,ro", "tmpfs", str(sweep.store / unwritable))
    try:
        assert sweep.go(slow=0.5) == 0
        sweep.until(moving(changed))
        command("scontrol", "requeue", last_job(sweep.store / changed))
        code.write_text(code.read_text().replace("x0, scores.x0_fake", "x0, 2 * scores.x0_fake"))
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
    assert sweep.go("--wait", "--retry-failed=disk_full,read_only") == 1
    assert sweep.go("--wait", "--retry-failed", "--allow-changed-code") == 0
    results = {run: read_json(sweep.store / run / "result.json") for run in (changed, full)}
    before, after = results[changed]["code_fingerprint"].split("+")
    assert before != after
    assert after == results[full]["code_fingerprint"]


def test_a_missing_python_is_named_and_the_run_can_be_started_again(lab, tmp_path):
    sweep = lab({"student_updates": 2}, {"sbatch": {"hold": True}})
    environment = tmp_path / "environment"
    environment.symlink_to(sys.prefix)
    assert sweep.start(python=str(environment / "bin" / "python")).wait() == 0
    environment.unlink()
    jobs = [job for runs in read_queue(sweep.store).jobs.values() for job in runs]
    command("scontrol", "release", *jobs, *prepare_jobs())
    (status,) = sweep.until(quiet).values()
    assert (status.state, status.kind) == ("lost", "not_started")
    assert "No such file or directory" in status.note
    assert sweep.go("--wait", "--set", "cluster.sbatch={}") == 0


def test_two_hundred_runs_are_submitted_as_arrays_below_the_limit(lab):
    """They take at most three times as long as the plan of one: mostly imports and checks."""
    sweep = lab(cluster={"sbatch": {"hold": True}, "jobs": 8}, seeds=200)
    began = time.monotonic()
    assert sweep.go("--dry-run", "--set", "seeds=1") == 0
    planned = time.monotonic()
    assert sweep.go() == 0
    seconds = time.monotonic() - planned
    print(f"200 runs submitted in {seconds:.1f} s, one planned in {planned - began:.1f} s")
    queue = read_queue(sweep.store)
    assert len(queue.states) >= 200
    assert len({job.partition("_")[0] for jobs in queue.jobs.values() for job in jobs}) > 1
    assert sweep.go() == 0
    assert len(read_queue(sweep.store).states) == len(queue.states), "no run is submitted twice"
    (prepare,) = set(queue.prepared_by.values())
    assert main(sweep.argv("--cancel", "--only", "seed == 0")) == 0
    assert prepare in prepare_jobs(), "the other runs need it"
    assert main(sweep.argv("--cancel")) == 0
    assert prepare not in prepare_jobs()
    assert {(s.state, s.kind) for s in sweep.statuses().values()} == {("lost", "cancelled")}
    assert seconds < 3 * (planned - began)


def test_limits_of_the_cluster_are_warned_of_and_sbatch_s_refusal_is_shown(lab, capsys):
    cluster = {"partition": "main,low", "nodes": 4, "cpus": 9, "hours": 200, "mem_gb": 9}
    sweep = lab({"batch_size": 4}, cluster | {"sbatch": {"hold": True}})
    assert main(sweep.argv()) == 0
    out = capsys.readouterr().out
    assert "submitted 1 runs" in out
    for shortfall in ("200 h is over", "4 nodes are more", "1 x 9 CPUs are", "9 GB are more"):
        assert shortfall in out
    assert read_partition("main,low").preemptible
    assert not read_partition("main").preemptible
    with pytest.raises(SchedulerError, match="no partition 'moon'; known: main, low"):
        read_partition("main,moon")
    (run,) = (sweep.store / run for run in sweep.statuses())
    assert main(sweep.argv("--cancel")) == 0
    before = prepare_jobs()
    with pytest.raises(ConfigError, match="--gpus < -N; Invalid generic resource"):
        submit([run], ClusterConfig(nodes=2, sbatch={"gpus": 1, "hold": True}), sweep.store, [run])
    assert prepare_jobs() == before, "nobody would wait for it"


def test_a_job_that_was_requeued_often_still_survives_a_kill(often_requeued):
    end = time.monotonic() + 200
    while not (often_requeued / "ended").exists():
        assert time.monotonic() < end, (often_requeued / "lives.txt").read_text()
        time.sleep(0.5)
    assert [path.read_text() for path in often_requeued.glob("slurm/*/*.killed")] == ["137\n"]


def test_runs_that_share_a_job_go_on_after_its_time_limit(timed):
    """They save at the signal and resume after the requeue, and again after `--cancel`."""

    def has_resumed(status: Status) -> bool:
        ends = read_ends(timed.store / status.run)
        saved_at = ends[0].get("student_updates", 200) if ends else 200
        resumed = len(ends) > 1 and status.student_updates > saved_at
        return resumed and status.state == "running" and status.requeues > 0

    timed.until(lambda now: all(map(has_resumed, now.values())))
    assert timed.go("--cancel") == 0
    statuses = timed.until(quiet)
    assert {s.state for s in statuses.values()} == {"stopped"}
    assert 0 < min(s.student_updates for s in statuses.values()) < 200
    for run in statuses:
        first = read_ends(timed.store / run)[0]
        assert (first["status"], first["signal"]) == ("stopped", "SIGUSR2")
        assert first["student_updates"] > 0
    assert timed.go("--wait") == 0
    assert_same_results(timed.store, timed.reference())
