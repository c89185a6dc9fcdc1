"""Files of new plugins: they conform as written, and no file is overwritten."""

from pathlib import Path

import pytest

from distill_bench.cli import main
from distill_bench.registry import find_plugin

KINDS = {"new-method": "method", "new-evaluator": "evaluator"}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", KINDS)
def test_the_file_holds_a_plugin_of_its_kind(command, capsys):
    name = f"my_first_{KINDS[command]}"
    assert main([command, name]) == 0
    kind, plugin = find_plugin(f"{name}.py:MyFirst{KINDS[command].title()}")
    assert kind == KINDS[command]
    assert f"distill-bench check {name}.py:{plugin.__name__}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("command", KINDS)
def test_the_file_conforms_as_written(command, workplace, capsys):
    assert main([command, "as_written", "--folder", str(workplace)]) == 0
    ranks = ["--no-ranks"] * (command == "new-method")  # test_conformance.py trains two processes
    plugin = f"{workplace}/as_written.py:AsWritten"
    assert main(["check", plugin, *ranks]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("command", KINDS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MyMethod", "'MyMethod' is no name of a plugin; use lower-case letters"),
        ("my-method", "'my-method' is no name"),
        ("../outside", "'../outside' is no name"),
        ("class", "'class' is no name"),
        ("2fast", "'2fast' is no name"),
        ("dmd2", "'dmd2' is taken, by a plugin"),
        ("random", "'random' is taken, by a plugin or a module of Python"),
        ("mine", "mine.py exists; remove it, or choose another name"),
        ("new --folder nowhere", "nowhere/new.py"),
    ],
)
def test_a_bad_name_is_an_error_of_one_line_and_writes_nothing(command, name, message, capsys):
    Path("mine.py").write_text("precious")
    with pytest.raises(SystemExit) as stopped:
        main([command, *name.split()])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert message in error
    assert [path.name for path in Path().iterdir()] == ["mine.py"]
    assert Path("mine.py").read_text() == "precious"
