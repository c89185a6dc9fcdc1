"""Records of a training: which lines, students and checkpoints are due, on which rank, and when."""

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill_bench.config.resolve import load_run
from distill_bench.networks.pipeline import load_pipeline
from distill_bench.store.files import append_jsonl, read_json, read_jsonl
from distill_bench.testing.runs import Runs
from distill_bench.train import __main__ as command
from distill_bench.train import checkpoint
from distill_bench.train.assemble import assemble
from distill_bench.train.loop import finish, train, update
from distill_bench.train.processes import OneProcess
from distill_bench.train.records import Records, TrainingProgress

CPU = torch.device("cpu")
FIELDS = {
    "teacher": "gaussian",
    "data": None,
    "student_updates": 5,
    "log_every": 2,
    "signals_every": 4,
    "checkpoint_every": 2,
    "evaluations": 2,
    "fake_score_updates": 3,
    "student_lr": 1e-2,
    "fake_score_lr": 5e-3,
}


@pytest.fixture
def make(tmp_path):
    runs = Runs("dmd2", tmp_path)
    return lambda **fields: runs.make(**FIELDS | fields)


def updates(run_dir: Path) -> dict[str, list[int]]:
    """Student updates of each kind of record."""
    lines = read_jsonl(run_dir / "train.jsonl")
    return {
        "lines": [line["student_updates"] for line in lines],
        "signals": [line["student_updates"] for line in lines if "x0_gradient_norm/kl" in line],
        "students": list(checkpoint.students(run_dir)),
        "checkpoints": [int(folder.name) for folder in checkpoint.folders(run_dir)],
    }


def test_records_are_written_when_they_are_due_and_at_the_end(make, capsys):
    run_dir = make()
    began = time.perf_counter()
    summary = train(run_dir, stop=lambda: False)
    elapsed = time.perf_counter() - began
    assert updates(run_dir) == {
        "lines": [2, 4, 5],
        "signals": [4],
        "students": [3, 5],
        "checkpoints": [4, 5],
    }
    assert summary == read_json(run_dir / "train.json")
    assert summary["status"] == "done"
    assert summary["reason"] is None
    assert summary["student_updates"] == 5
    assert summary["samples_seen"] == 5 * 4
    lines = read_jsonl(run_dir / "train.jsonl")
    assert {line["rho"] for line in lines} == {3 * 5e-3 / 1e-2}
    costs = [line["cost_forward_equivalents"] for line in lines]
    assert costs[-1] == summary["cost_forward_equivalents"]
    assert costs == pytest.approx([n / 5 * costs[-1] for n in (2, 4, 5)], rel=0.2)
    assert 0 < lines[0]["seconds"] < lines[-1]["seconds"] == summary["train_seconds"] < elapsed
    printed = [line for line in capsys.readouterr().out.splitlines() if "student update" in line]
    assert [line.split()[2] for line in printed] == ["2/5", "4/5", "5/5"]
    assert f"rho {lines[0]['rho']:.4g}" in printed[0]
    never = make(signals_every=None, fake_score="exact", student_updates=2)
    train(never)
    assert updates(never)["signals"] == []
    assert "rho" not in read_jsonl(never / "train.jsonl")[0]


def test_a_checkpoint_is_written_after_the_student_of_its_update(make, monkeypatch):
    """A run that is killed between the two writes would resume behind an evaluation it lacks."""
    run_dir, save, there = make(checkpoint_every=1), Records.save, {}

    def saved(records: Records) -> None:
        there[records.run.student_updates] = list(checkpoint.students(run_dir))
        save(records)

    monkeypatch.setattr(Records, "save", saved)
    train(run_dir, stop=lambda: False)
    assert there == {1: [], 2: [], 3: [3], 4: [3], 5: [3, 5]}


