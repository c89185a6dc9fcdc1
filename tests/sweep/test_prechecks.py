"""Faults that would show only after training are found before the first run."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill_bench.config.errors import ConfigError
from distill_bench.config.resolve import resolve
from distill_bench.config.sweep_file import load_sweep
from distill_bench.registry import find_evaluator
from distill_bench.store.files import append_jsonl, write_json
from distill_bench.sweep.__main__ import main
from distill_bench.sweep.manifest import open_sweep
from distill_bench.sweep.prechecks import check_evaluators, check_stored_scores, stand_in_clips

SWEEP = """
question: q
base:
  teacher: gaussian
  nfe: 1
  batch_size: 3
  protocol: {{clips: 4, evaluators: {evaluators}}}
grid: {{method: [dmd]}}
cluster: {cluster}
"""


@pytest.mark.parametrize(
    ("evaluators", "cluster", "variables", "error"),
    [
        (
            "[fvd]",
            "{}",
            {"DISTILL_BENCH_EXTRACTOR": "i3d-k400-logits-400:/nowhere/i3d.pt"},
            "evaluator fvd: no weights at /nowhere/i3d.pt",
        ),
        ("[fvd]", "{}", {"DISTILL_BENCH_EXTRACTOR": "random"}, "no extractor called 'random'"),
        (
            "null",
            "{}",
            {"DISTILL_BENCH_RAFT": "/nowhere/raft.pth"},
            "evaluator motion: no weights at /nowhere/raft.pth",
        ),
        (
            "[clip_score]",
            "{}",
            {"DISTILL_BENCH_CLIP": "local-dir:/nowhere"},
            "evaluator clip_score: no CLIP at 'local-dir:/nowhere'",
        ),
        ("[clip_score]", "{}", {}, "protocol.evaluators: clip_score cannot score the clips"),
        ("[fidelity]", "{tasks: 2}", {}, "batch_size 3 must be a multiple of processes"),
    ],
)
def test_what_scoring_lacks_is_named_before_the_first_run(
    evaluators, cluster, variables, error, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert refused(tmp_path, evaluators, cluster, error, capsys)


def test_a_file_in_the_place_of_the_results_is_named_before_the_first_run(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "s").touch()
    assert refused(tmp_path, "[fidelity]", "{}", "which is not a folder", capsys)


def test_clips_that_do_not_fit_the_disk_are_named_before_the_first_run(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    error = "the clips of 1 runs alone take"
    assert refused(tmp_path, "[fidelity]", "{tasks: 3}", error, capsys)


def test_an_evaluator_without_facts_is_named_before_the_first_run(tmp_path, capsys):
    teacher = "gaussian"
    error = "lacks basis, means"
    assert refused(tmp_path, "[mixture_truth]", "{}", error, capsys)
    config = resolve({"method": "dmd", "nfe": 1, "protocol": {"evaluators": ["exact_divergence"]}})
    with pytest.raises(ConfigError, match="teacher mini-wan come without covariance, mean"):
        check_evaluators(config, stand_in_clips(config))
    facts = resolve({"method": "dmd", "nfe": 1, "teacher": teacher, "protocol": {"clips": 4}})
    assert stand_in_clips(facts).facts.keys() == {
        "mean",
        "covariance",
        "target_mean",
        "target_covariance",
    }


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        ({"version": 0, "settings": {}}, "scored by version 0 of fidelity, new runs by version"),
        ({"settings": {"bins": 3}}, "scored by fidelity with other settings: bins 3 and None"),
        ({"settings": {}}, ""),
    ],
)
def test_stored_scores_that_no_table_can_hold_are_named(line, outcome, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(SWEEP.format(evaluators="[fidelity]", cluster="{}"), encoding="utf-8")
    sweep = open_sweep(load_sweep(file), tmp_path / "runs", tmp_path / "results")
    (run,) = sweep.runs
    result = {"run_id": run, "status": "done", "student_updates": 1, "train_seconds": 1.0}
    write_json(sweep.store / run / "result.json", result)
    version = find_evaluator("fidelity").version
    score = {"metric": "fidelity", "version": version} | line
    append_jsonl(sweep.store / run / "metrics.jsonl", score)
    try:
        warnings = check_stored_scores(sweep, sweep.states())
    except ConfigError as error:
        assert outcome
        assert outcome in str(error)
    else:
        assert [outcome in warning for warning in warnings] == [True] * bool(outcome)


def test_a_dry_run_tells_that_the_runs_would_not_start(tmp_path, capsys):
    file = tmp_path / "s.yaml"
    file.write_text(SWEEP.format(evaluators="[clip_score]", cluster="{}"), encoding="utf-8")
    assert main([str(file), "--cluster=local", f"--store={tmp_path / 'runs'}", "--dry-run"]) == 0
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "the runs would not start: protocol.evaluators: clip_score cannot score" in shown


def refused(folder: Path, evaluators: str, cluster: str, error: str, capsys) -> bool:
    """True if a sweep is refused in one line that holds `error`, and nothing is written."""
    file = folder / "s.yaml"
    file.write_text(SWEEP.format(evaluators=evaluators, cluster=cluster), encoding="utf-8")
    store = folder / "runs"
    argv = [str(file), "--cluster=local", f"--store={store}", f"--out={folder / 'results'}"]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert error in line
    return not store.exists()
