"""Errors of the command line: exit code 2, one line that names the fault, nothing written."""

import shlex
import shutil
from pathlib import Path

import pytest

from distill_bench.cli import main

SWEEP = """
question: Does a wrong command end in one line?
base: {teacher: gaussian, method: dmd2}
grid: {fake_score_updates: [1, 5]}
"""


@pytest.fixture
def workplace(reported: tuple[Path, Path], tmp_path: Path, monkeypatch) -> Path:
    """Current folder with a sweep file, an empty folder, an empty file, runs and their results."""
    results, store = reported
    shutil.copytree(results.parent, tmp_path / "results")
    shutil.copytree(store, tmp_path / "runs")
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("swep", "no command called 'swep'; known: sweep"),
        ("sweep sweep.yaml --set student_ltr=1", "did you mean 'student_lr'"),
        ("sweep sweep.yaml --set student_lr", "write key=value"),
        ("sweep sweep.yaml --set student_lr=fast", "student_lr = 'fast'"),
        ("sweep sweep.yaml --set teacher=/nowhere", "no teacher '/nowhere'"),
        ("sweep sweep.yaml --set seeds=0", "the grid is empty"),
        ("sweep sweep.yaml --jobs 0", "--jobs 0"),
        ("sweep sweep.yaml --out /proc/nowhere", "cannot write into /proc/nowhere"),
        ("sweep sweep.yaml --retry-failed=oom", "no kind of failure 'oom'; known: cuda_oom, "),
        ("sweep sweep.yaml --watch 0", "--watch 0"),
        ("sweep sweep.yaml --watch -1", "--watch -1"),
        ("sweep sweep.yaml --status --only 'seed > 5'", "no run of the sweep satisfies it"),
        ("sweep sweep.yaml --explain xyz", "no runs of the sweep match; name one of: dmd2-s0-"),
        ("sweep sweep.yaml --explain ''", "2 runs of the sweep match"),
        ("cost sweep.yaml --size critic=1", "no role called 'critic'; known: student"),
        ("cost sweep.yaml --size student=big", "--size 'student=big' takes ROLE=NUMBER"),
        ("cost sweep.yaml --set student_lr=1e999", "student_lr = inf"),
        ("train empty", "no run.yaml"),
        ("sample empty", "it has no run.yaml"),
        ("evaluate empty", "no clips"),
        ("export empty student", "no run.yaml"),
        ("report speed --baseline method=nosuch", "method=alpha,fake_score_updates=5"),
        ("report speed --baseline gamma", "'gamma' is not KEY=VALUE"),
        ("report speed --baseline method=alpha", "fits 2 rows: method=alpha,fake_score_updates=1"),
        ("report speed --budget nan", "budget nan: a cost"),
        ("report speed --budget -1", "budget -1: a cost"),
        ("report speed --out file", "cannot write"),
        ("report nosuch", "nosuch"),
        ("plot results/speed --y distnace", "no column called 'distnace'"),
        ("compare gamma beta", "'gamma' is neither a run folder nor a run in"),
        ("compare /no/such/run alpha", "'/no/such/run' is neither a run folder nor a run in"),
        ("compare '**' alpha", "'**' is neither a run folder nor a run in"),
        ("compare / alpha", "'/' is neither a run folder nor a run in"),
        ("compare '' alpha", "matches several runs: alpha-s0-"),
        ("verify empty", "no sweep.json"),
        ("verify nowhere", "no sweep.json in results/nowhere"),
        ("plot nowhere", "known: speed"),
    ],
)
def test_a_wrong_command_ends_in_one_line(command, message, workplace, capsys):
    before = contents(workplace)
    try:
        code = main(shlex.split(command))
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert code == 2
    assert contents(workplace) == before
