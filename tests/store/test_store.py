"""What the store's records withstand: garbage in them, a full disk, a writer that was thought dead."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from runs import TINY_RUN

from distill_bench.config.errors import ConfigError
from distill_bench.config.protocol import protocol_hash
from distill_bench.config.resolve import load_run
from distill_bench.config.sweep_file import load_sweep
from distill_bench.report.read_store import StoreReadError, read_sweep
from distill_bench.store import claims, runs
from distill_bench.store.claims import attempts, claim, end_of, once
from distill_bench.store.files import write_json
from distill_bench.store.runs import cancels, state
from distill_bench.store.stop import StopRequest
from distill_bench.sweep import provenance
from distill_bench.sweep import submit as slurm
from distill_bench.sweep.__main__ import _queue_again, main
from distill_bench.sweep.cancel import cancel
from distill_bench.sweep.job import ELSEWHERE, FAILED, LOST_RANK, STOPPED, _stopped, execute
from distill_bench.sweep.launch import Launch, run_local
from distill_bench.sweep.manifest import open_sweep
from distill_bench.sweep.queue import Queue, read_queue
from distill_bench.sweep.status import Known, read_statuses

RUN = "dmd2-s0-0"


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00garbage\x80", b"[]", b"{}", b'{"status": "done"', b'{"status": 5, "jobs": []}'],
)
@pytest.mark.parametrize(
    "name",
    [
        "result.json",
        "attempts/001/start.json",
        "attempts/001/exit.json",
        "../submissions/1.json",
        "../cancels/1.json",
    ],
)
def test_a_record_that_says_nothing_is_set_aside_and_the_others_are_read(
    name, content, tmp_path, capsys
):
    run, other = tmp_path / RUN, tmp_path / "dmd2-s1-0"
    write_json(run / "attempts" / "001" / "start.json", {"host": "another", "pid": 1})
    write_json(
        other / "result.json",
        {"run_id": other.name, "status": "done", "student_updates": 9, "train_seconds": 1.0},
    )
    path = (run / name).resolve()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    (run / "attempts" / "001" / "heartbeat").touch()
    os.utime(run / "attempts" / "001" / "heartbeat", (0, 0))
    found = read_statuses(
        tmp_path,
        {r.name: Known("dmd2", 9) for r in (run, other)},
        read_queue(tmp_path, on_slurm=False),
    )
    assert [s.state for s in found] == ["lost", "done"]
    if not (name.endswith("start.json") and content.startswith(b"{") and content.endswith(b"}")):
        assert path.with_name(f"{path.name}.corrupt").is_file() and not path.exists()
        assert f"{path} cannot be read; set aside" in capsys.readouterr().err


def test_a_manifest_that_says_nothing_is_none(tmp_path):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "torn.json").write_bytes(b"\x80\x00")
    with pytest.raises(StoreReadError, match="no sweep called 'torn'"):
        read_sweep("torn", tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A disk of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(argv, capture_output=True).returncode:
        pytest.skip("only root can make a disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    with pytest.raises(OSError), (disk / "filling").open("wb", buffering=0) as file:
        while file.write(bytes(512)):
            pass


def test_a_run_on_a_full_disk_says_so_and_one_that_cannot_begin_does_not_look_alive(
    small_disk, sweep_file, capsys
):
    run, late = small_disk / RUN, small_disk / "dmd2-s1-0"
    mine = claim(run, {})
    (late / "attempts").mkdir(parents=True)
    fill(small_disk)
    mine.close("error", error="x" * 9999 + "\nOSError: No space left on device", kind="disk_full")
    with pytest.raises(OSError, match="No space left"):
        claim(late, {})
    queue = Queue(jobs={late.name: ["7_0"]}, logs={"7_0": small_disk / "log"})
    first, second = read_statuses(
        small_disk, {r.name: Known("dmd2", 9) for r in (run, late)}, queue
    )
    assert (first.state, first.kind, first.note) == (
        "failed",
        "disk_full",
        "OSError: No space left on device",
    )
    assert (second.state, second.kind) == ("lost", "disk_full") and not attempts(late)
    argv = [
        str(sweep_file),
        "--cluster=local",
        f"--store={small_disk}",
        f"--out={small_disk / 'results'}",
    ]
    assert main([*argv, "--dry-run"]) == 0 and main([*argv, "--status", "--only", "seed == 0"]) == 3
    assert main([*argv, "--cancel"]) == 0 and "a local sweep goes on" in capsys.readouterr().out
    assert main(argv) == 2 and "cannot write into" in capsys.readouterr().err


@pytest.fixture
def sweep_file(tiny_wan: Path, tmp_path: Path) -> Path:
    path = tmp_path / "few.yaml"
    base = TINY_RUN | {"teacher": str(tiny_wan)}
    path.write_text(json.dumps({"question": "Does it end?", "base": base, "seeds": 2}))
    return path


def test_what_only_reads_does_not_ask_for_a_store_that_can_be_written(sweep_file, capsys):
    argv = [str(sweep_file), "--cluster=local", "--store=/proc/nowhere", "--out=/proc/nowhere"]
    for more, code in (
        (["--dry-run"], 0),
        (["--status"], 3),
        (["--status", "--only", "seed == 0"], 3),
        (["--explain", "s0"], 0),
    ):
        assert main([*argv, *more]) == code
    assert main(argv) == 2 and "cannot write into /proc/nowhere" in capsys.readouterr().err


def test_cancel_ends_a_local_sweep_wherever_its_driver_is(sweep_file, tmp_path, capsys):
    """Told by a file: the run in preparation is stopped, no other is started, and a later call goes on."""
    sweep = open_sweep(load_sweep(sweep_file), tmp_path / "runs", tmp_path / "results")

    def cancel_when_busy() -> None:
        while not list(sweep.store.glob("logs/*.txt")):
            time.sleep(0.05)
        cancel(sweep.store, sweep.runs, Queue())

    threading.Thread(target=cancel_when_busy, daemon=True).start()
    run_local(sweep, 1, Launch())
    out = capsys.readouterr().out
    assert "start references" in out and "start dmd2" not in out
    assert not any(attempts(sweep.store / run) for run in sweep.runs)
    assert set(cancels(sweep.store)[0]["runs"]) == set(sweep.runs) and not cancels(
        sweep.store, time.time()
    )


def test_cancel_does_not_end_the_other_runs_of_a_job(tmp_path):
    queue = Queue({"7_0": "RUNNING"}, {"a-s0-0": ["7_0"], "a-s1-0": ["6_0", "7_0"]})
    with pytest.raises(
        ConfigError, match=r"job 7_0 does a-s1-0 too \(runs_per_job\): choose all runs of a job"
    ):
        cancel(tmp_path, ["a-s0-0"], queue)
    assert not cancels(tmp_path), "nothing was done"


def test_a_cancelled_job_is_called_so_without_accounting(tmp_path):
    write_json(
        tmp_path / "submissions" / "1.json", {"jobs": {RUN: "7_0"}, "dependency": "afterany:6"}
    )
    runs.note_cancel(tmp_path, [RUN], ["7_0"])
    queue = read_queue(tmp_path, on_slurm=False)
    (status,) = read_statuses(tmp_path, {RUN: Known("dmd2", 9)}, queue)
    assert (status.state, status.kind) == ("lost", "cancelled") and queue.first == {"7_0": "6"}


def test_a_job_that_will_never_start_says_why(tmp_path):
    def note(reason: str) -> str:
        queue = Queue(
            {"7_0": "PENDING"}, {RUN: ["7_0"]}, {"7_0": tmp_path / "log"}, {"7_0": reason}
        )
        (status,) = read_statuses(tmp_path, {RUN: Known("dmd2", 9)}, queue)
        assert status.state == "queued"
        return status.note

    assert note("Priority") == note("Resources") == note("BeginTime") == ""
    for reason in (
        "PartitionNodeLimit",
        "PartitionConfig",
        "QOSMaxWallDurationPerJobLimit",
        "launch failed requeued held",
    ):
        assert note(reason) == f"SLURM will not start it: {reason}"


def test_an_attempt_that_was_taken_over_ends_quietly(make_run, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.01)
    run = make_run("taken", student_updates=5000)

    def take_over() -> None:
        while not (run / "train.jsonl").is_file():
            time.sleep(0.05)
        (run / "attempts" / "002").mkdir()

    threading.Thread(target=take_over, daemon=True).start()
    assert execute(run) == ELSEWHERE
    assert end_of(attempts(run)[0])["status"] == "superseded" and not (run / "result.json").exists()
    written = {path.name for path in (run / "attempts" / "001").iterdir()}
    assert "dmd2.py" in written, "the method's code, which may be in no commit"
    assert (run / "checkpoints").stat().st_mode == next(
        (run / "checkpoints").iterdir()
    ).stat().st_mode


def test_a_lost_rank_is_no_failure_of_the_run(tmp_path):
    said = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:25089"
    assert LOST_RANK.search(said) and not LOST_RANK.search("RuntimeError: the method is broken")
    for status, queued, alone in (("lost", "requeued", "lost"), ("error", "queued", "failed")):
        run = tmp_path / status
        claim(run, {}).close(status, error=said)
        assert (state(run, queued=True), state(run)) == (queued, alone)


def test_only_lives_that_bring_nothing_end_a_run_that_is_stopped_again_and_again(
    make_run, monkeypatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run, stop = make_run("slow"), StopRequest()
    stop.signal = signal.SIGUSR2
    write_json(run / "train.json", {"status": "done"})

    def life(clips: int) -> int:
        claim(run.parent / "references" / protocol_hash(load_run(run)), {}).close(
            "stopped"
        )  # it made nothing there
        (run / "samples").mkdir(exist_ok=True)
        (run / "samples" / f"{clips}.npy").write_bytes(b"clip")
        return _stopped(run, claim(run, {}), stop)

    assert [life(clips) for clips in (1, 2, 3, 4, 4)] == [STOPPED] * 5
    assert life(4) == FAILED
    end = end_of(attempts(run)[-1])
    assert (
        end["kind"] == "timeout"
        and "in its evaluation, with nothing new: give it more time (cluster.hours)" in end["error"]
    )
    assert [slurm._stuck(run / "lives.jsonl", made) for made in (0, 1, 2, 2, 2)] == [False] * 4 + [
        True
    ]


def test_whatever_a_run_goes_through_is_its_code(tmp_path, monkeypatch):
    root = tmp_path / "distill_bench"
    shutil.copytree(provenance.ROOT, root, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    assert {f"{name}.py" for name in provenance.APART} <= {path.name for path in root.iterdir()}
    monkeypatch.setattr(provenance, "ROOT", root)
    before = provenance.code_fingerprint("dmd2")
    for name, counts in (
        ("discriminator", True),
        ("config", True),
        ("masters", True),
        ("report", False),
        ("sweep", False),
    ):
        text = (root / f"{name}.py").read_text()
        (root / f"{name}.py").write_text(text + "\nCHANGED = 1\n")
        assert (provenance.code_fingerprint("dmd2") != before) == counts, name
        (root / f"{name}.py").write_text(text)


@pytest.mark.parametrize(
    "profiles, says",
    [
        ("lab: main", "clusters.yaml: profile lab = 'main': a mapping of settings"),
        ("lab:", "clusters.yaml: profile lab = None: a mapping of settings"),
        ("default: 3\nlab: {}", None),
        ("", "'lab' is not in .*clusters.yaml; known: none"),
        (
            "lab",
            "clusters.yaml: profiles are a mapping of names to settings of a cluster; found str",
        ),
        ("lab: {partitoin: low}", "clusters.yaml: profile lab: unknown key 'partitoin'"),
        ("lab: {gpus: many}", "clusters.yaml: profile lab: gpus = 'many'"),
    ],
)
def test_a_bad_file_of_profiles_is_named(profiles, says, sweep_file, tmp_path, monkeypatch):
    (tmp_path / "clusters.yaml").write_text(profiles)
    monkeypatch.setenv("DISTILL_BENCH_CLUSTERS", str(tmp_path / "clusters.yaml"))
    with pytest.raises(ConfigError, match=says or "profile default = 3: a mapping"):
        load_sweep(sweep_file, {"cluster.profile": "lab"} if says else {})


def test_a_watch_has_seconds_and_an_end(sweep_file, tmp_path, monkeypatch, capsys):
    argv = [
        str(sweep_file),
        "--cluster=local",
        f"--store={tmp_path / 'runs'}",
        f"--out={tmp_path / 'results'}",
    ]
    for more, says in (
        (["--watch=0"], "--watch 0"),
        (["--watch=-1"], "--watch -1"),
        (["--explain", ""], "is 2 runs of the sweep"),
    ):
        assert main([*argv, *more]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists(), "nothing was launched"
    monkeypatch.setattr("distill_bench.sweep.__main__.QUIET_SECONDS", 0.1)
    assert main([*argv, "--watch=0.1"]) == 3, "nobody works on it"
    monkeypatch.setenv("PATH", "")
    before = Queue({"7_0": "RUNNING"})
    assert (
        _queue_again(tmp_path, True, before) is before
        and "squeue does not answer" in capsys.readouterr().err
    )


def test_what_sbatch_says_is_passed_on_by_its_telling_lines():
    unknown = (
        "sbatch: unrecognized option '--foo=bar'\nTry \"sbatch --help\" for more information\n"
    )
    assert slurm._telling(unknown) == "unrecognized option '--foo=bar'"
    refused = "sbatch: error: Failed to validate job spec, --gpus < -N\nsbatch: error: Invalid generic resource\n"
    assert (
        slurm._telling(refused)
        == "Failed to validate job spec, --gpus < -N; Invalid generic resource"
    )


def test_what_another_process_makes_is_waited_for_or_not(tmp_path):
    made = []
    held = claim(tmp_path / "shared", {})
    once(tmp_path / "shared", lambda: bool(made), lambda: made.append("twice"), wait=False)
    assert made == [], "somebody else is at it"
    held.close("stopped")
    once(tmp_path / "shared", lambda: bool(made), lambda: made.append("here"), wait=False)
    assert made == ["here"]
