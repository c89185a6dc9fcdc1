"""Documents against the code: examples run, paths and commands exist, numbers are in results."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_bench.cli import COMMANDS
from distill_bench.config.sweep_file import load_sweep
from distill_bench.evaluator import Clips
from distill_bench.registry import find_evaluator, find_method
from distill_bench.sweep.__main__ import main
from distill_bench.testing import student_gradient

ROOT = Path(__file__).parent.parent
FOLDERS = ("", "sweeps", "methods", "eval", "results", "distill_bench/networks")
DOCUMENTS = [ROOT / folder / "README.md" for folder in FOLDERS]
README, NETWORKS = DOCUMENTS[0].read_text(), DOCUMENTS[-1].read_text()


def block(document: str, language: str, beginning: str) -> str:
    """The first code block of a language that starts with `beginning`."""
    blocks = re.findall(rf"```{language}\n(.*?)```", document, re.DOTALL)
    return next(b for b in blocks if b.startswith(beginning))


def table_rows(text: str) -> list[dict[str, str]]:
    """The rows of the first Markdown table in a text, by column."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_readme_is_short():
    assert len(README.split()) <= 1300


@pytest.mark.parametrize("path", DOCUMENTS, ids=FOLDERS)
def test_prose_ends_at_120_columns(path):
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL).splitlines()
    wide = [line for line in prose if len(line) > 120 and not line.startswith(("|", "!["))]
    assert wide == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=FOLDERS)
def test_every_path_exists(path):
    """Paths from the root in backticks, and links relative to the document."""
    text = path.read_text()
    tops = "distill_bench|eval|sweeps|results|tests|methods"
    if path.parent.name == "methods":  # it quotes paths of other repositories
        tops = "distill_bench|tests"
    named = [ROOT / name for name in re.findall(rf"`((?:{tops})/[\w./]+)`", text)]
    linked = [path.parent / name for name in re.findall(r"\]\(([\w./]+)\)", text)]
    made_up = {"NAME", "my_method.py", "brightness.py"}
    assert [p for p in named + linked if not p.exists() and p.name not in made_up] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=FOLDERS)
def test_every_command_exists(path):
    pattern = r"(?:`|^|\$ )(?:python -m distill_bench\.|distill-bench )([\w-]+)"
    named = re.findall(pattern, path.read_text(), re.MULTILINE)
    assert sorted({*named} - {*COMMANDS}) == []


def test_the_method_of_the_readme_has_the_gradient_that_it_states(tmp_path):
    (tmp_path / "my_method.py").write_text(block(README, "python", "# my_method.py"))
    method = find_method(f"{tmp_path}/my_method.py:MyMethod")(scale=2.0)
    x0, noise = torch.randn(
        2, 2, 3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    sigma = torch.tensor([0.3, 0.7], dtype=torch.float64)
    gradient = student_gradient(
        method, x0, noise, sigma, lambda x, s, t: 0.5 * x, lambda x, s, t: -x
    )
    x_t = (1 - sigma.reshape(2, 1, 1, 1, 1)) * x0 + sigma.reshape(2, 1, 1, 1, 1) * noise
    torch.testing.assert_close(gradient, 2.0 * 1.5 * x_t / x0.numel())


def test_the_evaluator_of_the_readme_scores_brightness(tmp_path):
    (tmp_path / "brightness.py").write_text(block(README, "python", "# brightness.py"))
    evaluator = find_evaluator(f"{tmp_path}/brightness.py:Brightness")()
    frames = np.zeros((2, 3, 3, 4, 4), np.uint8)
    frames[1] = 255
    (score,) = evaluator.scores(Clips(frames, ["", ""], [0, 1], 8.0), {})
    assert score.per_clip == (0.0, 1.0)
    assert score.value == 0.5


def test_the_data_frames_of_the_readme_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    scope: dict = {}
    exec(block(README, "python", "from distill_bench.report import load"), scope)
    results = scope["results"]
    for frame in (results.runs, results.clips, results.checkpoints, results.differences):
        assert len(frame)
    assert "fvd" in results.runs


def test_the_sweep_of_the_readme_expands(tmp_path):
    (tmp_path / "batch.yaml").write_text(block(README, "yaml", "question:"))
    runs = load_sweep(tmp_path / "batch.yaml").expand()
    assert len(runs) == 5 * (2 * 2 * 2 * 2 + 1)


def test_every_row_of_the_readmes_table_stands_in_the_table_of_quick():
    """The README shows some rows and columns of results/quick/table.md, cell by cell."""
    shown = table_rows(re.split("<!-- /?RESULTS -->", README)[1])
    text = (ROOT / "results" / "quick" / "table.md").read_text()
    whole = table_rows(text.split("## At the end of training")[1].split("##")[0])
    assert 0 < len(shown) <= 6
    for row in shown:
        assert any(row.items() <= other.items() for other in whole), row


def test_the_plan_at_size_is_the_one_that_is_printed(capsys, monkeypatch):
    shown = block(NETWORKS, "console", "$ distill-bench sweep sweeps/wan2.1")
    command, *lines = shown.split("\n...")[0].splitlines()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("distill_bench.sweep.watch.console.width", 140)
    assert main([*shlex.split(command)[3:], "--cluster=local", "--store=nowhere"]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert printed[: len(lines)] == lines
    assert set(shown.split("\n...")[1].split("\n")) - {""} <= set(printed)
