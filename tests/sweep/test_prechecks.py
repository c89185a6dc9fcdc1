"""Faults that would show only after training are found before the first run."""

from pathlib import Path

import pytest

from distill_bench.sweep.__main__ import main

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
