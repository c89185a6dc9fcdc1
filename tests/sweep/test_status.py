"""State, progress and history of runs, read from hand-written run folders."""

import dataclasses
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from run_folders import ELSEWHERE, GONE, HERE, write_attempt, write_result

from distill_bench.config.resolve import load_run
from distill_bench.config.sweep_file import load_sweep
from distill_bench.store.claims import STALE_SECONDS, attempts, try_claim
from distill_bench.store.files import read_json, write_json
from distill_bench.store.runs import error_path
from distill_bench.sweep import watch
from distill_bench.sweep.__main__ import main
from distill_bench.sweep.launch import LaunchOptions, select_runs
from distill_bench.sweep.local.workers import Task
from distill_bench.sweep.manifest import OpenSweep, manifest_path, open_sweep
from distill_bench.sweep.provenance import code_fingerprint
from distill_bench.sweep.slurm.queue import Queue, read_queue
from distill_bench.sweep.status import (
    ManifestEntry,
    Status,
    exit_code,
    explanation,
    read_statuses,
    status_table,
)
from distill_bench.sweep.watch import LONG, console, print_rows, warn

ROOT = Path(__file__).parents[2]
ENTRY = ManifestEntry("dmd2", 10)
STOPPED = {"status": "stopped", "signal": "SIGTERM", "student_updates": 3}
FAILED = {"status": "error", "kind": "cuda_oom", "error": "a\nOutOfMemoryError: b"}
# (state, state while a job of the run is queued, what is in the run's folder)
LIVES: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "untouched": ("missing", "queued", lambda run: None),
    "here": ("running", "running", lambda run: write_attempt(run, 1, HERE)),
    "on another host": (
        "running",
        "running",
        lambda run: write_attempt(run, 1, ELSEWHERE, heartbeat_age=STALE_SECONDS / 2),
    ),
    "killed": ("lost", "requeued", lambda run: write_attempt(run, 1, GONE)),
    "killed on another host": (
        "lost",
        "requeued",
        lambda run: write_attempt(run, 1, ELSEWHERE, heartbeat_age=2 * STALE_SECONDS),
    ),
    "stopped": ("stopped", "preempted", lambda run: write_attempt(run, 1, GONE, STOPPED)),
    "failed": ("failed", "queued", lambda run: write_attempt(run, 1, GONE, FAILED)),
    "in an unwritable folder": (
        "failed",
        "queued",
        lambda run: write_json(error_path(run), {"error": "full", "kind": "disk_full"}),
    ),
    "done": ("done", "done", write_result),
    "collapsed": (
        "collapsed",
        "collapsed",
        lambda run: write_result(run, status="collapsed", reason="NaN"),
    ),
    "copied from another run": (
        "lost",
        "requeued",
        lambda run: (write_result(run, run_id="another"), write_attempt(run, 1, GONE)),
    ),
}


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.parametrize("queued", [False, True])
def test_each_moment_of_a_run_has_its_state_and_exit_code(life, queued, tmp_path):
    run = tmp_path / "dmd2-s0-0"
    run.mkdir()
    alone, waiting, write = LIVES[life]
    write(run)
    queue = Queue()
    if queued:
        queue = Queue({"7_0": "PENDING"}, {run.name: ["7_0"]}, {"7_0": tmp_path / "log"})
    (status,) = read_statuses(tmp_path, {run.name: ENTRY}, queue)
    assert status.state == (waiting if queued else alone)
    codes = {"done": 0, "collapsed": 0, "failed": 4}
    assert exit_code([status]) == codes.get(status.state, 3)
    if status.state == "failed":
        expected = {
            "failed": ("cuda_oom", "OutOfMemoryError: b"),
            "in an unwritable folder": ("disk_full", "full"),
        }
        assert (status.kind, status.note) == expected[life]


@pytest.mark.parametrize(
    "name",
    [
        "dmd2-s0-0/result.json",
        "dmd2-s0-0/attempts/001/start.json",
        "dmd2-s0-0/attempts/001/exit.json",
        "submissions/1.json",
        "cancels/1.json",
    ],
)
@pytest.mark.parametrize("content", [b"\xff\xfe\x00garbage", b"{}", b'{"status": 5, "jobs": []}'])
def test_a_damaged_record_leaves_its_run_lost_and_the_others_readable(name, content, tmp_path):
    run, other = tmp_path / "dmd2-s0-0", tmp_path / "dmd2-s1-0"
    write_attempt(run, 1, ELSEWHERE, heartbeat_age=2 * STALE_SECONDS)
    write_result(other)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    queue = read_queue(tmp_path, on_slurm=False)
    statuses = read_statuses(tmp_path, {run.name: ENTRY, other.name: ENTRY}, queue)
    assert [s.state for s in statuses] == ["lost", "done"]


