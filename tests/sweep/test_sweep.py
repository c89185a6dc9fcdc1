"""A sweep end to end on a tiny pipeline of Wan's real classes: workers, kills, failures, tables."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import TINY_RUN, assert_same_results, workers

from distill_bench.config.cluster import ClusterConfig
from distill_bench.config.identity import cost_key
from distill_bench.config.resolve import resolve
from distill_bench.config.sweep_file import load_sweep
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.store.claims import attempts
from distill_bench.store.files import read_jsonl
from distill_bench.store.machine import usable_cores
from distill_bench.sweep.__main__ import main
from distill_bench.sweep.launch import (
    LaunchOptions,
    in_launch_order,
    local_slots,
    run_debug,
    run_local,
)
from distill_bench.sweep.manifest import OpenSweep, open_sweep
from distill_bench.sweep.provenance import hardware
from distill_bench.train import checkpoint

ROOT = Path(__file__).parents[2]
NAME = "tiny2.1_0.1b"  # with dots, as names of models have
OWN = '''
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from distill_bench.method import Loss, Method, renoise, toward

@dataclass(frozen=True)
class Own(Method):
    """The score difference, scaled; raises while the file `broken` is there."""
    paper: ClassVar[str] = "none"
    scale: float = 1.0
    broken: str = ""
    def student_loss(self, nets, batch):
        if self.broken and Path(self.broken).exists():
            raise RuntimeError("the method is broken")
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0.detach(), through_fake_score=False)
        return Loss({"matching": toward(x0, self.scale * (scores.x0_fake - scores.x0_teacher))}, x0)
'''


@pytest.fixture
def sweep_yaml(tiny_wan: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a sweep file over a tiny base; keyword arguments replace its keys."""

    def write(base: dict | None = None, **keys) -> Path:
        protocol = TINY_RUN["protocol"] | {"clips": 4}
        tiny = TINY_RUN | {"student_updates": 4, "fake_score_updates": 1, "batch_size": 2}
        tiny |= {"teacher": str(tiny_wan), "evaluations": 2, "protocol": protocol}
        del tiny["method"]
        data = {
            "question": "Does it run?",
            "base": tiny | (base or {}),
            "grid": {"method": ["dmd2"]},
        }
        path = tmp_path / f"{NAME}.yaml"
        path.write_text(json.dumps(data | keys))  # JSON is YAML
        return path

    return write


def arguments(path: Path, where: Path, *more: str, cluster: str = "local") -> list[str]:
    folders = [f"--store={where / 'runs'}", f"--out={where / 'results'}"]
    return [str(path), f"--cluster={cluster}", *folders, *more]


def rows(where: Path) -> list[dict[str, str]]:
    """Lines of runs.csv."""
    return list(csv.DictReader((where / "results" / NAME / "runs.csv").open()))


def row_states(where: Path) -> set[str]:
    return {row["status"] for row in rows(where)}


@pytest.mark.slow
def test_a_failed_run_waits_for_retry_failed_and_a_sweep_makes_its_tables_once(
    sweep_yaml, tmp_path, capsys
):
    (tmp_path / "own.py").write_text(OWN)
    broken = tmp_path / "broken"
    broken.touch()
    cell = {"method": f"{tmp_path}/own.py:Own", "method.broken": str(broken)}
    path = sweep_yaml(include=[cell], base={"student_updates": 2})
    assert main(arguments(path, tmp_path)) == 1
    assert row_states(tmp_path) == {"done", "failed", "reference"}
    out = capsys.readouterr().out
    assert "RuntimeError: the method is broken" in out
    assert "log.txt" in out
    broken.unlink()
    assert main(arguments(path, tmp_path)) == 1
    assert main(arguments(path, tmp_path, "--retry-failed=cuda_oom")) == 1
    assert main(arguments(path, tmp_path, "--retry-failed")) == 0

    references = {row["method"] for row in rows(tmp_path) if row["status"] == "reference"}
    assert {"teacher", "untrained", "noise"} <= references
    runs = [row for row in rows(tmp_path) if row["status"] != "reference"]
    assert {(row["method"], row["status"]) for row in runs} == {("dmd2", "done"), ("own", "done")}
    assert {row["hardware"] for row in runs} == {hardware()}
    for row in runs:
        assert float(row["motion"]) >= 0
        assert float(row["train_seconds"]) > 0
        run = tmp_path / "runs" / row["run_id"]
        assert list(checkpoint.students(run)) == [1, 2]
        assert not (run / "checkpoints").exists()
        assert (run / "samples" / "1" / "metrics.jsonl").is_file()
    results = tmp_path / "results" / NAME
    for name in ("table.csv", "table.md", "table.tex", "report.html"):
        assert (results / name).stat().st_size
    assert list((results / "figures").glob("*.png"))

    files = [p for p in (tmp_path / "runs").rglob("*") if p.is_file()]
    before = {p: p.stat().st_mtime_ns for p in files if p.parent.name != "sweeps"}
    assert main(arguments(path, tmp_path)) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert "start" not in capsys.readouterr().out.rpartition("at once on this machine")[2]


