"""Claims: one process per folder, takeover of dead attempts, full disks, shared artefacts."""

import errno
import json
from pathlib import Path

import pytest
from run_folders import ELSEWHERE, write_attempt

from distill_bench.store import files
from distill_bench.store.claims import STALE_SECONDS, attempts, once, read_exit, try_claim
from distill_bench.store.stop import Stopped


def test_a_folder_is_claimed_once_until_the_claim_is_closed(tmp_path):
    first = try_claim(tmp_path, {"command": "x"})
    assert first is not None
    assert try_claim(tmp_path, {}) is None
    first.close("stopped", student_updates=3)
    assert read_exit(first.attempt)["student_updates"] == 3
    second = try_claim(tmp_path, {})
    assert [path.name for path in attempts(tmp_path)] == ["001", "002"]
    assert second.is_newest()
    assert not first.is_newest()
    second.close("done")


@pytest.mark.parametrize(
    ("heartbeat_age", "claimed"), [(STALE_SECONDS / 2, False), (2 * STALE_SECONDS, True)]
)
def test_an_attempt_on_another_host_is_dead_once_its_heartbeat_is_old(
    heartbeat_age, claimed, tmp_path
):
    write_attempt(tmp_path, 1, ELSEWHERE, heartbeat_age=heartbeat_age)
    claim = try_claim(tmp_path, {})
    assert (claim is not None) == claimed
    if claim is not None:
        claim.close("done")


def test_a_requeued_job_takes_over_its_earlier_attempt_at_once(tmp_path, monkeypatch):
    write_attempt(tmp_path, 1, ELSEWHERE | {"job": "7_3", "restart": 0})
    assert try_claim(tmp_path, {}) is None
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert try_claim(tmp_path, {}) is None, "the job was not requeued"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    claim = try_claim(tmp_path, {})
    assert claim is not None
    assert claim.attempt.name == "002"
    claim.close("done")


def test_a_claim_that_cannot_be_recorded_leaves_no_attempt(tmp_path, monkeypatch):
    """An attempt without a worker would look alive until its heartbeat is old."""

    def disk_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        try_claim(tmp_path, {})
    assert attempts(tmp_path) == []


def test_a_shared_artefact_is_made_once_and_other_processes_may_skip_waiting(tmp_path):
    made = []
    claim = try_claim(tmp_path, {})
    once(tmp_path, lambda: bool(made), lambda: made.append("twice"), wait=False)
    assert made == []
    claim.close("stopped")
    once(tmp_path, lambda: bool(made), lambda: made.append("once"))
    once(tmp_path, lambda: bool(made), lambda: made.append("twice"))
    assert made == ["once"]


def test_an_artefact_that_failed_is_made_by_the_next_process(tmp_path):
    def fail() -> None:
        raise ValueError("no clips")

    with pytest.raises(ValueError, match="no clips"):
        once(tmp_path, lambda: False, fail)
    assert read_exit(attempts(tmp_path)[-1])["error"] == "ValueError: no clips"
    made: list[Path] = []
    once(tmp_path, lambda: bool(made), lambda: made.append(tmp_path))
    assert made


def test_an_artefact_whose_process_is_stopped_has_not_failed(tmp_path):
    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        once(tmp_path, lambda: False, stop)
    assert read_exit(attempts(tmp_path)[-1])["status"] == "stopped"


def test_only_the_first_rank_to_end_an_attempt_writes_its_exit_record(tmp_path):
    claim = try_claim(tmp_path, {})
    (claim.attempt / "exit.json").write_text(json.dumps({"status": "lost"}))
    claim.close("error", error="RuntimeError: connection closed")
    assert read_exit(claim.attempt) == {"status": "lost"}