def test_a_run_has_progress_requeues_and_a_history(tmp_path):
    run = tmp_path / "dmd2-s0-0"
    stopped = {"status": "stopped", "signal": "SIGUSR2", "student_updates": 2}
    write_attempt(run, 1, GONE | {"job": "7_0"}, stopped)
    write_attempt(run, 2, GONE | {"job": "7_0", "restart": 1})
    write_attempt(run, 3, HERE | {"job": "7_0", "restart": 2})
    lines = [json.dumps({"student_updates": n, "seconds": 2.0 * n}) for n in (1, 2, 3)]
    torn = '{"student_upd'
    (run / "train.jsonl").write_text("\n".join([*lines, torn]))
    (status,) = read_statuses(tmp_path, {run.name: ENTRY}, Queue())
    assert (status.state, status.attempts, status.requeues) == ("running", 3, 2)
    assert (status.student_updates, status.rate, status.seconds_left) == (3, 0.5, 14)
    text = explanation(tmp_path, run.name, {"method": "dmd2"}, Queue(), ENTRY)
    assert "stopped SIGUSR2" in text
    assert "no end recorded" in text
    assert f"distill-bench job {run}" in text


# --- a full disk ---


def test_a_run_that_waits_for_its_stage_still_has_its_ended_job(tmp_path):
    entry = dataclasses.replace(ENTRY, init_run="dmd2-s0-stage")
    queue = Queue({}, {"dmd2-s0-0": ["7_0"]}, {"7_0": tmp_path / "log"})
    (status,) = read_statuses(tmp_path, {"dmd2-s0-0": entry}, queue)
    assert (status.state, status.job, status.log) == ("missing", "7_0", str(tmp_path / "log"))
    assert status.note == "waits for dmd2-s0-stage, which is missing"