def test_a_sweep_whose_scores_share_no_table_is_refused_before_it_runs(
    sweep_yaml, tmp_path, capsys
):
    grid = {"method": ["dmd2"], "protocol.clips": [4, 6], "protocol.fps": [8.0, 16.0]}
    assert main(arguments(sweep_yaml(grid=grid), tmp_path)) == 2
    error = capsys.readouterr().err
    assert "the runs have 4 protocols" in error
    assert "the first two differ in fps 8.0 and 16.0: write one sweep per protocol" in error
    assert not list((tmp_path / "runs").glob("dmd2-*"))


def test_a_sweep_over_shifts_needs_a_reference_that_does_not_follow(sweep_yaml, tmp_path, capsys):
    grid = {"method": ["dmd2"], "shift": [1.0, 2.0]}
    assert main([*arguments(sweep_yaml(grid=grid), tmp_path), "--dry-run"]) == 2
    assert "or state protocol.teacher_shift" in capsys.readouterr().err
    stated = sweep_yaml(grid=grid | {"protocol.teacher_shift": [2.0]})
    assert main([*arguments(stated, tmp_path), "--dry-run"]) == 0


@pytest.mark.slow
def test_a_sweep_killed_and_started_again_ends_in_the_same_bits(sweep_yaml, tmp_path):
    path = sweep_yaml(base={"student_updates": 12}, seeds=2)
    # in this process, on one thread, as each of two workers has it
    assert main(arguments(path, tmp_path / "whole", cluster="debug")) == 0
    resumed = arguments(path, tmp_path / "killed", "--jobs", "2")
    store = tmp_path / "killed" / "runs"
    driver = subprocess.Popen(
        [sys.executable, "-m", "distill_bench.sweep", *resumed],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    while driver.poll() is None and not any(
        len(log.read_text().splitlines()) > 2 for log in store.glob("*/train.jsonl")
    ):
        time.sleep(0.01)
    for pid in workers(driver.pid):
        os.kill(pid, signal.SIGKILL)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert len(list(store.glob("*/result.json"))) < 2, "killed before the end"
    assert main(resumed) == 0
    assert_same_results(tmp_path / "whole" / "runs", store)


# --- on this machine ---


@pytest.mark.parametrize(
    ("cluster", "gpus", "expected"),
    [
        ({"gpus": 2}, "0,1,2,3", (2, 2)),
        ({"gpus": 8}, "0,1", (1, 2)),
        ({"nodes": 2, "gpus": 1}, "0,1", (1, 2)),
        ({"gpus": 1, "jobs": 3}, "0,1", (3, 1)),
        ({"gpus": 8}, "", (usable_cores(), 1)),
        ({"gpus": 8}, "-1", (usable_cores(), 1)),
        ({"tasks": 2, "jobs": 1}, "", (1, 2)),
    ],
)
def test_a_run_has_as_many_gpus_here_as_on_the_cluster(
    cluster, gpus, expected, monkeypatch, capsys
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert local_slots(ClusterConfig(**cluster)) == expected
    out = capsys.readouterr().out
    warning = "the sweep asks for 8 processes per run; this machine has 2 GPUs"
    assert (warning in out) == (cluster == {"gpus": 8} and gpus == "0,1")


@pytest.mark.slow
def test_two_processes_train_a_run_as_one_does(sweep_yaml, tmp_path):
    config = load_sweep(sweep_yaml(base={"precision": "float64"}))
    one, two = (
        open_sweep(config, tmp_path / name, tmp_path / "results") for name in ("one", "two")
    )
    for sweep in (one, two):
        sweep.write()
    run_debug(one, LaunchOptions())
    run_local(two, 1, LaunchOptions(), processes=2)
    (run,) = two.runs
    assert two.states() == one.states() == {run: "done"}
    assert len(attempts(two.store / run)) == 1
    curves = (read_jsonl(sweep.store / run / "train.jsonl") for sweep in (one, two))
    for a, b in zip(*curves, strict=True):
        assert b["student_loss"] == pytest.approx(a["student_loss"], rel=1e-9)
    log = (two.store / run / "log.txt").read_text()
    assert log.count("student update 4/4") == 1, "only rank 0 prints"


def test_the_local_queue_goes_seed_by_seed_with_the_longest_run_first(tmp_path):
    cells = {
        f"{method} {updates}": {"method": method, "fake_score_updates": updates}
        for method in ("dmd2", "sgmd")
        for updates in (1, 5)
    }
    runs = {
        f"{seed} {name}": resolve(cell | {"seed": seed})
        for seed in (1, 0)
        for name, cell in cells.items()
    }
    names = ["sgmd 5", "dmd2 5", "sgmd 1", "dmd2 1"]
    expected = [f"{seed} {name}" for seed in (0, 1) for name in names]
    assert in_launch_order(OpenSweep(None, runs, tmp_path, tmp_path), runs) == expected


# --- the preview ---


def test_a_preview_and_a_status_start_nothing(sweep_yaml, tmp_path, capsys):
    path = sweep_yaml(seeds=2)
    assert main(arguments(path, tmp_path, "--dry-run")) == 0
    assert main(arguments(path, tmp_path, "--status")) == 3
    out = capsys.readouterr().out
    assert out.count("dmd2-s1-") == 2
    assert "2 runs (2 missing), 2 to do" in out
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "options", [["--dry-run"], ["--set=protocol.evaluators=[exact_divergence]"]]
)
def test_cells_that_are_the_same_run_and_idle_conditions_are_named(
    options, sweep_yaml, tmp_path, capsys
):
    """In a preview, and in a launch, which is refused afterwards."""
    grid = {"method": ["dmd2"], "gradient_checkpointing": [False, True], "nfe": [1, 2, 4]}
    path = sweep_yaml(grid=grid, seeds=2, exclude=["nfe == 4", "method == 'dmd3'"])
    launched = "--dry-run" not in options
    assert main(arguments(path, tmp_path, *options)) == 2 * launched
    out, error = capsys.readouterr()
    assert "4 more cells are the same runs as others" in out
    assert "warning: exclude \"method == 'dmd3'\" removes no cell" in out
    assert "nfe == 4" not in out
    assert "4 runs (4 missing)" in out or "exact_divergence cannot score the clips" in error


def test_a_preview_prices_the_stages_of_runs_by_similar_ones(sweep_yaml, tmp_path, capsys):
    path = sweep_yaml(seeds=2, cluster={"gpus": 4})
    (config, *_) = load_sweep(path).expand()
    folder = tmp_path / "runs" / "dmd2-s9-abc"
    folder.mkdir(parents=True)
    result = {
        "run_id": folder.name,
        "status": "done",
        "student_updates": config.student_updates,
        "train_seconds": 900.0,
        "sample_seconds": 90.0,
        "evaluate_seconds": 450.0,
        "cost_key": cost_key(config),
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    assert main(arguments(path, tmp_path, "--dry-run")) == 0
    # 2 runs of 1350 s on 4 GPUs
    assert "similar runs: 3 GPU-hours (train 2, sample 0.2, evaluate 0.8)" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_preview_shows_the_job_of_a_sweep_that_names_a_cluster(sweep_yaml, tmp_path, capsys):
    path = sweep_yaml(cluster={"gpus": 8, "cpus": 12, "hours": 24})
    assert main(arguments(path, tmp_path, "--dry-run")) == 0
    assert {
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --time=1440",
    } <= set(capsys.readouterr().out.splitlines())
    assert not (tmp_path / "runs").exists()
