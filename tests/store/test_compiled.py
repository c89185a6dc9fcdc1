"""Compiled networks in the store: what one run compiles, the next one loads."""

import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from distill_bench.store import compiled
from distill_bench.store.compiled import CACHE, TRITON_CACHE, compiled_networks
from distill_bench.sweep import job
from distill_bench.train import __main__ as train
from distill_bench.train import checkpoint

SHORT = {
    "method": "dmd",
    "student_updates": 1,
    "fake_score_updates": 1,
    "nfe": 1,
    "guidance_scale": 1.0,
    "signals_every": None,
}


@pytest.fixture(autouse=True)
def no_folders_of_the_user(monkeypatch, tmp_path):
    """Unset the variables of the caches, and keep temporary files below `tmp_path`."""
    for name in (CACHE, TRITON_CACHE):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(compiled.tempfile, "tempdir", None)


def compile_file(store: Path, *names: str) -> set[str]:
    """Put files into the cache folder, as the compiler does; returns those that were there."""
    with compiled_networks(store):
        own = Path(os.environ[CACHE])
        there = {path.name for path in own.rglob("*") if path.is_file()}
        for name in names:
            (own / name).parent.mkdir(parents=True, exist_ok=True)
            (own / name).write_text(name)
    return there


def archives(store: Path) -> list[Path]:
    return sorted(store.glob("compiled/*/*"))


def test_each_process_begins_with_all_files_and_adds_its_own(tmp_path):
    assert compile_file(tmp_path) == set()
    assert not (tmp_path / "compiled").exists()
    assert compile_file(tmp_path, "ab/a.so", "fxgraph/b") == set()
    assert compile_file(tmp_path, "c.so") == {"a.so", "b"}
    assert compile_file(tmp_path) == {"a.so", "b", "c.so"}
    contents = []
    for archive in archives(tmp_path):
        with tarfile.open(archive) as files:
            contents.append(set(files.getnames()))
    assert sorted(contents, key=len) == [{"c.so"}, {"ab/a.so", "fxgraph/b"}]
    assert list((tmp_path / "temporary").iterdir()) == []
    assert CACHE not in os.environ
    assert TRITON_CACHE not in os.environ


def test_processes_that_compile_at_once_both_keep_their_files(tmp_path):
    with compiled_networks(tmp_path):
        (Path(os.environ[CACHE]) / "both.so").write_text("both.so")
        (Path(os.environ[CACHE]) / "slow.so").write_text("slow.so")
        slow = os.environ.pop(CACHE)
        compile_file(tmp_path, "both.so", "fast.so")
        os.environ[CACHE] = slow
    assert compile_file(tmp_path) == {"both.so", "slow.so", "fast.so"}


def test_equal_files_are_kept_once(tmp_path):
    with compiled_networks(tmp_path):
        (Path(os.environ[CACHE]) / "a.so").write_text("a.so")
        slow = os.environ.pop(CACHE)
        compile_file(tmp_path, "a.so")
        os.environ[CACHE] = slow
    assert len(archives(tmp_path)) == 1


def test_an_error_adds_nothing(tmp_path):
    with pytest.raises(ValueError, match="in training"), compiled_networks(tmp_path):
        (Path(os.environ[CACHE]) / "a.so").write_text("half")
        raise ValueError("in training")
    assert archives(tmp_path) == []
    assert CACHE not in os.environ
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_folder_of_the_user_is_used_instead(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path / "own"))
    compile_file(tmp_path, "a.so")
    assert archives(tmp_path) == []
    assert (tmp_path / "own" / "a.so").is_file()
    assert os.environ[CACHE] == str(tmp_path / "own")


def test_the_folder_that_torch_sets_by_itself_is_not_the_user_s(tmp_path, monkeypatch):
    """An import may set the variable, and the node of a driver may have another $TMPDIR."""
    default = default_cache_dir()
    for count, folder in enumerate((default, str(tmp_path / "node" / Path(default).name)), 1):
        monkeypatch.setenv(CACHE, folder)
        compile_file(tmp_path, f"{count}.so")
        assert len(archives(tmp_path)) == count
        assert os.environ[CACHE] == folder


@pytest.mark.parametrize("value", [None, "/somewhere"])
def test_the_variable_of_triton_is_afterwards_as_before(value, tmp_path, monkeypatch):
    if value is not None:
        monkeypatch.setenv(TRITON_CACHE, value)
    with compiled_networks(tmp_path):
        assert os.environ.get(TRITON_CACHE) == value
        os.environ[TRITON_CACHE] = "set by torch"
    assert os.environ.get(TRITON_CACHE) == value


def test_a_damaged_archive_is_named_and_passed_over(tmp_path, capsys):
    compile_file(tmp_path, "a.so")
    compile_file(tmp_path, "b.so")
    first, _ = archives(tmp_path)
    first.write_bytes(b"torn")
    assert len(compile_file(tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{first} is not used: ")


def test_a_store_that_cannot_be_written_costs_no_run(tmp_path, capsys):
    (tmp_path / "compiled").write_text("a file")
    compile_file(tmp_path, "a.so")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"compiled networks not kept in {tmp_path}")


def test_other_processors_do_not_share_code(tmp_path, monkeypatch):
    for flags in ("fpu avx2", "fpu avx2 avx512f"):
        info = tmp_path / flags.replace(" ", "-")
        info.write_text(f"processor : 0\nflags : {flags}\n\nprocessor : 1\nflags : {flags}\n")
        monkeypatch.setattr(compiled, "CPUINFO", info)
        assert compile_file(tmp_path, "a.so") == set()
        assert compile_file(tmp_path) == {"a.so"}
    assert len({archive.parent for archive in archives(tmp_path)}) == 2


def train_anew(run: Path, command: Callable[[list[str]], int] = train.main) -> dict[str, int]:
    """Train without the compiled code in this process's memory; returns the cache's counters."""
    torch._dynamo.reset()
    torch._inductor.utils.clear_caches()
    counters.clear()
    assert command([str(run)]) == 0
    return {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")}


def train_until_a_library_is_compiled(run: Path, temporary: Path) -> None:
    """Train in a process of its own, and kill it."""
    with subprocess.Popen([sys.executable, "-m", "distill_bench.train", run]) as process:
        try:
            while not list(temporary.glob("distill-bench-compiled-*/**/*.so")):
                time.sleep(0.05)
                assert process.poll() is None
        finally:
            process.kill()


@pytest.mark.slow
def test_the_second_run_compiles_nothing_and_a_killed_one_harms_nothing(make_run, tmp_path):
    killed, first, second = (make_run(f"{i}", compile=True, **SHORT) for i in range(3))
    train_until_a_library_is_compiled(killed, tmp_path / "temporary")
    assert archives(first.parent) == []
    compiled_first = train_anew(first, job.main)
    assert compiled_first["miss"] > 0
    assert compiled_first["hit"] == 0
    (archive,) = archives(first.parent)
    assert train_anew(second) == {"hit": compiled_first["miss"], "miss": 0}
    assert archives(first.parent) == [archive]
    trained = [checkpoint.students(run)[1].read_bytes() for run in (first, second)]
    assert trained[0] == trained[1]
