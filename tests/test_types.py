"""`make types` reports a type error in each file that it checks."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONTRACTS = ("discriminator", "draws", "evaluator", "method", "noise", "registry", "rollout")


@pytest.mark.slow  # mypy reads torch, unless its cache is there
def test_a_type_error_planted_in_any_checked_file_is_reported(tmp_path):
    """Errors are planted in copies, which mypy reads in place of the files."""
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    assert {f"distill_bench/{name}.py" for name in CONTRACTS} <= set(checked)
    shadows = []
    for path in checked:
        copy = tmp_path / path.replace("/", "-")
        copy.write_text((ROOT / path).read_text() + '\nplanted: int = "a string"\n')
        shadows += ["--shadow-file", path, str(copy)]
    mypy = [sys.executable, "-m", "mypy", *shadows]
    result = subprocess.run(mypy, cwd=ROOT, capture_output=True, text=True, check=False)
    reported = {
        line.partition(":")[0]
        for line in result.stdout.splitlines()
        if line.endswith("[assignment]")
    }
    assert result.returncode == 1
    assert reported == set(checked), result.stdout + result.stderr
