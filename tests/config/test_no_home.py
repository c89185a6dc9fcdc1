"""A user without a passwd entry and without HOME, as in many containers."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from distill_bench.config.cluster import profiles_file, with_profile
from distill_bench.sweep.__main__ import main
from distill_bench.teachers import contents
from distill_bench.teachers.contents import content_hash, hash_is_slow


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The working folder of a user without a home."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "DISTILL_BENCH_CLUSTERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="home"):
        Path.home()
    return tmp_path


def test_such_a_user_has_no_profiles(no_home):
    assert not profiles_file().is_file()
    assert with_profile({"gpus": 2}) == {"gpus": 2}


def test_such_a_user_s_hashes_are_not_remembered(no_home, monkeypatch):
    monkeypatch.setattr(contents, "LARGE", 0)
    (no_home / "teacher").mkdir()
    (no_home / "teacher" / "config.json").write_text("{}")
    assert hash_is_slow(no_home / "teacher")
    assert content_hash(no_home / "teacher")
    assert os.listdir(no_home) == ["teacher"]


def test_such_a_user_can_plan_a_sweep(no_home, capsys):
    file = no_home / "s.yaml"
    file.write_text(
        "question: q\nbase: {teacher: gaussian, nfe: 1, protocol: {evaluators: [fidelity]}}\n"
        "grid: {method: [dmd]}"
    )
    assert main([str(file), "--dry-run", "--cluster", "local"]) == 0
    assert "1 runs (1 missing)" in capsys.readouterr().out


@pytest.mark.slow
def test_such_a_user_is_told_where_downloads_go(tmp_path):
    code = """
import os, pwd
def unknown(uid): raise KeyError(uid)
pwd.getpwuid = unknown
from distill_bench.teachers.hub import main
main(["owner/name"])
"""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "cannot download teacher 'owner/name': this user has no home folder; "
        "set HF_HOME to a folder for downloads"
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "env", [{"HOME": "/proc/1"}, {"MPLCONFIGDIR": "/proc/1", "HOME": "/proc/1"}]
)
def test_drawing_figures_needs_no_home_and_says_nothing_of_it(env, tmp_path):
    """Nobody can create a folder in /proc/1."""
    code = "from distill_bench.report.figures.canvas import Figure; Figure()"
    env = env | {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
