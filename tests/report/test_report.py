"""The report command: repeatable, without torch, and strict about the store."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stores import edit_lines

from distill_bench.report.__main__ import main
from distill_bench.report.write import report


def run(store: Path, out: Path) -> int:
    """Exit code of `python -m distill_bench.report speed`."""
    return main(["speed", "--store", str(store), "--out", str(out)])


def files_of(folder: Path) -> dict[str, bytes]:
    """Path within the folder -> content."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def one_line(capsys: pytest.CaptureFixture) -> str:
    """The error message, which must be a single line."""
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


@pytest.mark.slow
def test_a_second_report_has_the_same_bytes(reported, tmp_path):
    folder, store = reported
    first, second = files_of(folder), files_of(report("speed", store, tmp_path).parent)
    assert first == second
    assert len(first) > 20


@pytest.mark.slow
def test_a_store_without_weights_and_clips_has_the_same_tables(reported, tmp_path):
    """The files that sweeps/README.md tells to take along when a sweep changes the machine."""
    folder, store = reported
    left_out = shutil.ignore_patterns("checkpoints", "students", "tracking", "*.npy")
    light = shutil.copytree(store, tmp_path / "light", ignore=left_out)
    assert any(store.rglob("*.npy")) and not any(light.rglob("*.npy"))
    first, second = files_of(folder), files_of(report("speed", light, tmp_path / "out").parent)
    assert set(first) == set(second)
    same = {name for name in first if first[name] == second[name]}
    assert set(first) - same == {"report.html", "digests.json"}, "the page alone shows clips"


def test_scores_of_another_protocol_are_refused(store, tmp_path, capsys):
    path = next(store.glob("alpha-s0-*")) / "metrics.jsonl"
    edit_lines(path, lambda line: line | {"protocol": "p2"})
    assert run(store, tmp_path / "out") == 2
    assert "cannot share a column" in one_line(capsys)


def test_a_damaged_run_is_named(store, tmp_path, capsys):
    path = next(store.glob("alpha-s0-*")) / "run.yaml"
    path.write_text("{")
    assert run(store, tmp_path / "out") == 2
    assert f"{path} is damaged" in one_line(capsys)


@pytest.mark.parametrize("module", ["write", "plot", "compare", "verify", "results"])
def test_results_are_read_and_reported_without_torch(module):
    code = f"import sys, distill_bench.report.{module}; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
