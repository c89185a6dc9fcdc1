"""One run in a worker: takeovers, lost ranks, stops without progress."""

import signal
import threading
import time

import pytest
import torch
from runs import TINY_RUN

from distill_bench.config.protocol import protocol_hash
from distill_bench.config.resolve import load_run
from distill_bench.store import claims
from distill_bench.store.claims import attempts, read_exit, try_claim
from distill_bench.store.files import write_json
from distill_bench.store.runs import run_state
from distill_bench.store.stop import StopRequest
from distill_bench.sweep.job import LOST_RANK, execute, record_stop
from distill_bench.sweep.local.workers import CLAIMED_ELSEWHERE, FAILED, STOPPED
from distill_bench.sweep.prepare import prepare_run, retry_references
from distill_bench.sweep.slurm.node import is_stuck


@pytest.mark.slow
def test_an_attempt_that_was_taken_over_ends_without_a_result(make_run, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.01)
    run = make_run("taken", student_updates=5000)

    def take_over() -> None:
        while not (run / "train.jsonl").is_file():
            time.sleep(0.05)
        (run / "attempts" / "002").mkdir()

    threading.Thread(target=take_over, daemon=True).start()
    assert execute(run) == CLAIMED_ELSEWHERE
    first = attempts(run)[0]
    assert read_exit(first)["status"] == "superseded"
    assert not (run / "result.json").exists()
    # the method's code, which may be outside the repository
    assert (first / "dmd2.py").is_file()
    checkpoints = run / "checkpoints"
    assert checkpoints.stat().st_mode == next(checkpoints.iterdir()).stat().st_mode


BROKEN = """
from dataclasses import dataclass
from typing import ClassVar

from distill_bench.evaluator import Evaluator


@dataclass(frozen=True)
class Broken(Evaluator):
    paper: ClassVar[str] = "none"
    version: ClassVar[int] = 1

    def scores(self, clips, references):
        raise ValueError("these clips have no score")
"""


@pytest.mark.slow
def test_a_missing_gpu_of_the_evaluators_ends_a_run_before_its_training(make_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = make_run("run", protocol=TINY_RUN["protocol"] | {"device": "cuda"})
    assert execute(run) == FAILED
    assert read_exit(attempts(run)[0])["error"].endswith("this process sees no GPU; use cpu")
    assert not (run / "train.jsonl").exists()


def test_a_run_whose_reference_rows_failed_fails_before_its_training(make_run, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    run = make_run(
        "late", protocol=TINY_RUN["protocol"] | {"evaluators": [f"{tmp_path}/broken.py:Broken"]}
    )
    config = load_run(run)
    with pytest.raises(ValueError, match="no score"):
        prepare_run(run)
    rows = run.parent / "references" / protocol_hash(config)
    assert execute(run) == FAILED
    assert read_exit(attempts(run)[-1])["error"] == "ValueError: these clips have no score"
    assert not (run / "train.jsonl").exists()
    assert len(attempts(rows)) == 2  # the failure may have passed, so the run has tried again
    try_claim(rows, {}).close("stopped")
    assert len(attempts(rows)) == 3
    retry_references(config, run.parent)
    assert len(attempts(rows)) == 3


def test_the_loss_of_a_rank_is_not_a_failure_of_the_run(tmp_path):
    message = (
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] "
        "Connection closed by peer [127.0.0.1]:25089"
    )
    assert LOST_RANK.search(message)
    assert not LOST_RANK.search("RuntimeError: the method is broken")
    for status, queued, alone in (("lost", "requeued", "lost"), ("error", "queued", "failed")):
        run = tmp_path / status
        try_claim(run, {}).close(status, error=message)
        assert run_state(run, queued=True) == queued
        assert run_state(run) == alone


def test_only_stops_without_progress_end_a_run(make_run, monkeypatch):
    """A job that has too little time would be requeued for ever."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run, stop = make_run("slow"), StopRequest()
    stop.signal = signal.SIGUSR2
    write_json(run / "train.json", {"status": "done"})
    (run / "samples").mkdir()
    rows = run.parent / "references" / protocol_hash(load_run(run))

    def stop_after(clips: int) -> int:
        try_claim(rows, {}).close("stopped")  # an attempt alone is no progress
        (run / "samples" / f"{clips}.npy").write_bytes(b"clip")
        return record_stop(run, try_claim(run, {}), stop)

    assert [stop_after(clips) for clips in (1, 2, 3, 4, 4)] == [STOPPED] * 5
    assert stop_after(4) == FAILED
    end = read_exit(attempts(run)[-1])
    assert end["kind"] == "timeout"
    assert end["error"].endswith(
        "in its evaluation, without progress: give it more time (cluster.hours)"
    )


def test_a_prepare_job_is_stuck_after_three_stops_with_the_same_bytes(tmp_path):
    made = (0, 1, 2, 2, 2)
    assert [is_stuck(tmp_path / "stops.jsonl", size, 3) for size in made] == [False] * 4 + [True]
