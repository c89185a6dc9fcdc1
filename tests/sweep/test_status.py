"""What every run is doing, read from folders that look like those of each moment of a run's life."""

import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill_bench.config.errors import ConfigError
from distill_bench.config.sweep_file import load_sweep
from distill_bench.store.claims import STALE_SECONDS, claim
from distill_bench.store.files import read_json, write_json
from distill_bench.sweep.__main__ import main
from distill_bench.sweep.launch import Launch
from distill_bench.sweep.manifest import manifest_path, open_sweep
from distill_bench.sweep.provenance import code_fingerprint, syntax_digest
from distill_bench.sweep.queue import Queue
from distill_bench.sweep.status import Known, exit_code, explain, read_statuses

ROOT = Path(__file__).parents[2]
HERE = {"host": socket.gethostname(), "pid": os.getpid(), "job": None, "restart": 0}
GONE = HERE | {"pid": 2**22 + 1}  # above the largest process id
ELSEWHERE = HERE | {"host": "another"}


def attempt(run: Path, n: int, start: dict, end: dict | None = None, beat: float = 0.0) -> None:
    folder = run / "attempts" / f"{n:03d}"
    write_json(folder / "start.json", start)
    (folder / "heartbeat").touch()
    os.utime(folder / "heartbeat", (time.time() - beat,) * 2)
    os.utime(folder, (time.time() - beat,) * 2)
    if end is not None:
        write_json(folder / "exit.json", end)


def result(run: Path, **more) -> None:
    write_json(
        run / "result.json",
        {"run_id": run.name, "status": "done", "student_updates": 10, "train_seconds": 5.0} | more,
    )


LIVES = {
    "missing": lambda run: None,
    "running": lambda run: attempt(run, 1, HERE),
    "running elsewhere": lambda run: attempt(run, 1, ELSEWHERE, beat=STALE_SECONDS / 2),
    "lost": lambda run: attempt(run, 1, GONE),
    "lost elsewhere": lambda run: attempt(run, 1, ELSEWHERE, beat=2 * STALE_SECONDS),
    "stopped": lambda run: attempt(
        run, 1, GONE, {"status": "stopped", "signal": "SIGTERM", "student_updates": 3}
    ),
    "failed": lambda run: attempt(
        run, 1, GONE, {"status": "error", "kind": "cuda_oom", "error": "a\nOutOfMemoryError: b"}
    ),
    "failed outside": lambda run: write_json(
        run.parent / "errors" / f"{run.name}.json", {"error": "full", "kind": "disk_full"}
    ),
    "done": lambda run: result(run),
    "collapsed": lambda run: result(run, status="collapsed", reason="NaN"),
    "lost, another's result": lambda run: (result(run, run_id="another"), attempt(run, 1, GONE)),
}


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.parametrize("queued", [False, True])
def test_the_state_of_each_moment(life, queued, tmp_path):
    run = tmp_path / "dmd2-s0-0"
    run.mkdir()
    LIVES[life](run)
    queue = (
        Queue({"7_0": "PENDING"}, {run.name: ["7_0"]}, {"7_0": tmp_path / "log"})
        if queued
        else Queue()
    )
    (status,) = read_statuses(tmp_path, {run.name: Known("dmd2", 10)}, queue)
    word = life.replace(",", "").split()[0]
    waiting = {"missing": "queued", "lost": "requeued", "stopped": "preempted", "failed": "queued"}
    assert status.state == (waiting.get(word, word) if queued else word)
    if word == "failed" and not queued:
        assert (status.kind, status.note) in [
            ("cuda_oom", "OutOfMemoryError: b"),
            ("disk_full", "full"),
        ]
    assert exit_code([status]) == (
        0 if word in ("done", "collapsed") else 4 if status.state == "failed" else 3
    )


