"""A launch checks the scores of contrasts, and records the sweep file before its first run."""

import hashlib
import os

import pytest

from distill_bench.config.errors import ConfigError
from distill_bench.config.sweep_file import load_sweep
from distill_bench.report.data_files import data_files
from distill_bench.report.declarations import ADDED, FIRST, UNKNOWN
from distill_bench.report.read_store import read_sweep
from distill_bench.report.results import load
from distill_bench.store.launches import read_launches
from distill_bench.sweep.__main__ import main
from distill_bench.sweep.launch import LaunchOptions, select_runs
from distill_bench.sweep.manifest import open_sweep
from distill_bench.sweep.prechecks import check_contrast_scores, stand_in_clips
from distill_bench.sweep.slurm.queue import Queue

SWEEP = """
question: which?
base:
  {teacher: gaussian, student_updates: 2, batch_size: 2, nfe: 1, exit_step: last, shift: 1.0,
   guidance_scale: 1.0, score_shift: 1.0, evaluations: 1, trackers: [], threads: 1,
   protocol: {clips: 4, teacher_steps: 2, teacher_guidance: 1.0, evaluators: [EVALUATORS]}}
grid: {method: [dmd2, sgmd]}
seeds: SEEDS
contrasts:
  objective: {of: {method: sgmd}, minus: {method: dmd2}, scores: [SCORES]}
"""


def written(folder, scores="exact_kl", evaluators="exact_divergence", seeds=2):
    path = folder / "small.yaml"
    text = SWEEP.replace("SCORES", scores).replace("EVALUATORS", evaluators)
    path.write_text(text.replace("SEEDS", str(seeds)))
    return path


def checked(path):
    sweep = load_sweep(path)
    config = sweep.expand()[0]
    return check_contrast_scores(sweep, config, stand_in_clips(config))


def test_an_unknown_score_of_a_contrast_is_one_line(tmp_path):
    assert checked(written(tmp_path)) == []
    assert checked(written(tmp_path, scores="exact_kl, train_seconds")) == []
    message = "small: contrasts.objective: no evaluator states the score 'exact_kll' .*'exact_kl'"
    with pytest.raises(ConfigError, match=message):
        checked(written(tmp_path, scores="exact_kll"))


def test_an_evaluator_that_states_no_columns_makes_it_a_warning(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from distill_bench.evaluator import Evaluator\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Evaluator):\n"
        "    paper = version = 1\n"
        "    def scores(self, clips, references): return []\n"
    )
    mine = f"{tmp_path / 'mine.py'}:Mine"
    (warning,) = checked(written(tmp_path, "brightness", f'exact_divergence, "{mine}"'))
    assert "no evaluator states the score 'brightness'; it may come from" in warning


def test_a_record_names_the_file_and_the_runs_that_had_begun(tmp_path):
    path = written(tmp_path)
    sweep = open_sweep(load_sweep(path), tmp_path / "runs", tmp_path / "results")
    (tmp_path / "runs" / next(iter(sweep.runs)) / "attempts" / "001").mkdir(parents=True)
    sweep.record_launch(path)
    sweep.record_launch(path)
    (record,) = read_launches(tmp_path / "runs", "small")
    assert record["digest"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["begun"] == 1 and list(record["contrasts"]) == ["objective"]


@pytest.mark.slow
def test_a_sweep_is_recorded_before_its_first_run_and_prints_its_contrasts(tmp_path, capsys):
    """Further seeds change nothing; a contrast added after the runs is marked."""
    store, out = tmp_path / "runs", tmp_path / "results"
    options = ["--cluster=debug", f"--store={store}", f"--out={out}"]
    path = written(tmp_path)
    for arguments in (["--dry-run"], ["--status"]):
        main([str(path), *options, *arguments])
    assert read_launches(store, "small") == [] and not store.exists()
    capsys.readouterr()
    assert main([str(path), *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "contrast score seeds difference p (Holm over 1) declared" in printed
    assert "objective exact KL 2" in printed and "before the runs" in printed
    assert marks(out) == {"objective": FIRST}
    path = written(tmp_path, seeds=3)
    path.write_text(
        path.read_text()
        + "  back: {of: {method: dmd2}, minus: {method: sgmd}, scores: [exact_w2]}\n"
    )
    assert main([str(path), *options]) == 0
    assert marks(out) == {"objective": FIRST, "back": ADDED}
    page = (out / "small" / "report.html").read_text()
    assert "added later" in page and read_launches(store, "small")[0]["digest"][:12] in page
    for record in (store / "sweeps" / "small").iterdir():
        record.unlink()
    files = data_files(read_sweep("small", store))
    assert f'"declared": "{UNKNOWN}"' in files["sweep.json"]


def marks(out):
    return {one["name"]: one["declared"] for one in load(out / "small").contrasts}


def opened(folder, seeds):
    config = load_sweep(written(folder, seeds=seeds))
    return open_sweep(config, folder / f"{seeds}" / "runs", folder / "results")


def test_a_launch_waits_for_the_disk_as_often_whatever_the_number_of_runs(tmp_path, monkeypatch):
    """A file system on a network takes milliseconds each time, for thousands of runs."""
    waits = {2: [], 20: []}
    for seeds, calls in waits.items():
        monkeypatch.setattr(os, "fsync", calls.append)
        sweep = opened(tmp_path, seeds)
        sweep.write()
        assert len(select_runs(sweep, Queue(), LaunchOptions())) == len(sweep.runs)
        assert all((sweep.store / run / "run.yaml").stat().st_size for run in sweep.runs)
    assert len(waits[2]) == len(waits[20]) > 0


def test_a_launch_replaces_run_files_that_a_power_cut_left_empty(tmp_path):
    sweep = opened(tmp_path, 2)
    sweep.write()
    run = next(iter(sweep.runs))
    file = sweep.store / run / "run.yaml"
    content = file.read_bytes()
    file.write_bytes(b"")
    again = opened(tmp_path, 2)
    again.write()
    assert run in select_runs(again, Queue(), LaunchOptions())
    assert file.read_bytes() == content
