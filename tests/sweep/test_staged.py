"""Staged sweeps on the Gaussian teacher: order, failures, costs, rows, and what each stage gets."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_folders import GONE, write_attempt, write_result
from safetensors.torch import load_file

from distill_bench.config.sweep_file import load_sweep
from distill_bench.store.claims import attempts
from distill_bench.store.files import write_json
from distill_bench.store.runs import read_initial, read_result
from distill_bench.sweep.__main__ import main
from distill_bench.sweep.job import main as job
from distill_bench.sweep.launch import LaunchOptions, run_local, select_runs
from distill_bench.sweep.local.workers import Task, run_tasks
from distill_bench.sweep.manifest import OpenSweep, open_sweep
from distill_bench.sweep.slurm.queue import Queue
from distill_bench.sweep.slurm.submit import in_stages
from distill_bench.sweep.status import explanation, read_statuses
from distill_bench.train import checkpoint

BASE = {
    "teacher": "gaussian",
    "student_updates": 4,
    "fake_score_updates": 1,
    "batch_size": 8,
    "nfe": 1,
    "student_lr": 1e-12,  # students end where they start
    "evaluations": 2,
    "log_every": 1,
    "signals_every": None,
    "trackers": [],
    "threads": 1,
    "protocol": {"clips": 2, "teacher_steps": 2, "evaluators": ["exact_divergence"]},
}
BREAKS = '''
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from distill_bench.method import Loss, Method

@dataclass(frozen=True)
class First(Method):
    """Moves the student; raises while the file `broken` is there."""
    paper: ClassVar[str] = "none"
    has_fake_score: ClassVar[bool] = False
    broken: str = ""
    def student_loss(self, nets, batch):
        if Path(self.broken).exists():
            raise RuntimeError("the first stage is broken")
        x0 = nets.rollout(batch)
        return Loss({"size": x0.square().mean()}, x0)
'''


@pytest.fixture
def staged(tmp_path: Path) -> Callable[..., Path]:
    """Write a sweep in two stages."""

    def write(**keys) -> Path:
        (tmp_path / "first.py").write_text(BREAKS)
        method = {"name": f"{tmp_path}/first.py:First", "broken": str(tmp_path / "broken")}
        data = {
            "question": "Where should students start?",
            "base": BASE,
            "stages": {"first": {"method": method, "student_lr": 0.1, "batch_size": 16}},
            "grid": {"method": ["dmd2"], "init": [None, "first"]},
        }
        path = tmp_path / "staged.yaml"
        path.write_text(json.dumps(data | keys))
        return path

    return write


def arguments(path: Path, *more: str) -> list[str]:
    folders = [f"--store={path.parent / 'runs'}", f"--out={path.parent / 'results'}"]
    return [str(path), *folders, *more]


def opened(path: Path) -> tuple[OpenSweep, str, str, str]:
    """The sweep, and its runs: from the teacher, from the first stage, and that stage."""
    sweep = open_sweep(load_sweep(path), path.parent / "runs", path.parent / "results")
    plain, second, first = sweep.runs
    assert sweep.runs[second].init_run == first
    return sweep, plain, second, first


def notes(sweep: OpenSweep) -> dict[str, tuple[str, str]]:
    statuses = read_statuses(sweep.store, sweep.entries, Queue())
    return {s.run: (s.state, s.note) for s in statuses}


@pytest.mark.slow
def test_a_second_stage_waits_for_the_first_starts_from_its_student_and_states_its_cost(
    staged, tmp_path, capsys
):
    path = staged()
    (tmp_path / "broken").touch()
    sweep, plain, second, first = opened(path)
    sweep.write()
    run_local(sweep, 2, LaunchOptions())
    waits = ("missing", f"waits for {first}, which is failed")
    assert notes(sweep)[second] == waits
    assert notes(sweep)[plain][0] == "done"
    assert not attempts(sweep.store / second)
    assert job([str(sweep.store / second)]) == 1
    assert f"{second} {waits[1]}" in capsys.readouterr().out
    assert notes(sweep)[second] == waits

    (tmp_path / "broken").unlink()
    command = arguments(path, "--cluster=debug", "--retry-failed", "--only=init == 'first'")
    assert main(command) == 0, "--only includes the first stage"
    middle, end = (load_file(p) for p in checkpoint.students(sweep.store / first).values())
    student = load_file(checkpoint.students(sweep.store / second)[4])
    for name, value in end.items():
        torch.testing.assert_close(student[name], value, rtol=0, atol=1e-6)
        assert (middle[name] - value).abs().max() > 1e-3

    lines = csv.DictReader((tmp_path / "results" / "staged" / "runs.csv").open())
    cost = {line["run_id"]: float(line["cost_forward_equivalents"] or 0) for line in lines}
    assert cost[second] == pytest.approx(cost[plain] + 2 * cost[first])
    lines = csv.DictReader((tmp_path / "results" / "staged" / "checkpoints.csv").open())
    costs = [float(x["cost_forward_equivalents"]) for x in lines if x["run_id"] == second]
    assert costs == pytest.approx([cost[plain] / 2 + 2 * cost[first], cost[second]])
    table = (tmp_path / "results" / "staged" / "table.md").read_text()
    assert "| DMD2, from first |" in table
    assert "| DMD2 |" in table
    assert "cost and time of 1 runs include those of the runs from whose students" in table
    budget = f"All rows at a training cost of {cost[plain]:,.6g} forward equivalents"
    assert budget in table, "the first stage, which ends early, does not set the budget"

    assert not any(s.stale for s in read_statuses(sweep.store, sweep.entries, Queue()))
    result = read_result(sweep.store / first)
    assert result["student_content"] == read_initial(sweep.store / second)["content"]
    write_json(sweep.store / first / "result.json", result | {"student_content": "another"})
    stale = {s.run for s in read_statuses(sweep.store, sweep.entries, Queue()) if s.stale}
    assert stale == {second}


def test_a_launch_selects_the_runs_whose_start_is_there_or_on_its_way(staged):
    path = staged()
    sweep, plain, second, first = opened(path)
    options = LaunchOptions()

    def selected(sweep: OpenSweep = sweep, queue: Queue | None = None) -> set[str]:
        return set(select_runs(sweep, queue or Queue(), options))

    chosen = select_runs(sweep, Queue(), options)
    assert set(chosen) == {plain, second, first}
    assert chosen.index(first) < chosen.index(second)
    alone = sweep.only("init == 'first'", initial=False)
    assert list(alone.runs) == [second]
    assert set(sweep.only("init == 'first'").runs) == {second, first}
    assert selected(alone) == set()
    queued = Queue({"7": "PENDING"}, {first: ["7"]}, {"7": path})
    assert selected(queue=queued) == {plain, second}
    write_attempt(sweep.store / first, 1, GONE, {"status": "error", "error": "E", "kind": "x"})
    assert selected() == {plain}
    run_local(alone, 1, options)  # returns: there is nothing to wait for
    write_result(sweep.store / first, status="collapsed")
    assert selected() == {plain}
    assert notes(sweep)[second] == ("missing", f"waits for {first}, which is collapsed")
    jobs = Queue({}, {second: ["8"]}, {"8": path})
    text = explanation(sweep.store, second, {}, jobs, sweep.entries[second])
    assert f"init      the student of {first}\n" in text
    (status,) = read_statuses(sweep.store, {second: sweep.entries[second]}, jobs)
    assert status.state == "missing", "its job found no student and ended"
    write_result(sweep.store / first)
    assert selected() == {plain, second}


def test_a_launch_ends_with_one_line_if_no_run_that_it_selects_can_start(
    staged, monkeypatch, capsys
):
    """Were the selection of runs wrong about a stage, its runs would be passed over for ever."""
    sweep, _, second, first = opened(staged())
    write_attempt(sweep.store / first, 1, GONE, {"status": "error", "error": "E", "kind": "x"})
    calls = []

    def all_ready(sweep: OpenSweep, runs, in_progress=None) -> list[str]:
        calls.append(1)
        assert len(calls) < 6, "the launch goes round in circles"
        return list(runs)

    monkeypatch.setattr("distill_bench.sweep.launch._in_stages", all_ready)
    # no task starts at all
    monkeypatch.setattr("distill_bench.sweep.launch.missing_artefacts", lambda sweep, todo: {})
    run_local(sweep.only("init == 'first'"), 1, LaunchOptions())
    warning = f"1 runs cannot start: {second} waits for {first}, which is failed"
    assert warning in " ".join(capsys.readouterr().out.split())
    assert not attempts(sweep.store / second)


def test_an_initial_run_outside_the_sweep_must_be_done_and_fit(staged, tmp_path, capsys):
    other = "first-s0-0123456789ab"
    path = staged(stages={}, grid={"method": ["dmd2"], "init": [other]})
    command = arguments(path, "--cluster=debug")
    assert main(command) == 2
    assert f"{tmp_path / 'runs' / other} is not a run folder" in capsys.readouterr().err
    config = load_sweep(path).expand()[0]
    folder = tmp_path / "runs" / other
    write_json(folder / "run.yaml", config.model_dump(mode="json"))
    assert main(command) == 2
    assert f"init {other}: this run is missing" in capsys.readouterr().err
    write_result(folder)
    write_json(folder / "run.yaml", config.model_dump(mode="json") | {"teacher_hash": "abc"})
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"init {other}: its teacher is gaussian (content abc)" in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "runs").glob("dmd2-*"))


def test_a_task_that_is_not_ready_waits_for_another_to_end_and_is_left_if_none_helps(tmp_path):
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()"
    made = {name: tmp_path / name for name in "abc"}
    argv = {name: [sys.executable, "-c", code, str(path)] for name, path in made.items()}
    needs = {"a": "b", "b": None, "c": "nothing"}

    def ready(task: Task) -> bool:
        needed = needs[task.name]
        return needed is None or (tmp_path / needed).exists()

    tasks = [Task(name, argv[name], tmp_path / f"{name}.txt") for name in "abc"]
    run_tasks(tasks, 2, ready=ready)
    assert [task.exit_code for task in tasks] == [0, 0, None]
    assert not made["c"].exists()


def test_runs_are_submitted_in_stages():
    runs = [Path(name) for name in ("plain", "first", "waits for a queued job", "second", "third")]
    initial = {"second": "first", "third": "second", "waits for a queued job": "elsewhere"}
    stages = [[run.name for run in stage] for stage in in_stages(runs, initial)]
    assert stages == [["plain", "first"], ["waits for a queued job", "second"], ["third"]]
