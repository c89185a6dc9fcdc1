"""Relative paths of a run start from the folder of the launch, wherever its job starts."""

import json
from pathlib import Path

import pytest

from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import run_id
from distill_bench.config.overrides import has_values
from distill_bench.config.resolve import load_run, method_of, resolve
from distill_bench.config.sweep_file import load_sweep
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.registry import find_evaluator, method_file, search_plugins_in
from distill_bench.sweep.manifest import open_sweep

METHOD = """
from dataclasses import dataclass
from typing import ClassVar

from distill_bench.methods.dmd2 import DMD2


@dataclass(frozen=True)
class Mine(DMD2):
    paper: ClassVar[str] = "none"
"""
EVALUATOR = """
from dataclasses import dataclass
from typing import ClassVar

from distill_bench.evaluator import Evaluator


@dataclass(frozen=True)
class Bright(Evaluator):
    paper: ClassVar[str] = "none"
    version: ClassVar[int] = 1

    def scores(self, clips, references):
        return []
"""
RUN = {
    "method": "mine_at_launch.py:Mine",
    "prompts": "p.txt",
    "protocol": {"evaluators": ["bright_at_launch.py:Bright"]},
}


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Current folder with the files that RUN names."""
    folder = tmp_path / "launch"
    folder.mkdir()
    (folder / "mine_at_launch.py").write_text(METHOD)
    (folder / "bright_at_launch.py").write_text(EVALUATOR)
    (folder / "p.txt").write_text("a red circle\na blue square\n")
    monkeypatch.chdir(folder)
    yield folder
    search_plugins_in(None)


def test_a_job_may_start_in_another_folder(launch, tmp_path, monkeypatch):
    config = resolve(RUN)
    assert config.prompts == str(launch / "p.txt")
    assert config.launch_folder == str(launch)
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = load_run(run)
    assert loaded == config
    assert type(method_of(loaded)).__name__ == "Mine"
    assert method_file(RUN["method"]) == launch / "mine_at_launch.py"
    assert find_evaluator("bright_at_launch.py:Bright").__name__ == "Bright"


def test_paths_do_not_enter_the_id(launch):
    relative, absolute = (
        resolve(RUN | {"prompts": path}) for path in ("./p.txt", str(launch / "p.txt"))
    )
    assert run_id(relative) == run_id(absolute)
    assert has_values(relative.model_dump(mode="json"), {"prompts": "p.txt"})


def test_relative_paths_in_conditions_and_baselines_name_the_same_files(launch, tmp_path):
    (launch / "n.txt").write_text("blurry")
    file = launch / "s.yaml"
    file.write_text(
        "question: q\nbase: {method: mine_at_launch.py:Mine, prompts: p.txt, nfe: 1}\n"
        "grid: {negative_prompt: ['', 'file:n.txt']}\n"
        "baseline: {negative_prompt: 'file:n.txt', prompts: p.txt}"
    )
    sweep = open_sweep(load_sweep(file), tmp_path / "runs", tmp_path / "results")
    ((run, config),) = sweep.only(
        "negative_prompt in ['file:./n.txt'] and prompts == 'p.txt'"
    ).runs.items()
    assert run in sweep.only("negative_prompt != ''").runs
    assert sweep.only(
        "negative_prompt == '' and prompts != 'q.txt'"
    ).runs.keys() == sweep.runs.keys() - {run}
    sweep.write()
    baseline = json.loads((sweep.store / "sweeps" / "s.json").read_text())["baseline"]
    assert baseline == {
        "negative_prompt": f"file:{launch / 'n.txt'}",  # a report may start in any folder
        "prompts": str(launch / "p.txt"),
    }
    assert config.negative_prompt == baseline["negative_prompt"]


def test_files_that_the_launch_folder_lacks_lie_beside_the_sweep_file(launch, tmp_path):
    beside = tmp_path / "sweeps"
    beside.mkdir()
    for name, text in {"p.txt": "a dog", "q.txt": "a cat", "n.txt": "dim", "blurry": "x"}.items():
        (beside / name).write_text(text)
    (beside / "mini-wan").mkdir()
    file = beside / "s.yaml"
    file.write_text(
        "question: q\nbase: {method: dmd2, teacher: mini-wan, negative_prompt: blurry, nfe: 1}\n"
        "grid: {prompts: [p.txt, q.txt]}\n"
        "include: [{method: dmd2, negative_prompt: 'file:n.txt'}]\n"
        "baseline: {prompts: q.txt}\n"
    )
    here, there, other = load_sweep(file).expand()
    assert here.prompts == str(launch / "p.txt")
    assert there.prompts == str(beside / "q.txt")
    assert (there.negative_prompt, there.teacher) == ("blurry", "mini-wan")
    assert other.negative_prompt == f"file:{beside / 'n.txt'}"
    with pytest.raises(ConfigError, match="prompts r.txt: No such file"):
        load_sweep(file, {"prompts": "r.txt"}).expand()


def test_names_and_missing_paths_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve({"method": "dmd2"})
    assert (config.teacher, config.prompts, config.launch_folder) == ("mini-wan", None, None)
    (tmp_path / "mini-wan").mkdir()
    assert resolve({"method": "dmd2"}).teacher == "mini-wan"
    assert Path.cwd() == tmp_path
