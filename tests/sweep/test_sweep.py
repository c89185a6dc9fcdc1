"""A sweep end to end on a tiny pipeline of Wan's real classes: worker processes, kills, failures, tables."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import assert_same_results, workers

from distill_bench.config.cluster import ClusterConfig
from distill_bench.config.resolve import resolve
from distill_bench.config.sweep_file import load_sweep
from distill_bench.store.claims import attempts
from distill_bench.store.files import read_jsonl
from distill_bench.sweep.__main__ import main
from distill_bench.sweep.launch import Launch, _place_in_queue, run_debug, run_local, shares
from distill_bench.sweep.manifest import open_sweep
from distill_bench.sweep.provenance import hardware
from distill_bench.train import checkpoint

ROOT = Path(__file__).parents[2]
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
def sweep_yaml(tiny_wan: Path, tmp_path: Path):
    """Writes a sweep file over a tiny base."""

    def write(name: str = "tiny2.1_0.1b", **keys) -> Path:
        base = {
            "teacher": str(tiny_wan),
            "student_updates": 4,
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
            "protocol": {"clips": 4, "teacher_steps": 2, "evaluators": ["motion"]},
        }
        data = {
            "question": "Does it run?",
            "base": base | keys.pop("base", {}),
            "grid": {"method": ["dmd2"]},
        } | keys
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(data))  # JSON is YAML
        return path

    return write


def command(path: Path, where: Path, *more: str) -> list[str]:
    return [
        str(path),
        "--cluster",
        "local",
        "--store",
        str(where / "runs"),
        "--out",
        str(where / "results"),
        *more,
    ]


def rows(where: Path, name: str = "tiny2.1_0.1b") -> list[dict[str, str]]:
    return list(csv.DictReader((where / "results" / name / "runs.csv").open()))


def test_a_sweep_makes_its_tables_and_a_second_call_makes_nothing_again(
    sweep_yaml, tmp_path, capsys
):
    (tmp_path / "own.py").write_text(OWN)
    path = sweep_yaml(
        grid={"method": ["dmd2", f"{tmp_path}/own.py:Own"]}, base={"student_updates": 2}
    )
    assert main(command(path, tmp_path)) == 0
    runs = [row for row in rows(tmp_path) if row["status"] != "reference"]
    assert {(row["method"], row["status"]) for row in runs} == {("dmd2", "done"), ("own", "done")}
    assert all(float(row["motion"]) >= 0 and float(row["train_seconds"]) > 0 for row in runs)
    assert {row["hardware"] for row in runs} == {hardware()}
    assert {"teacher", "untrained", "noise"} <= {
        row["method"] for row in rows(tmp_path) if row["status"] == "reference"
    }
    folder = tmp_path / "results" / "tiny2.1_0.1b"
    assert all(
        (folder / name).stat().st_size
        for name in ("table.csv", "table.md", "table.tex", "report.html")
    )
    assert list((folder / "figures").glob("*.png"))
    for row in runs:
        run = tmp_path / "runs" / row["run_id"]
        assert list(checkpoint.students(run)) == [1, 2] and not (run / "checkpoints").exists()
        assert (run / "samples" / "1" / "metrics.jsonl").is_file()
    before = {
        p: p.stat().st_mtime_ns
        for p in (tmp_path / "runs").rglob("*")
        if p.is_file() and p.parent.name != "sweeps"
    }
    assert main(command(path, tmp_path)) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert "start" not in capsys.readouterr().out.rpartition("at once on this machine")[2]


def test_a_sweep_whose_scores_could_share_no_table_is_refused_before_it_runs(
    sweep_yaml, tmp_path, capsys
):
    path = sweep_yaml(
        grid={"method": ["dmd2"], "protocol.clips": [4, 6], "protocol.fps": [8.0, 16.0]}
    )
    assert main(command(path, tmp_path)) == 2
    said = capsys.readouterr().err
    assert (
        "its runs are of 4 protocols" in said
        and "the first two differ in fps 8.0 and 16.0: make a sweep of each" in said
    )
    assert not list((tmp_path / "runs").glob("dmd2-*"))


def test_a_sweep_killed_and_started_again_ends_in_the_same_bits(sweep_yaml, tmp_path):
    path = sweep_yaml(base={"student_updates": 12}, seeds=2)
    whole, store = command(path, tmp_path / "whole"), tmp_path / "killed" / "runs"
    whole[whole.index("local")] = (
        "debug"  # in this process, on one thread, as each of two workers has it
    )
    assert main(whole) == 0
    argv = [
        sys.executable,
        "-m",
        "distill_bench.sweep",
        *command(path, tmp_path / "killed", "--jobs", "2"),
    ]
    driver = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while driver.poll() is None and not any(
        len(p.read_text().splitlines()) > 2 for p in store.glob("*/train.jsonl")
    ):
        time.sleep(0.01)
    for pid in workers(driver.pid):
        os.kill(pid, signal.SIGKILL)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL and not all(
        (store / run.name / "result.json").exists() for run in store.glob("*-s*")
    )
    assert main(command(path, tmp_path / "killed", "--jobs", "2")) == 0
    assert_same_results(tmp_path / "whole" / "runs", tmp_path / "killed" / "runs")


def test_a_run_that_fails_leaves_the_others_alone_and_can_be_tried_again(
    sweep_yaml, tmp_path, capsys
):
    (tmp_path / "own.py").write_text(OWN)
    broken = tmp_path / "broken"
    broken.touch()
    method = {"method": f"{tmp_path}/own.py:Own", "method.broken": str(broken)}
    path = sweep_yaml(include=[method], base={"student_updates": 2})
    assert main(command(path, tmp_path)) == 1
    assert {row["status"] for row in rows(tmp_path)} == {"done", "failed", "reference"}
    out = capsys.readouterr().out
    assert "RuntimeError: the method is broken" in out and "log.txt" in out
    broken.unlink()
    assert main(command(path, tmp_path)) == 1, "a failed run waits for --retry-failed"
    assert main(command(path, tmp_path, "--retry-failed")) == 0
    assert {row["status"] for row in rows(tmp_path)} == {"done", "reference"}


@pytest.mark.parametrize(
    ("cluster", "gpus", "expected"),
    [
        ({"gpus": 2}, "0,1,2,3", (2, 2)),
        ({"gpus": 8}, "0,1", (1, 2)),
        ({"nodes": 2, "gpus": 1}, "0,1", (1, 2)),
        ({"gpus": 1, "jobs": 3}, "0,1", (3, 1)),
        ({"gpus": 8}, "", (os.cpu_count(), 1)),
        ({"tasks": 2, "jobs": 1}, "", (1, 2)),
    ],
)
def test_a_run_has_as_many_gpus_of_this_machine_as_of_a_cluster(
    cluster, gpus, expected, monkeypatch, capsys
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert shares(ClusterConfig(**cluster)) == expected
    said = "8 processes a run are asked for, here are 2 GPUs" in capsys.readouterr().out
    assert said == (cluster == {"gpus": 8} and gpus == "0,1")


def test_two_processes_of_this_machine_train_a_run_as_one_does(sweep_yaml, tmp_path):
    config = load_sweep(sweep_yaml(base={"precision": "float64"}))
    one, two = (
        open_sweep(config, tmp_path / name, tmp_path / "results") for name in ("one", "two")
    )
    for sweep in (one, two):
        sweep.write()
    run_debug(one, Launch())
    run_local(two, 1, Launch(), processes=2)
    (run,) = two.states()
    assert two.states() == one.states() == {run: "done"} and len(attempts(two.store / run)) == 1
    for a, b in zip(
        *(read_jsonl(sweep.store / run / "train.jsonl") for sweep in (one, two)), strict=True
    ):
        assert b["student_loss"] == pytest.approx(a["student_loss"], rel=1e-9)
    said = (two.store / run / "log.txt").read_text()
    assert said.count("student update 4/4") == 1, "one of the two speaks"


def test_plan_and_status_start_nothing(sweep_yaml, tmp_path, capsys):
    path = sweep_yaml(seeds=2)
    assert main(command(path, tmp_path, "--dry-run")) == 0
    assert main(command(path, tmp_path, "--status")) == 3, "there is work left"
    out = capsys.readouterr().out
    assert out.count("dmd2-s1-") == 2 and "2 runs (2 missing), 2 to do" in out
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


def test_a_plan_says_which_cells_are_one_run(sweep_yaml, tmp_path, capsys):
    path = sweep_yaml(
        grid={"method": ["dmd2"], "gradient_checkpointing": [False, True], "nfe": [1, 2]}, seeds=2
    )
    assert main(command(path, tmp_path, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert (
        "4 more cells are runs of these: they differ in nothing that changes a run's numbers" in out
        and "4 runs (4 missing)" in out
    )


def test_a_plan_shows_the_job_where_the_sweep_names_a_cluster(sweep_yaml, tmp_path, capsys):
    path = sweep_yaml(cluster={"gpus": 8, "cpus": 12, "hours": 24})
    assert main(command(path, tmp_path, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert {
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --time=1440",
    } <= set(out.splitlines())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "more, says",
    [
        (["--set", "student_ltr=1"], "did you mean 'student_lr'"),
        (["--set", "student_lr"], "write key=value"),
        (["--set", "student_lr=fast"], "student_lr = 'fast'"),
        (["--set", "teacher=/nowhere"], "no teacher '/nowhere'"),
        (["--set", "seeds=0"], "the grid is empty"),
        (["--jobs", "0"], "--jobs 0"),
        (["--out", "/proc/nowhere"], "cannot write into /proc/nowhere"),
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_2(more, says, sweep_yaml, tmp_path, capsys):
    assert main([*command(sweep_yaml(), tmp_path), *more]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not list(tmp_path.glob("runs/*")), "nothing was started"


def test_a_local_queue_has_seed_by_seed_the_longest_run_first():
    cells = {
        f"{method} {k}": {"method": method, "fake_score_updates": k}
        for method in ("dmd2", "sgmd")
        for k in (1, 5)
    }
    runs = [
        (seed, name, resolve(cell | {"seed": seed}))
        for seed in (1, 0)
        for name, cell in cells.items()
    ]
    order = [
        (seed, name) for seed, name, config in sorted(runs, key=lambda run: _place_in_queue(run[2]))
    ]
    assert [seed for seed, _ in order] == [0] * 4 + [1] * 4
    assert (
        [name for _, name in order[:4]]
        == [name for _, name in order[4:]]
        == ["sgmd 5", "dmd2 5", "sgmd 1", "dmd2 1"]
    )
