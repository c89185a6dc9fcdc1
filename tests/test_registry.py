"""Plugins by name: a file in the folders, an entry point, a module or the user's own file."""

import sys
from pathlib import Path

import pytest

from distill_bench.cli import main
from distill_bench.evaluator import Evaluator
from distill_bench.method import Method
from distill_bench.registry import RegistryError, evaluators, find_evaluator, find_method, methods

ROOT = Path(__file__).parent.parent
OWN = '''
from dataclasses import dataclass
from typing import ClassVar
from distill_bench.method import Loss, Method

@dataclass(frozen=True)
class Mine(Method):
    """A user's method."""
    paper: ClassVar[str] = "none"
    strength: float = 0.5
    def student_loss(self, nets, batch): ...
'''


@pytest.fixture
def entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a method in an installed distribution, laid out as pip does."""
    site = tmp_path / "site"
    meta = site / "mine-1.0.dist-info"
    meta.mkdir(parents=True)
    (site / "mine_plugin.py").write_text(OWN)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[distill_bench.methods]\nmine = mine_plugin:Mine\n")
    monkeypatch.syspath_prepend(str(site))
    yield "mine"
    sys.modules.pop("mine_plugin", None)


@pytest.mark.parametrize(
    ("folder", "plugins", "base"),
    [("methods", methods, Method), ("eval", evaluators, Evaluator)],
)
def test_every_file_in_the_folders_is_a_plugin_with_a_purpose_and_a_paper(folder, plugins, base):
    files = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert files
    assert files <= plugins().keys()
    for plugin in plugins().values():
        assert issubclass(plugin, base)
        assert plugin.__doc__
        assert plugin.paper


def test_a_method_behind_an_entry_point_is_found_and_listed(entry_point, capsys):
    assert find_method(entry_point).__name__ == "Mine"
    assert entry_point in methods()
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "mine" in listed
    assert "strength: float = 0.5" in listed


@pytest.mark.parametrize(
    "field",
    [
        "steps: int >= 1 = 32",
        "discriminator_lr: float > 0 | null = null",
        "feature_depth: float > 0, <= 1 = 0.5",
    ],
)
def test_the_list_shows_fields_with_their_ranges_and_defaults(field, capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert field in listed
    assert "FieldInfo" not in listed
    assert "Annotated" not in listed


def test_a_method_in_the_users_own_file_is_found(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    assert find_method(f"{tmp_path}/own.py:Mine")().strength == 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dmd22", "no method called 'dmd22' (did you mean 'dmd2'?)"),
        ("nowhere.py:Mine", "no plugin file nowhere.py in the current folder, "),
        ("nowhere:Mine", "cannot load the method nowhere"),
        (
            "pathlib:Path",
            "'pathlib:Path' is not a subclass of distill_bench.method.Method, as every method",
        ),
        ("pathlib:Nothing", "no class 'Nothing' in pathlib"),
    ],
)
def test_an_unknown_plugin_is_an_error_of_one_line(name, message):
    with pytest.raises(RegistryError) as error:
        find_method(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_evaluator_is_called_an_evaluator():
    with pytest.raises(RegistryError, match="no evaluator called 'fdv'"):
        find_evaluator("fdv")


def test_the_command_line_names_its_commands(capsys):
    assert main(["--help"]) == 0
    assert "sweep" in capsys.readouterr().out
    assert main(["swep"]) == 2
    assert "known: sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def (", "SyntaxError"),
        ("import nowhere_at_all", "ModuleNotFoundError"),
        ("1 / 0", "division by zero"),
    ],
)
def test_a_plugin_that_fails_to_import_is_an_error_of_one_line(source, message, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(RegistryError) as error:
        find_method(f"{path}:Mine")
    assert f"cannot load the method {path}" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
