"""--cancel: local drivers, and jobs that several runs share."""

import threading
import time

import pytest

from distill_bench.config.errors import ConfigError
from distill_bench.config.sweep_file import load_sweep
from distill_bench.store.claims import attempts
from distill_bench.store.files import write_json
from distill_bench.store.runs import read_cancels, record_cancel
from distill_bench.sweep.cancel import cancel_runs
from distill_bench.sweep.launch import LaunchOptions, run_local
from distill_bench.sweep.manifest import open_sweep
from distill_bench.sweep.slurm.queue import Queue, read_queue
from distill_bench.sweep.status import ManifestEntry, read_statuses

RUN = "dmd2-s0-0"


@pytest.mark.slow
def test_cancel_ends_a_local_sweep_on_any_host(sweep_file, tmp_path, capsys):
    """The driver reads the record of the call, stops the prepare task and starts no run."""
    sweep = open_sweep(load_sweep(sweep_file), tmp_path / "runs", tmp_path / "results")

    def cancel_once_busy() -> None:
        while not list(sweep.store.glob("logs/*.txt")):
            time.sleep(0.05)
        cancel_runs(sweep.store, sweep.runs, Queue())

    threading.Thread(target=cancel_once_busy, daemon=True).start()
    run_local(sweep, 1, LaunchOptions())
    out = capsys.readouterr().out
    assert "start references" in out
    assert "start dmd2" not in out
    assert not any(attempts(sweep.store / run) for run in sweep.runs)
    assert set(read_cancels(sweep.store)[0]["runs"]) == set(sweep.runs)
    assert not read_cancels(sweep.store, since=time.time()), "a later call starts the runs again"


def test_a_job_shared_with_another_run_is_not_cancelled(tmp_path):
    queue = Queue({"7_0": "RUNNING"}, {"a-s0-0": ["7_0"], "a-s1-0": ["6_0", "7_0"]})
    with pytest.raises(ConfigError, match=r"job 7_0 also does a-s1-0 \(cluster.runs_per_job\)"):
        cancel_runs(tmp_path, ["a-s0-0"], queue)
    assert not read_cancels(tmp_path), "nothing was done"


def test_a_cancelled_job_is_recognised_without_accounting(tmp_path):
    submission = {"jobs": {RUN: "7_0"}, "dependency": "afterany:6"}
    write_json(tmp_path / "submissions" / "1.json", submission)
    record_cancel(tmp_path, [RUN], ["7_0"])
    queue = read_queue(tmp_path, on_slurm=False)
    (status,) = read_statuses(tmp_path, {RUN: ManifestEntry("dmd2", 9)}, queue)
    assert (status.state, status.kind) == ("lost", "cancelled")
    assert queue.prepared_by == {"7_0": "6"}
