"""What the README shows works as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from distill_bench.cli import COMMANDS
from distill_bench.config.sweep_file import load_sweep
from distill_bench.registry import find_method
from distill_bench.sweep.__main__ import main
from distill_bench.testing.gradient import student_gradient

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(language: str, beginning: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return next(b for b in blocks if b.startswith(beginning))


def test_the_method_of_the_readme_has_the_gradient_that_it_says(tmp_path):
    (tmp_path / "my_method.py").write_text(block("python", "# my_method.py"))
    method = find_method(f"{tmp_path}/my_method.py:MyMethod")(scale=2.0)
    x0, noise = torch.randn(
        2, 2, 3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    sigma = torch.tensor([0.3, 0.7], dtype=torch.float64)
    found = student_gradient(method, x0, noise, sigma, lambda x, s, t: 0.5 * x, lambda x, s, t: -x)
    x_t = (1 - sigma.reshape(2, 1, 1, 1, 1)) * x0 + sigma.reshape(2, 1, 1, 1, 1) * noise
    torch.testing.assert_close(found, 2.0 * 1.5 * x_t / x0.numel())


def test_the_sweep_of_the_readme_expands(tmp_path):
    (tmp_path / "batch.yaml").write_text(block("yaml", "question:"))
    runs = load_sweep(tmp_path / "batch.yaml").expand()
    assert len(runs) == 5 * (2 * 2 * 2 * 2 + 1)


def test_the_plan_at_size_is_the_one_that_is_printed(capsys, monkeypatch):
    shown = block("console", "$ python -m distill_bench.sweep sweeps/wan2.1")
    command, *lines = shown.split("\n...")[0].splitlines()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("distill_bench.sweep.watch.console.width", 140)
    assert main([*shlex.split(command)[4:], "--cluster=local", "--store=nowhere"]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert printed[: len(lines)] == lines
    assert set(shown.split("\n...")[1].split("\n")) - {""} <= set(printed)


@pytest.mark.parametrize(
    "path", re.findall(r"`((?:distill_bench|methods|eval|sweeps|results|tests)/[\w./]+)`", README)
)
def test_every_path_of_the_readme_is_there(path):
    if not path.startswith("results/quick/report.html"):
        assert (ROOT / path).exists()


def test_every_module_of_the_readme_is_a_command():
    for name in re.findall(r"(?:python -m distill_bench\.|distill-bench )(\w+)", README):
        assert name in {*COMMANDS, "list", "compares"}, name


def test_the_table_of_the_readme_is_that_of_the_quick_sweep():
    table = (
        (ROOT / "results" / "quick" / "table.md")
        .read_text()
        .split("## At the end of training")[1]
        .split("\n\n")[1]
    )
    assert table.startswith("| method |") and table in README