def test_a_stop_saves_a_checkpoint_at_once_but_not_after_the_last_update(make):
    whole, run_dir = make(), make()
    train(whole)
    asked = iter([False, False, True])
    summary = train(run_dir, stop=lambda: next(asked))
    assert summary["status"] == "stopped"
    assert updates(run_dir) == {"lines": [2], "signals": [], "students": [3], "checkpoints": [2, 3]}
    seconds = summary["train_seconds"]
    summary = train(run_dir)
    assert summary["status"] == "done"
    assert summary["train_seconds"] > seconds
    assert updates(run_dir) == updates(whole) | {"checkpoints": [4, 5]}
    assert summary["cost"] == read_json(whole / "train.json")["cost"]
    at_end = make(student_updates=1)
    assert train(at_end, stop=lambda: True)["status"] == "done"


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(make):
    run_dir = make()
    asked = iter([False, False, True])
    train(run_dir, stop=lambda: next(asked))
    kept = read_jsonl(run_dir / "train.jsonl")
    append_jsonl(run_dir / "train.jsonl", {"student_updates": 3})
    append_jsonl(run_dir / "train.jsonl", {"student_updates": 4})
    run = assembled(run_dir)
    records = Records(run, run_dir)
    records.resume()
    assert read_jsonl(run_dir / "train.jsonl") == [*kept, {"student_updates": 3}]
    assert run.student_updates == 3
    assert run.ledger.counts == read_json(run_dir / "checkpoints" / "3" / "state.json")["cost"]
    assert run.seconds > 0


class Rank(OneProcess):
    """One rank of two, whose weights differ from the other's in the roles `different`."""

    def __init__(self, rank: int, different: tuple[str, ...] = ()) -> None:
        super().__init__(CPU, world=2)
        self.rank = rank
        self.different = list(different)
        self.compared: dict[str, float] = {}
        self.waits: list[Callable[[], object]] = []  # called when the rank waits for the other

    def unequal(self, values):
        self.compared = dict(values)
        return self.different

    def wait(self):
        for check in self.waits:
            check()


def assembled(run_dir: Path, processes: OneProcess | None = None):
    pipeline = load_pipeline("gaussian", CPU)
    return assemble(load_run(run_dir), pipeline, processes or OneProcess(CPU), {})


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_writes(rank, make, capsys):
    run_dir = make(student_updates=2)
    append_jsonl(run_dir / "train.jsonl", {"student_updates": 9})
    run = assembled(run_dir, Rank(rank))
    records = Records(run, run_dir)
    records.resume()
    finish(run, records)
    written = {path.name for path in run_dir.iterdir()} - {"tracking"}
    everything = {"run.yaml", "train.jsonl", "train.json", "checkpoints", "students"}
    assert written == (everything if rank == 0 else {"run.yaml", "train.jsonl"})
    lines = [line["student_updates"] for line in read_jsonl(run_dir / "train.jsonl")]
    assert lines == ([2] if rank == 0 else [9])
    assert ("student update" in capsys.readouterr().out) == (rank == 0)


def test_ranks_with_other_weights_stop_before_a_checkpoint(make):
    run_dir = make()
    processes = Rank(0, ("fake_score",))
    run = assembled(run_dir, processes)
    update(run)
    with pytest.raises(RuntimeError, match="ranks have different values of: fake_score$"):
        Records(run, run_dir).save()
    with pytest.raises(RuntimeError, match="ranks have different values of: fake_score$"):
        Records(run, run_dir).resume()
    assert checkpoint.folders(run_dir) == []
    sums = {
        role: sum(float(p.detach().double().sum()) for p in net.parameters())
        for role, net in run.trained.items()
    }
    assert processes.compared == pytest.approx(sums | {"student_updates": 1})


def test_no_rank_goes_on_before_a_checkpoint_is_written(make):
    run_dir, processes, seen = make(), Rank(0), []
    processes.waits.append(lambda: seen.append(updates(run_dir)["checkpoints"]))
    run = assembled(run_dir, processes)
    update(run)
    Records(run, run_dir).save()
    assert seen == [[1]]


def test_an_uncommon_end_is_recorded_with_its_reason(make, monkeypatch):
    run_dir, save = make(student_lr=1e6, student_updates=20), checkpoint.save

    def save_before_the_summary(folder: Path, *arguments) -> None:
        assert not (folder / "train.json").exists(), "a killed run would end without its weights"
        save(folder, *arguments)

    monkeypatch.setattr(checkpoint, "save", save_before_the_summary)
    summary = train(run_dir)
    assert summary["status"] == "collapsed"
    assert summary["reason"].endswith(f"at student update {summary['student_updates']}")
    assert [int(f.name) for f in checkpoint.folders(run_dir)][-1] == summary["student_updates"]
    weights = load_file(checkpoint.folders(run_dir)[-1] / "weights.safetensors")
    assert any(name.startswith("student.") for name in weights)


