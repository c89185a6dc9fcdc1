"""A sweep whose students are sampled in further ways, with rows that train nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from distill_bench.config.resolve import load_run
from distill_bench.config.sweep_file import load_sweep
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.report.data_files import data_files
from distill_bench.report.read_store import read_sweep
from distill_bench.report.results import load
from distill_bench.report.tables.differences import differences
from distill_bench.sample.sampler import Sampler
from distill_bench.store.claims import attempts
from distill_bench.store.files import read_json, read_jsonl
from distill_bench.store.runs import run_state
from distill_bench.sweep.launch import LaunchOptions, run_debug
from distill_bench.sweep.manifest import open_sweep
from distill_bench.train import checkpoint

pytestmark = pytest.mark.slow

SWEEP = {
    "question": "Does the stepping of sampling matter?",
    "base": {
        "teacher": "mixture",
        "method": "dmd2",
        "student_updates": 2,
        "student_lr": 0.01,
        "evaluations": 1,
        "nfe": 2,
        "trackers": [],
        "protocol": {"clips": 8, "teacher_steps": 4, "evaluators": ["mixture_truth"]},
    },
    "grid": {"stepping": ["renoise", "ode"]},
    "seeds": 2,
    "baseline": {"stepping": "renoise"},
}
SAMPLING = [
    {"stepping": ["ode", "renoise", 0.5]},
    {"of": "teacher", "nfe": [2, 3], "stepping": ["ode", "renoise"]},
]


def launch(folder: Path, content: dict) -> None:
    """Do the unfinished runs of a sweep in `folder`, as the command does, without its figures."""
    (folder / "s.yaml").write_text(dump_yaml(content))
    sweep = open_sweep(load_sweep(folder / "s.yaml"), folder / "runs", folder / "results")
    run_debug(sweep, LaunchOptions())
    sweep.write()
    assert set(sweep.states().values()) == {"done"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Folder of the finished sweep without further samplings."""
    folder = tmp_path_factory.mktemp("plain")
    launch(folder, SWEEP)
    return folder


@pytest.fixture(scope="module")
def sampled(plain, tmp_path_factory):
    """Folder of the same sweep, sampled in further ways after it was done."""
    folder = tmp_path_factory.mktemp("sampled") / "copy"
    shutil.copytree(plain, folder)
    launch(folder, SWEEP | {"sampling": SAMPLING})
    return folder


def runs_of(folder: Path) -> list[Path]:
    return sorted(path.parent for path in (folder / "runs").glob("dmd2-*/result.json"))


def clips(folder: Path) -> np.ndarray:
    return np.load(folder / "clips.npy")


def test_students_are_sampled_again_but_not_trained_again(plain, sampled):
    assert [run.name for run in runs_of(plain)] == [run.name for run in runs_of(sampled)]
    for before, after in zip(runs_of(plain), runs_of(sampled), strict=True):
        for name in ("result.json", "metrics.jsonl", "train.jsonl", "samples/2/clips.npy"):
            assert (before / name).read_bytes() == (after / name).read_bytes(), name
        assert len(attempts(after)) == 2
        own = load_run(after).stepping
        names = {path.name for path in (after / "samplings").iterdir() if path.is_dir()}
        assert names == {"ode-nfe2-shift2", "renoise-nfe2-shift2", "renoise0.5-nfe2-shift2"} - {
            f"{own}-nfe2-shift2"
        }


def test_a_further_way_gives_the_clips_of_that_rollout(sampled):
    """Independent of the row's code: the sampler of a run that is configured so."""
    run = next(run for run in runs_of(sampled) if load_run(run).stepping == "renoise")
    config = load_run(run)
    assert not np.array_equal(clips(run / "samples/2"), clips(run / "samplings/ode-nfe2-shift2"))
    for stepping, name in (("ode", "ode-nfe2-shift2"), (0.5, "renoise0.5-nfe2-shift2")):
        sampler = Sampler(config.model_copy(update={"stepping": stepping}))
        net = sampler.placed(sampler.pipeline.student())
        checkpoint.load_student(checkpoint.students(run)[2], net)
        expected = sampler.student(net).frames(0, 8)
        np.testing.assert_array_equal(clips(run / "samplings" / name), expected)
        manifest = (run / "samplings" / name / "manifest.jsonl").read_text()
        assert manifest == (run / "samples/2/manifest.jsonl").read_text(), "prompts and seeds"


def test_the_teachers_ode_row_has_the_clips_of_the_reference(sampled):
    manifest = json.loads((sampled / "runs/sweeps/s.json").read_text())
    rows = {row["label"]: sampled / "runs" / name for name, row in manifest["rows"].items()}
    assert list(rows) == [
        "untrained, stepping 0.5, 2 steps",
        "teacher, ODE, 2 steps",
        "teacher, ODE, 3 steps",
        "teacher, renoise, 2 steps",
        "teacher, renoise, 3 steps",
    ]
    (few,) = (sampled / "runs/references").glob("*/teacher_few-nfe2")
    of = {label: clips(folder / "samples/0") for label, folder in rows.items()}
    np.testing.assert_array_equal(of["teacher, ODE, 2 steps"], clips(few))
    digests = {frames.tobytes() for frames in of.values()}
    assert len(digests) == 5
    result = read_json(rows["teacher, renoise, 3 steps"] / "result.json")
    assert (result["nfe"], result["student_updates"], result["status"]) == (3, 0, "done")


def test_tables_mark_the_ways_and_pair_them_by_seed(sampled, tmp_path):
    for name, text in data_files(read_sweep("s", sampled / "runs")).items():
        (tmp_path / name).write_text(text)
    results = load(tmp_path)
    labels = [row.label for row in results.students]
    assert labels == [
        "DMD2, renoise",
        "DMD2, renoise, sampled ODE",
        "DMD2, renoise, sampled stepping 0.5",
        "DMD2, ODE",
        "DMD2, ODE, sampled renoise",
        "DMD2, ODE, sampled stepping 0.5",
    ]
    assert all(list(row.runs["seed"]) == [0, 1] and row.done == 2 for row in results.students)
    assert results.baseline.label == "DMD2, renoise"
    cost = "cost_forward_equivalents"
    first, second = results.students[:2]
    assert list(first.runs[cost]) == list(second.runs[cost])
    assert "untrained, stepping 0.5, 2 steps" in [row.label for row in results.references]
    for column in results.headline:
        (difference,) = differences(results, column, [(second, first)])
        assert difference.seeds == 2
    scores = read_jsonl(runs_of(sampled)[0] / "metrics.jsonl")
    further = runs_of(sampled)[0] / "samplings"
    for folder in (path for path in further.iterdir() if path.is_dir()):
        lines = read_jsonl(folder / "metrics.jsonl")
        assert {line["protocol"] for line in lines} == {line["protocol"] for line in scores}
        assert [line["column"] for line in lines] == [line["column"] for line in scores]


def test_a_lost_way_is_sampled_again_and_nothing_else(sampled, tmp_path):
    shutil.copytree(sampled, tmp_path / "copy")
    folder = tmp_path / "copy"
    run, untouched = runs_of(folder)[:2]
    lost = next(path for path in (run / "samplings").iterdir() if path.is_dir())
    before = clips(lost)
    shutil.rmtree(lost)
    assert run_state(run) == "done", "a sweep that does not ask for the way has all it needs"
    assert run_state(run, samplings=[lost.name]) == "unsampled"
    launch(folder, SWEEP | {"sampling": SAMPLING})
    np.testing.assert_array_equal(clips(lost), before)
    assert len(attempts(run)) == 3
    assert len(attempts(untouched)) == 2
