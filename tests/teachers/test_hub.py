"""Teachers on the hub: only `make_local` and `download` use the network; plans use the cache."""

import shutil
import socket
from pathlib import Path

import diffusers
import huggingface_hub.constants
import pytest

from distill_bench.config.errors import ConfigError
from distill_bench.config.resolve import resolve
from distill_bench.config.sweep_file import load_sweep
from distill_bench.plan.command import main as cost
from distill_bench.sweep.__main__ import main as sweep
from distill_bench.teachers import hub
from distill_bench.teachers.folder import (
    OUTLINES,
    TeacherError,
    is_outline,
    outlines,
    teacher_folder,
)

RUN = {"method": "dmd2", "frames": 5, "height": 16, "width": 16}


class NetworkUsed(Exception):
    """Raised by every attempt to reach the network."""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache; every use of the network raises `NetworkUsed`."""

    def refuse(*args, **kwargs):
        raise NetworkUsed

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path / "hub"


def fill(cache: Path, repository: str, folder: Path) -> Path:
    """Put a pipeline into the cache, as a download does."""
    owner, name = repository.split("/")
    repo = cache / f"models--{owner}--{name}"
    snapshot = repo / "snapshots" / ("a" * 40)
    shutil.copytree(folder, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    return snapshot


def sweep_file(folder: Path, teacher: str) -> Path:
    path = folder / "few.yaml"
    base = f"method: dmd2, teacher: {teacher}, frames: 5, height: 16, width: 16"
    path.write_text(f"question: q\nbase: {{{base}}}\n")
    return path


def test_a_cached_teacher_resolves_without_the_network(cache, tiny_wan):
    snapshot = fill(cache, "lab/tiny", tiny_wan)
    assert teacher_folder("lab/tiny") == teacher_folder(f"lab/tiny@{'a' * 40}") == snapshot
    by_name = resolve(RUN | {"teacher": "lab/tiny", "student": "lab/tiny"})
    assert by_name.teacher_hash == resolve(RUN | {"teacher": str(tiny_wan)}).teacher_hash


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_a_teacher_that_is_not_cached_is_refused_with_the_command_to_download_it(key, cache):
    with pytest.raises(ConfigError, match=r"`distill-bench download lab/tiny@v2`") as caught:
        resolve(RUN | {key: "lab/tiny@v2"})
    assert "no teacher 'lab/tiny@v2'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flags", [["--dry-run"], ["--status"]])
def test_a_plan_of_a_teacher_that_is_not_cached_ends_without_the_network(
    flags, cache, tmp_path, capsys
):
    path = sweep_file(tmp_path, "lab/tiny")
    assert sweep([str(path), "--store", str(tmp_path / "runs"), *flags]) == 2
    assert "distill-bench download lab/tiny" in capsys.readouterr().err
    assert cost([str(path)]) == 2
    assert "distill-bench download lab/tiny" in capsys.readouterr().err


def test_outlines_stand_in_for_missing_weights_only_in_plans(cache):
    (name, *_) = OUTLINES
    with pytest.raises(TeacherError, match="not in the Hugging Face cache"):
        teacher_folder(name)
    with outlines():
        assert is_outline(teacher_folder(name))


def test_a_launch_downloads_before_anything_is_resolved(
    cache, tmp_path, tiny_wan, monkeypatch, capsys
):
    calls = []

    def download(repository, revision=None):
        calls.append((repository, revision))
        return str(fill(cache, repository, tiny_wan))

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    config = load_sweep(sweep_file(tmp_path, "lab/tiny"))
    hub.make_local(*config.pipelines())
    assert calls == [("lab/tiny", None)]
    assert "checking the hub for lab/tiny" in capsys.readouterr().err
    (run,) = config.expand()
    assert run.teacher == "lab/tiny"
    assert len(calls) == 1


def test_a_failed_download_is_one_line_and_names_the_revision(cache):
    with pytest.raises(TeacherError, match=r"is 'v2' a branch, tag or commit of it\?") as caught:
        hub.download("lab/tiny@v2")
    message = str(caught.value)
    assert message.startswith("cannot download teacher 'lab/tiny@v2' (NetworkUsed")
    assert "\n" not in message


def test_a_slow_hash_is_announced_once(tiny_wan, tmp_path, monkeypatch, capsys):
    from distill_bench.teachers import contents

    monkeypatch.setattr(contents, "LARGE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    contents.hash_of.cache_clear()
    hub.make_local([str(tiny_wan)])
    hub.make_local([str(tiny_wan)])
    assert capsys.readouterr().err.count(f"hashing {tiny_wan}") == 1