def test_trackers_receive_the_scalars(make):
    run_dir = make(student_updates=2, trackers=["tensorboard"])
    run = assembled(run_dir)
    records = Records(run, run_dir)
    writer = records.accelerator.get_tracker("tensorboard", unwrap=True)
    finish(run, records)
    assert writer.all_writers is None, "it is closed"
    logged = EventAccumulator(str(run_dir / "tracking" / "train")).Reload()
    lines = read_jsonl(run_dir / "train.jsonl")
    for name in ("student_loss", "rho"):
        points = [(point.step, point.value) for point in logged.Scalars(name)]
        assert points == [(n["student_updates"], pytest.approx(n[name])) for n in lines]
    plain = make(student_updates=2)
    train(plain)
    assert not list(plain.rglob("events.out*"))


def test_peak_memory_is_that_of_the_process_in_gib(make):
    run_dir = make(student_updates=1)
    summary = train(run_dir)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = int(status["VmHWM"].split()[0])
    assert summary["peak_memory_gib"] == pytest.approx(kib / 2**20, rel=0.05)


def test_peak_memory_of_a_gpu_is_what_torch_had_allocated_there(make, monkeypatch):
    run_dir = make()
    run = assembled(run_dir)
    run.processes = OneProcess(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7 * 2**30 // 3)
    assert Records(run, run_dir).summary()["peak_memory_gib"] == 2.333


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
    with TrainingProgress(8, shown=True) as progress:
        progress({"student_updates": 3, "loss": 0.123456, "rho": 2.0})
    assert capsys.readouterr().out == "student update 3/8  loss 0.1235  rho 2\n"
    with TrainingProgress(8, shown=False) as progress:
        progress({"student_updates": 3, "loss": 0.1})
    monkeypatch.setattr(sys, "stderr", Terminal())
    with TrainingProgress(8, shown=False) as progress:
        progress({"student_updates": 3, "loss": 0.1})
        assert progress.bar is None
    with TrainingProgress(8, shown=True) as progress:
        progress({"student_updates": 3, "loss": 0.1})
        (task,) = progress.bar.tasks
        assert (task.completed, task.total) == (3, 8)
        assert progress.bar.live.is_started
        shown = Console(file=io.StringIO(), width=80)
        shown.print(progress.bar)
        words = shown.file.getvalue().split()
        assert words[:2] == ["student", "updates"]
        assert "3/8" in words
    assert not progress.bar.live.is_started
    assert "student update" not in capsys.readouterr().out


def test_the_bar_lasts_as_long_as_the_training(make, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run_dir = make()
    records = Records(assembled(run_dir), run_dir)
    bar = records.progress.bar
    with records:
        assert bar.live.is_started
    assert not bar.live.is_started


def test_the_summary_of_a_finished_training_is_returned_without_training_again(make):
    run_dir = make(student_updates=1)
    first = train(run_dir)
    (run_dir / "train.json").write_text(json.dumps(first | {"train_seconds": 7.0}))
    assert train(run_dir)["train_seconds"] == 7.0
    (run_dir / "train.json").write_text('{"status": 1}')  # not as a training writes it
    assert train(run_dir)["status"] == "done"


def test_the_command_checks_the_memory_of_a_run_that_still_trains(make, monkeypatch, capsys):
    def refuse(config):
        raise ValueError("too large")

    run_dir = make(student_updates=1)
    with monkeypatch.context() as patched:
        patched.setattr(command, "check_memory", refuse)
        with pytest.raises(SystemExit, match="2"):
            command.main([str(run_dir)])
        assert capsys.readouterr().err == "distill-bench train: too large\n"
    assert command.main([str(run_dir)]) == 0
    monkeypatch.setattr(command, "check_memory", refuse)
    assert command.main([str(run_dir)]) == 0, "a run that has ended needs no memory"
    assert capsys.readouterr().out.endswith("done after 1 student updates\n")
