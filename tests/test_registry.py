"""Plugins: a file in the folders, an entry point, a module or a file of one's own."""

import sys
from pathlib import Path

import pytest

from distill_bench.cli import main
from distill_bench.evaluator import Evaluator
from distill_bench.method import Method
from distill_bench.registry import RegistryError, evaluators, find_evaluator, find_method, methods

OWN = '''
from dataclasses import dataclass
from typing import ClassVar
from distill_bench.method import Loss, Method

@dataclass(frozen=True)
class Mine(Method):
    """A method of one's own."""
    paper: ClassVar[str] = "none"
    strength: float = 0.5
    def student_loss(self, nets, batch): ...
'''


@pytest.fixture
def entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed distribution that offers the method `mine`, as pip would lay it out."""
    site = tmp_path / "site"
    meta = site / "mine-1.0.dist-info"
    meta.mkdir(parents=True)
    (site / "mine_plugin.py").write_text(OWN)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[distill_bench.methods]\nmine = mine_plugin:Mine\n")
    monkeypatch.syspath_prepend(str(site))
    yield "mine"
    sys.modules.pop("mine_plugin", None)


def test_every_file_in_the_folders_is_found_by_its_name():
    root = Path(__file__).parent.parent
    for folder, found, base in (("methods", methods(), Method), ("eval", evaluators(), Evaluator)):
        files = {p.stem for p in (root / folder).glob("*.py")} - {"__init__"}
        assert files and files <= found.keys()
        assert all(
            issubclass(plugin, base) and plugin.__doc__ and plugin.paper
            for plugin in found.values()
        )


def test_a_method_behind_an_entry_point_is_found_and_listed(entry_point, capsys):
    assert find_method(entry_point).__name__ == "Mine" and entry_point in methods()
    assert main(["list"]) == 0
    assert "mine" in (out := capsys.readouterr().out) and "strength: float = 0.5" in out
    for ranged in (
        "steps: int >= 1 = 32",
        "discriminator_lr: float > 0 | None = None",
        "feature_depth: float > 0, <= 1 = 0.5",
    ):
        assert ranged in out
    assert "FieldInfo" not in out and "Annotated" not in out


def test_a_method_in_a_file_of_ones_own_is_found(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    assert find_method(f"{tmp_path}/own.py:Mine")().strength == 0.5


@pytest.mark.parametrize(
    "name, says",
    [
        ("dmd22", "no method called 'dmd22' (did you mean 'dmd2'?)"),
        ("nowhere.py:Mine", "no plugin file nowhere.py"),
        ("nowhere:Mine", "cannot load the method nowhere"),
        (
            "pathlib:Path",
            "'pathlib:Path' is no method: it must be a subclass of distill_bench.method.Method",
        ),
        ("pathlib:Nothing", "no class 'Nothing' in pathlib"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(name, says):
    with pytest.raises(RegistryError) as error:
        find_method(name)
    assert says in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(RegistryError, match="no evaluator called"):
        find_evaluator("fdv")


def test_the_command_line_names_its_commands(capsys):
    assert main(["--help"]) == 0 and "sweep" in capsys.readouterr().out
    assert main(["swep"]) == 2 and "known: sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def (", "SyntaxError"),
        ("import nowhere_at_all", "ModuleNotFoundError"),
        ("1 / 0", "division by zero"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_one_line_that_names_it(source, says, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(RegistryError) as error:
        find_method(f"{path}:Mine")
    assert (
        f"cannot load the method {path}" in str(error.value)
        and says in str(error.value)
        and "\n" not in str(error.value)
    )
