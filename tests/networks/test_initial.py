"""`init`: the student starts from the last student of another run, which must not change."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_folders import write_result
from torch import nn

from distill_bench.config.errors import ConfigError
from distill_bench.networks.adapters import merge_adapter
from distill_bench.store.files import read_json
from distill_bench.store.runs import initial_path, read_initial
from distill_bench.teachers.contents import file_hash
from distill_bench.train import checkpoint
from distill_bench.train.loop import train
from distill_bench.train.setup import build_from, initial_student, record_initial

INITIAL = "dmd2-s0-0123456789ab"
ADAPTER = {"rank": 2, "alpha": 6.0, "targets": ["to_q"]}


@pytest.fixture
def make_initial(make_run) -> Callable[..., Path]:
    """Write a finished run whose student is not where it started; it has kept two students."""

    def make(**fields) -> Path:
        run_dir = make_run(INITIAL, **fields)
        built = build_from(run_dir)
        weights = built.average.sampled()
        for updates in (1, 2):
            with torch.no_grad():
                for value in weights.values():
                    value += 0.01 * updates
            checkpoint.save_student(run_dir, updates, weights)
        content = file_hash(checkpoint.students(run_dir)[2])
        costs = {"cost_forward_equivalents": 60.0, "train_seconds": 5.0}
        write_result(run_dir, student_content=content, **costs)
        return run_dir

    return make


def same(net: nn.Module, other: nn.Module) -> bool:
    weights = dict(other.named_parameters())
    return all(torch.equal(p, weights[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize(
    ("initial", "own"),
    [({}, {}), ({"adapter": ADAPTER}, {}), ({"adapter": ADAPTER}, {"adapter": ADAPTER})],
    ids=["all weights", "merged adapter", "same adapter"],
)
def test_student_and_average_start_there_and_the_fake_score_at_the_teacher(
    initial, own, make_initial, make_run
):
    folder = make_initial(**initial)
    run = build_from(make_run("run", init=INITIAL, seed=3, **own))
    untouched = build_from(make_run("untouched", seed=3, **own))
    if own:
        expected = checkpoint.load_file(checkpoint.students(folder)[2])
    else:
        net = untouched.pipeline.student()
        adapter = build_from(folder).config.adapter
        checkpoint.load_student(checkpoint.students(folder)[2], net, adapter)
        expected = dict((merge_adapter(net) if adapter else net).named_parameters())
    student = dict(run.networks["student"].named_parameters())
    assert student.keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in student.items())
    usual = dict(untouched.networks["student"].named_parameters())
    assert all(p.requires_grad == usual[name].requires_grad for name, p in student.items())
    averaged = run.average.sampled()
    assert all(torch.equal(value, expected[name]) for name, value in averaged.items())
    assert same(run.networks["fake_score"], untouched.networks["fake_score"])
    assert not same(run.networks["student"], untouched.networks["student"])


def test_a_changed_student_is_refused_before_the_start_and_on_resuming(make_initial, make_run):
    folder = make_initial(batch_size=8)
    run_dir = make_run("run", init=INITIAL)  # batches of 4
    record_initial(run_dir)
    student = checkpoint.students(folder)[2]
    expected = {"run_id": INITIAL, "content": file_hash(student)}
    costs = {"cost_forward_equivalents": 120.0, "train_seconds": 5.0}
    assert read_initial(run_dir) == expected | costs, "twice as many batches of half the size"
    (run_dir / "checkpoints" / "1").mkdir(parents=True)
    record_initial(run_dir)  # on resuming, with the same student
    initial_path(run_dir).unlink()
    record_initial(run_dir)  # a run that began before students were recorded
    assert read_initial(run_dir) == expected | costs

    second = make_run("second", init="run-s0-0123456789ab", batch_size=2)
    run_dir.rename(run_dir.with_name("run-s0-0123456789ab"))
    run_dir = run_dir.with_name("run-s0-0123456789ab")
    checkpoint.save_student(run_dir, 2, checkpoint.load_file(student))
    write_result(run_dir, **costs)  # of an older version: without the student's content
    record_initial(second)
    summed = read_initial(second)
    assert (summed["cost_forward_equivalents"], summed["train_seconds"]) == (480.0, 10.0)

    good, result = student.read_bytes(), read_json(folder / "result.json")
    student.write_bytes(good[:-4] + b"\0\0\0\0")
    third = make_run("third", init=INITIAL)
    with pytest.raises(ConfigError, match=rf"has changed since {INITIAL} ended \(content"):
        record_initial(third)
    assert not initial_path(third).exists()
    write_result(folder, **result | {"student_content": file_hash(student)})  # trained again
    record_initial(third)
    with pytest.raises(ConfigError, match=r"has changed since run-s0-0123456789ab began"):
        record_initial(run_dir)
    write_result(folder, **result | {"status": "collapsed"})
    with pytest.raises(ConfigError, match=f"init {INITIAL}: its result is collapsed"):
        build_from(third)
    (folder / "result.json").unlink()
    with pytest.raises(ConfigError, match=f"init {INITIAL}: its result is missing, so"):
        build_from(third)


def test_a_training_records_the_student_that_it_starts_from(make_initial, make_run):
    make_initial()
    run_dir = make_run("run", init=INITIAL)
    train(run_dir, stop=lambda: True)
    assert read_initial(run_dir)["run_id"] == INITIAL


def test_the_student_to_start_from_is_the_last_one_kept(tmp_path):
    """By number, not by name."""
    (tmp_path / "students").mkdir()
    for updates in (5, 9, 10):
        (tmp_path / "students" / f"{updates}.safetensors").touch()
    write_result(tmp_path)
    assert initial_student(tmp_path).name == "10.safetensors"
