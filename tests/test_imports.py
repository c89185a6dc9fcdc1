"""The import rule: the harness knows no method and no metric, plugins know only the harness, later stages are never imported."""

import ast
import re
from pathlib import Path

import pytest

import distill_bench

ROOT = Path(__file__).parent.parent
STAGES = ["train", "sample", "evaluate", "report", "plot"]


def imported(source: str) -> set[str]:
    """Full names of everything that a module imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def plugin_names(folder: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}


def violations(path: str, source: str) -> list[str]:
    """What is wrong with one file of the package, given its path from the root."""
    folder, stem = Path(path).parts[0], Path(path).stem
    wrong = []
    for name in sorted(imported(source)):
        if name.split(".")[0] in {"methods", "eval"}:
            wrong.append(f"{path} imports {name}: write distill_bench.{name}")
        if name.startswith(("distill_bench.methods.", "distill_bench.eval.")):
            wrong.append(f"{path} imports the plugin {name}")
        if folder == "distill_bench" and stem in STAGES:
            later = {f"distill_bench.{stage}" for stage in STAGES[STAGES.index(stem) + 1 :]}
            wrong += [f"{path} imports {name}, a later stage"] * (name in later)
    if folder == "distill_bench":
        plugins = plugin_names("methods") | plugin_names("eval")
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node.value in plugins
            ):
                wrong.append(f"{path}:{node.lineno} names the plugin {node.value!r}")
    return wrong


FILES = [
    str(p.relative_to(ROOT))
    for folder in ("distill_bench", "methods", "eval")
    for p in (ROOT / folder).rglob("*.py")
]


@pytest.mark.parametrize("path", FILES)
def test_every_file_keeps_the_import_rule(path):
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("distill_bench/train.py", "from distill_bench.methods.dmd2 import DMD2"),
        ("distill_bench/train.py", "from distill_bench import report"),
        ("distill_bench/report.py", "if name == 'sgmd': pass"),
        ("methods/new.py", "from methods.dmd2 import DMD2"),
        ("methods/new.py", "from distill_bench.methods.dmd2 import DMD2"),
        ("eval/new.py", "import distill_bench.eval.fvd"),
    ],
)
def test_a_planted_violation_is_found(path, source):
    assert violations(path, source)


def test_every_module_has_its_place_on_the_map():
    words = set(re.findall(r"\w+", distill_bench.__doc__))
    there = {path.stem for path in (ROOT / "distill_bench").glob("*.py")} - {"__init__"}
    assert there <= words, (
        f"distill_bench/__init__.py does not say where to look for {sorted(there - words)}"
    )