@pytest.fixture
def small_disk(tmp_path: Path):
    """A disk of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(argv, capture_output=True).returncode:
        pytest.skip("only root can mount a disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    with pytest.raises(OSError), (disk / "filling").open("wb", buffering=0) as file:
        while file.write(bytes(512)):
            pass


def test_a_run_lost_on_a_full_disk_is_named_so_and_reading_still_works(
    small_disk, sweep_file, capsys
):
    run, late = small_disk / "dmd2-s0-0", small_disk / "dmd2-s1-0"
    claim = try_claim(run, {})
    (late / "attempts").mkdir(parents=True)
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        claim.close("error", error="OSError: No space left on device", kind="disk_full")
    with pytest.raises(OSError, match="No space left"):
        try_claim(late, {})
    assert not attempts(late), "it must not look alive"
    queue = Queue(jobs={late.name: ["7_0"]}, logs={"7_0": small_disk / "log"})
    (status,) = read_statuses(small_disk, {late.name: ENTRY}, queue)
    assert (status.state, status.kind) == ("lost", "disk_full")
    out = small_disk / "results"
    argv = [str(sweep_file), "--cluster=local", f"--store={small_disk}", f"--out={out}"]
    assert main([*argv, "--dry-run"]) == 0
    assert main([*argv, "--status", "--only", "seed == 0"]) == 3
    assert main([*argv, "--cancel"]) == 0
    assert "local drivers start the next runs" in capsys.readouterr().out
    assert main(argv) == 2
    assert "cannot write into" in capsys.readouterr().err


# --- a whole sweep ---


def test_the_status_of_a_thousand_runs_takes_two_seconds_of_a_core(
    sweep_file, tmp_path, monkeypatch
):
    """CPU time, so that a busy machine cannot fail it; `make bench` prints the wall time."""
    store = tmp_path / "runs"
    open_sweep(load_sweep(sweep_file), store, tmp_path / "results").write()
    manifest = read_json(manifest_path(store, "few"))
    entry = {"method": "dmd2", "student_updates": 10}
    manifest["runs"] = {f"dmd2-s{i}-0": entry for i in range(1000)}
    monkeypatch.setattr(os, "fsync", lambda _: None)
    write_json(manifest_path(store, "few"), manifest)
    lives = [LIVES[name][2] for name in ("done", "done", "here", "failed", "killed", "stopped")]
    for i, run in enumerate(manifest["runs"]):
        (store / run).mkdir()
        lives[i % len(lives)](store / run)
    argv = [sys.executable, "-m", "distill_bench.sweep", str(sweep_file), f"--store={store}"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [*argv, "--cluster=local", "--status", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    core = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"--status of 1,000 runs: {wall:.2f} s, {core:.2f} s of a core")
    assert len(json.loads(done.stdout)) == 1000
    assert done.returncode == 4
    assert core < 2


def test_the_board_counts_ended_runs_and_reads_all_of_them_seldom(
    sweep_file, tmp_path, monkeypatch, capsys
):
    """Reading all takes a second here, so that the next one comes 19 seconds later."""
    sweep = open_sweep(load_sweep(sweep_file), tmp_path / "runs", tmp_path / "results")
    sweep.write()
    clock, readings = [0.0], []

    def read(store, entries, queue):
        if len(entries) > 1:
            readings.append(clock[0])
            clock[0] += 1
        return read_statuses(store, entries, queue)

    monkeypatch.setattr(watch, "read_statuses", read)
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    board, ended = watch.ProgressBoard(sweep, 1), SimpleNamespace(poll=lambda: 0)
    for run in sweep.runs:
        write_result(sweep.store / run)
        board.changed(Task(run, [], tmp_path / "log", process=ended))
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("[1/2]") and second.endswith("[2/2]")
    for clock[0] in (19.9, 20.1):
        board.changed(Task(run, [], tmp_path / "log", process=ended))
    assert readings == [0, 20.1]


def test_results_of_other_code_are_moved_aside_on_request(sweep_file, tmp_path):
    sweep = open_sweep(load_sweep(sweep_file), tmp_path / "runs", tmp_path / "results")
    sweep.write()
    old, new = (sweep.store / run for run in sweep.runs)
    write_result(old, code_fingerprint="0123456789ab", references={})
    write_result(new, code_fingerprint=code_fingerprint("dmd2"), references={})
    statuses = read_statuses(sweep.store, sweep.entries, Queue())
    assert [s.stale for s in statuses] == [True, False]
    assert select_runs(sweep, Queue(), LaunchOptions()) == []
    assert select_runs(sweep, Queue(), LaunchOptions(stale="rerun")) == [old.name]
    assert (sweep.store / f"{old.name}.stale-1" / "result.json").is_file()
    assert not (old / "result.json").exists()


def test_a_run_that_starts_again_takes_the_keys_outside_its_id_of_the_new_launch(
    sweep_file, tmp_path
):
    """Otherwise `gradient_checkpointing: true` after CUDA ran out of memory would do nothing."""

    def opened(**keys: object) -> OpenSweep:
        return open_sweep(load_sweep(sweep_file, keys), tmp_path / "runs", tmp_path / "results")

    first = opened()
    assert len(select_runs(first, Queue(), LaunchOptions())) == 2
    ended, again = first.runs
    write_result(first.store / ended, references={})
    second = opened(threads=3, checkpoint_every=7)
    second.write()
    assert load_run(first.store / again).threads != 3  # it is not started
    assert select_runs(second, Queue(), LaunchOptions()) == [again]
    assert load_run(first.store / again) == second.runs[again]
    assert load_run(first.store / ended) == first.runs[ended]


def test_a_status_is_of_the_prompts_as_they_are_now(sweep_file, tmp_path, capsys):
    """The manifest answers only while the files that the sweep names are unchanged."""
    store, prompts = tmp_path / "runs", tmp_path / "prompts.txt"
    prompts.write_text("a red ball moving left\n")
    sweep = open_sweep(
        load_sweep(sweep_file, {"prompts": str(prompts)}), store, tmp_path / "results"
    )
    for run in sweep.runs:
        write_result(sweep.store / run)
    sweep.write()
    argv = [str(sweep_file), "--cluster=local", f"--store={store}", "--set", f"prompts={prompts}"]
    assert main([*argv, "--status"]) == 0
    prompts.write_text("a blue square moving right\n")
    assert main([*argv, "--status"]) == 3
    assert "2 missing" in capsys.readouterr().out


def test_brackets_and_colons_of_errors_and_paths_are_printed_as_they_are(capsys):
    """Rich would drop `[enforce fail ...]`, end at `[/tmp]` and draw `:cat:`."""
    error = "[enforce fail at alloc_cpu.cpp:75] [/tmp] :cat:"
    failed = Status("run", "failed", 3, 10, 1.0, None, 1, 0, None, note=error, log="/r[/a]/log.txt")
    console.print(status_table([failed]))
    warn(error)
    table, warning = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert f"{error}; log: /r[/a]/log.txt" in table
    assert warning == f"warning: {error}"


def test_a_long_table_has_the_text_of_a_short_one(capsys):
    """Rich would take ten seconds for ten thousand runs."""
    states = ["state " + "\u4e2d" * (i % 3) for i in range(LONG + 1)]
    table = status_table(
        [Status(f"run-{i}", s, i, 9, 1.0, None, 1, 0, None) for i, s in enumerate(states)]
    )
    console.print(table)
    by_rich = capsys.readouterr().out.splitlines()
    print_rows(table)
    assert capsys.readouterr().out.splitlines() == [line.rstrip() for line in by_rich]


def test_the_command_to_run_by_hand_can_be_copied_into_a_shell(tmp_path):
    store = tmp_path / "100% $HOME"
    write_attempt(store / "run", 1, GONE)
    text = explanation(store, "run", {}, Queue(), ENTRY)
    assert shlex.split(text.split("\n")[-1])[-1] == str(store / "run")
