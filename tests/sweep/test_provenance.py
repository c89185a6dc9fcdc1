"""The code fingerprint depends on the code that decides weights and clips, and on no other."""

import re
import shutil
from pathlib import Path

import pytest

from distill_bench import ROOT
from distill_bench.config.sweep_file import load_sweep
from distill_bench.sweep import manifest, provenance

# Module or package -> a change moves the fingerprint; the longest match decides. `config` and
# `sample` are classified file by file.
COUNTS = {
    "__init__": False,
    "autoencoder": True,
    "cli": False,
    "config/__init__": False,
    "config/analysis": False,
    "config/checks": False,
    "config/cluster": False,
    "config/conditions": False,
    "config/errors": False,
    "config/identity": False,
    "config/overrides": False,
    "config/protocol": True,
    "config/reference": False,
    "config/resolve": True,
    "config/rows": True,
    "config/schema": True,
    "config/sweep_file": False,
    "config/validation": False,
    "config/yaml_files": False,
    "discriminator": True,
    "domain": True,
    "draws": True,
    "evaluate": False,
    "evaluator": False,
    "export": False,
    "expressions": True,
    "fields": False,
    "method": True,
    "networks": True,
    "noise": True,
    "plan": False,
    "pretrain": False,
    "registry": False,
    "report": False,
    "rollout": True,
    "sample/__init__": False,
    "sample/clip_files": False,
    "sample/load_folder": False,
    "sample/references": True,
    "sample/reference_kinds": False,
    "sample/released_weights": True,
    "sample/rows": True,
    "sample/run": True,
    "sample/sampler": True,
    "sample/vbench_files": False,
    "sample/write_folder": True,
    "schedulers": False,
    "store": False,
    "sweep": False,
    "teachers": True,
    "testing": False,
    "train": True,
}


def counts(module: str) -> bool:
    """True if a module, e.g. "train/loop", belongs to the fingerprint."""
    if module.endswith("__main__"):
        return False
    matches = [name for name in COUNTS if f"{module}/".startswith(f"{name}/")]
    assert matches, f"{module}: decide whether a run's numbers pass through it, and list it here"
    return COUNTS[max(matches, key=len)]


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, its methods and its evaluators, which provenance reads."""
    ignored = shutil.ignore_patterns("assets", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "distill_bench", ignore=ignored)
    for plugins in ("methods", "eval"):
        shutil.copytree(ROOT.parent / plugins, tmp_path / plugins, ignore=ignored)
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "distill_bench")
    monkeypatch.setattr(manifest, "ROOT", tmp_path / "distill_bench")
    return tmp_path


def fingerprint(code: Path) -> str:
    return provenance.code_fingerprint(f"{code / 'methods' / 'dmd2.py'}:DMD2")


def moves(code: Path, path: Path, change: str = "\nCHANGED = 1\n") -> bool:
    """True if a change of one file moves the fingerprint."""
    before, source = fingerprint(code), path.read_text()
    path.write_text(source + change)
    after = fingerprint(code)
    path.write_text(source)
    return before != after


def test_a_change_moves_the_fingerprint_if_numbers_pass_through_the_module(code):
    root = code / "distill_bench"
    expected, actual = {}, {}
    for path in sorted(root.rglob("*.py")):
        module = str(path.relative_to(root).with_suffix(""))
        expected[module] = counts(module)
        actual[module] = moves(code, path)
    assert len(actual) > 80
    assert actual == expected


def test_of_the_plugins_only_the_method_s_own_file_counts(code):
    plugins = [path for folder in ("methods", "eval") for path in (code / folder).glob("*.py")]
    assert [path.name for path in plugins if moves(code, path)] == ["dmd2.py"]


def test_a_colour_of_a_figure_does_not_move_the_fingerprint(code):
    colour = re.compile(r"#[0-9a-fA-F]{6}")
    drawn = [
        p for p in (code / "distill_bench" / "report").rglob("*.py") if colour.search(p.read_text())
    ]
    before = fingerprint(code)
    for path in drawn:
        path.write_text(colour.sub("#123456", path.read_text()))
    assert drawn
    assert fingerprint(code) == before


def test_docstrings_comments_and_layout_do_not_count(code):
    assert not moves(code, code / "distill_bench" / "train" / "loop.py", "\n# a comment\n")
    one = 'def f(x):\n    """Doc."""\n    return x + 1  # one\n'
    same = "def f(x):\n    return (x\n        + 1)\n"
    other = "def f(x):\n    return x + 2\n"
    assert provenance.syntax_digest(one) == provenance.syntax_digest(same)
    assert provenance.syntax_digest(one) != provenance.syntax_digest(other)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("distill_bench/config/sweep_file.py", True),
        ("distill_bench/teachers/folder.py", True),
        ("distill_bench/registry.py", True),
        ("distill_bench/method.py", True),
        ("methods/sgmd.py", True),
        ("prompts.txt", True),
        ("distill_bench/sweep/status.py", False),
        ("distill_bench/train/loop.py", False),
        ("eval/motion.py", False),
    ],
)
def test_a_manifest_s_runs_hold_while_nothing_that_decides_run_ids_changes(
    name, expected, code, sweep_file
):
    (code / "prompts.txt").write_text("a red ball\n")
    config = load_sweep(sweep_file, {"prompts": str(code / "prompts.txt")})
    before = manifest.spec_digest(config)
    with (code / name).open("a") as file:
        file.write("\n# changed\n")
    assert (manifest.spec_digest(config) != before) == expected
