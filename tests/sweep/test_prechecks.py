"""Faults that would show only after training are found before the first run."""

import re
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch._inductor.config

from distill_bench.config.errors import ConfigError
from distill_bench.config.resolve import resolve
from distill_bench.config.sweep_file import load_sweep
from distill_bench.registry import find_evaluator
from distill_bench.sample.references import folder_names
from distill_bench.store.files import append_jsonl, write_json
from distill_bench.sweep.__main__ import main
from distill_bench.sweep.manifest import open_sweep
from distill_bench.sweep.prechecks import (
    check_evaluators,
    check_stored_scores,
    check_sweep,
    stand_in_clips,
)

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


@pytest.mark.parametrize("folder", ["s", "s/figures"])
def test_unwritable_results_of_the_sweep_are_named_before_the_first_run(folder, tmp_path, capsys):
    """For instance those of another user; nobody can write into /proc."""
    path = tmp_path / "results" / folder
    path.parent.mkdir(parents=True)
    path.symlink_to("/proc")
    assert refused(tmp_path, "[fidelity]", "{}", f"cannot write into {path}: ", capsys)


def test_clips_that_do_not_fit_the_disk_are_named_before_the_first_run(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    error = "1 runs take at least"
    assert refused(tmp_path, "[fidelity]", "{tasks: 3}", error, capsys)


def test_the_disk_holds_reference_rows_students_and_checkpoints_too(
    sweep_file, tiny_wan, tmp_path, monkeypatch
):
    """For one evaluation and a checkpoint per update; the two rows of real clips may not exist."""
    sweep = open_sweep(load_sweep(sweep_file, {"seeds": 1}), tmp_path / "runs", tmp_path / "out")
    (config,) = sweep.runs.values()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(ConfigError) as error:
        check_sweep(sweep, 1)
    predicted = re.search(
        r"clips (\S+), reference rows (\S+), kept students (\S+), checkpoints (\S+)\)",
        str(error.value),
    )
    assert predicted
    sizes = [1e9 * float(size) for size in predicted.groups()]
    stored = sum(p.stat().st_size for p in (tiny_wan / "transformer").glob("*.safetensors"))
    clips = 2 * 3 * config.frames * config.height * config.width
    assert sizes[:2] == pytest.approx([clips, clips * (len(folder_names(config)) - 2)], rel=0.01)
    assert 0.9 * stored < sizes[2] < stored  # the file also has a header
    assert sizes[3] == pytest.approx(2 * 2 * 3 * sizes[2], rel=0.01)


@pytest.mark.parametrize("compiled", [True, "network"])
def test_a_missing_compiler_is_named_before_the_first_run(compiled, sweep_file, tmp_path):
    """torch reads the compiler's name from CXX when it is imported."""
    sweep = load_sweep(sweep_file, {"compile": compiled})
    sweep = open_sweep(sweep, tmp_path / "runs", tmp_path / "out")
    missing = torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")})
    with missing, pytest.raises(ConfigError, match="'/nowhere/g..' does not run; inst") as error:
        check_sweep(sweep, 1)
    assert "\n" not in str(error.value)


def test_prompts_that_no_clip_shows_are_counted(sweep_file, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\na blue square\na green star\n")
    keys = {"prompts": str(tmp_path / "p.txt"), "protocol.clips": 4}
    for per_prompt, warned in ((2, ["1 of 3 prompts in"]), (1, [])):
        keys["protocol.clips_per_prompt"] = per_prompt
        sweep = open_sweep(load_sweep(sweep_file, keys), tmp_path / "runs", tmp_path / "out")
        assert [warning[:17] for warning in check_sweep(sweep, 1)] == warned


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


@pytest.mark.parametrize(("change", "refused"), [("", False), ("0", True)])
def test_scores_by_other_weights_are_refused_before_a_run(change, refused, tmp_path):
    """A report refuses a column of two extractors, so training first would be in vain."""
    file = tmp_path / "s.yaml"
    text = SWEEP.format(evaluators="[fvd]", cluster="{}").replace("gaussian", "mini-wan")
    file.write_text(text, encoding="utf-8")
    sweep = open_sweep(load_sweep(file), tmp_path / "runs", tmp_path / "results")
    (run, config), evaluator = *sweep.runs.items(), find_evaluator("fvd")()
    result = {"run_id": run, "status": "done", "student_updates": 1, "train_seconds": 1.0}
    write_json(sweep.store / run / "result.json", result)
    common = {"metric": "fvd", "version": evaluator.version, "settings": asdict(evaluator)}
    for extractor in sorted(evaluator.extractors(stand_in_clips(config))):
        line = {"column": "fvd", "extractor": extractor + change} | common
        append_jsonl(sweep.store / run / "metrics.jsonl", line)
    if not refused:
        assert check_stored_scores(sweep, sweep.states()) == []
        return
    with pytest.raises(ConfigError, match=f"fvd of {run} is by .*0, new runs would have .* or "):
        check_stored_scores(sweep, sweep.states())


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
