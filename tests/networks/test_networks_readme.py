"""Commands and paths in `distill_bench/networks/README.md`."""

import re
import shlex
from pathlib import Path

import pytest

from distill_bench.cli import COMMANDS
from distill_bench.sweep.__main__ import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "distill_bench" / "networks" / "README.md").read_text()


def test_the_plan_at_size_is_printed_by_its_command(capsys, monkeypatch):
    """Three dots stand for lines that are left out."""
    shown = re.search(r"```console\n\$ (.*?)```", README, re.DOTALL).group(1)
    command, *lines = shown.split("\n...")[0].splitlines()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("distill_bench.sweep.watch.console.width", 140)
    arguments = shlex.split(command)
    assert arguments[:2] == ["distill-bench", "sweep"]
    assert main([*arguments[2:], "--cluster=local", "--store=nowhere"]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert printed[: len(lines)] == lines
    assert set(shown.split("\n...")[1].splitlines()) - {""} <= set(printed)


@pytest.mark.parametrize("path", re.findall(r"`((?:distill_bench|sweeps)/[\w./]+)`", README))
def test_paths_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"(?m)(?:^|`)distill-bench (\w+)", README)))
)
def test_commands_exist(command):
    assert command in COMMANDS