def test_a_run_tells_its_progress_its_requeues_and_its_story(tmp_path):
    run = tmp_path / "dmd2-s0-0"
    attempt(
        run,
        1,
        GONE | {"job": "7_0"},
        {"status": "stopped", "signal": "SIGUSR2", "student_updates": 2},
    )
    attempt(run, 2, GONE | {"job": "7_0", "restart": 1})
    attempt(run, 3, HERE | {"job": "7_0", "restart": 2})
    lines = [{"student_updates": n, "seconds": 2.0 * n} for n in (1, 2, 3)]
    (run / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"student_upd')  # torn
    known = Known("dmd2", 10)
    (status,) = read_statuses(tmp_path, {run.name: known}, Queue())
    assert (status.state, status.attempts, status.requeues) == ("running", 3, 2)
    assert status.student_updates == 3 and status.rate == 0.5 and status.seconds_left == 14
    story = explain(tmp_path, run.name, {"method": "dmd2"}, Queue(), known)
    assert (
        "stopped SIGUSR2" in story
        and "no end recorded" in story
        and f"distill-bench job {run}" in story
    )


def test_a_requeued_job_takes_over_its_own_earlier_life_at_once(tmp_path, monkeypatch):
    attempt(tmp_path, 1, ELSEWHERE | {"job": "7_3", "restart": 0})
    assert claim(tmp_path, {}) is None
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert claim(tmp_path, {}) is None, "the same life of the same job"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    taken = claim(tmp_path, {})
    assert taken is not None and taken.attempt.name == "002"
    taken.close("done")


def test_docstrings_comments_and_layout_are_not_code():
    one = 'def f(x):\n    """Doc."""\n    return x + 1  # one\n'
    assert syntax_digest(one) == syntax_digest("def f(x):\n    return (x\n        + 1)\n")
    assert syntax_digest(one) != syntax_digest("def f(x):\n    return x + 2\n")


@pytest.fixture
def sweep_file(tiny_wan: Path, tmp_path: Path) -> Path:
    path = tmp_path / "many.yaml"
    base = {"teacher": str(tiny_wan), "method": "dmd2", "frames": 5, "height": 16, "width": 16}
    path.write_text(json.dumps({"question": "How fast?", "base": base, "seeds": 1}))
    return path


def test_the_status_of_a_thousand_runs_takes_under_two_seconds(sweep_file, tmp_path, monkeypatch):
    """Of a core, so that a busy machine cannot fail it; the wall time is printed (`make bench`)."""
    store = tmp_path / "runs"
    sweep = open_sweep(load_sweep(sweep_file), store, tmp_path / "results")
    sweep.write()
    manifest = read_json(manifest_path(store, "many"))
    manifest["runs"] = {
        f"dmd2-s{i}-0": {"method": "dmd2", "student_updates": 10} for i in range(1000)
    }
    monkeypatch.setattr(os, "fsync", lambda _: None)
    write_json(manifest_path(store, "many"), manifest)
    lives = [LIVES[name] for name in ("done", "done", "running", "failed", "lost", "stopped")]
    for i, run in enumerate(manifest["runs"]):
        (store / run).mkdir()
        lives[i % len(lives)](store / run)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    argv = [
        sys.executable,
        "-m",
        "distill_bench.sweep",
        str(sweep_file),
        "--cluster=local",
        "--status",
        "--json",
    ]
    done = subprocess.run([*argv, f"--store={store}"], cwd=ROOT, capture_output=True, text=True)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    core = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"--status of 1,000 runs: {wall:.2f} s, {core:.2f} s of a core")
    assert len(json.loads(done.stdout)) == 1000 and done.returncode == 4
    assert core < 2


def test_profiles_move_a_sweep_between_clusters(sweep_file, tmp_path, monkeypatch):
    profiles = tmp_path / "clusters.yaml"
    profiles.write_text(
        "default: {hours: 2}\nlab: {partition: low, gpus: 1, sbatch: {exclude: n1}}\n"
    )
    monkeypatch.setenv("DISTILL_BENCH_CLUSTERS", str(profiles))
    assert load_sweep(sweep_file).cluster.hours == 2
    lab = load_sweep(sweep_file, {"cluster.profile": "lab", "cluster.cpus": 7}).cluster
    assert (lab.partition, lab.gpus, lab.cpus, lab.hours, lab.sbatch) == (
        "low",
        1,
        7,
        1,
        {"exclude": "n1"},
    )
    with pytest.raises(ConfigError, match="'moon' is not in .*; known: default, lab"):
        load_sweep(sweep_file, {"cluster.profile": "moon"})
    with pytest.raises(ConfigError, match="runs_per_job 2 needs nodes 1"):
        load_sweep(sweep_file, {"cluster.runs_per_job": 2, "cluster.nodes": 2})


def test_results_of_other_code_are_set_aside_when_asked(sweep_file, tmp_path):
    sweep = open_sweep(
        load_sweep(sweep_file, {"seeds": 2}), tmp_path / "runs", tmp_path / "results"
    )
    sweep.write()
    old, new = (sweep.store / run for run in sweep.runs)
    result(old, code_fingerprint="0123456789ab", references={})
    result(new, code_fingerprint=code_fingerprint("dmd2"), references={})
    assert [s.stale for s in read_statuses(sweep.store, sweep.known, Queue())] == [True, False]
    assert Launch().chosen(sweep, Queue()) == []
    assert Launch(stale="rerun").chosen(sweep, Queue()) == [old.name]
    assert (sweep.store / f"{old.name}.stale-1" / "result.json").is_file() and not (
        old / "result.json"
    ).exists()


def test_status_is_of_the_prompts_as_they_are_now(sweep_file, tmp_path, capsys):
    """The manifest of a launch answers only while the files that the sweep names are as they were."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball moving left\n")
    argv = [
        str(sweep_file),
        "--cluster=local",
        f"--store={tmp_path / 'runs'}",
        "--set",
        f"prompts={prompts}",
        "--status",
    ]
    sweep = open_sweep(
        load_sweep(sweep_file, {"prompts": str(prompts)}), tmp_path / "runs", tmp_path / "results"
    )
    for run in sweep.runs:
        result(sweep.store / run)
    sweep.write()
    assert main(argv) == 0
    prompts.write_text("a blue square moving right\n")
    assert main(argv) == 3 and "1 missing" in capsys.readouterr().out


def test_bad_questions_end_in_one_line(sweep_file, tmp_path, capsys):
    argv = [
        str(sweep_file),
        "--cluster=local",
        f"--store={tmp_path / 'runs'}",
        f"--out={tmp_path / 'results'}",
        "--set",
        "seeds=2",
    ]
    for more, says in (
        (["--status", "--only", "seed > 5"], "no run of the sweep is like that"),
        (["--explain", "xyz"], "known: dmd2-s0-"),
    ):
        assert main([*argv, *more]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
