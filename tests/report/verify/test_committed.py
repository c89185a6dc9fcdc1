"""The committed results follow from their data files, and their README's example runs."""

import re
from pathlib import Path

import pytest

from distill_bench.report.verify import verify

RESULTS = Path(__file__).parents[3] / "results"
LARGE = ("mini-wan", "stepping_gaussian", "stepping_mini_wan")  # seconds each
COMMITTED = [
    pytest.param(path.parent, marks=[pytest.mark.slow] * (path.parent.name in LARGE))
    for path in sorted(RESULTS.rglob("sweep.json"))
]


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_results_follow_from_their_data_files(folder):
    """Tables, captions, LaTeX and digests: a change of any of them is a change of the results."""
    assert verify(folder) == []


def test_the_example_in_the_readme_of_the_results_runs(monkeypatch):
    monkeypatch.chdir(RESULTS.parent)
    (code,) = re.findall(r"```python\n(.*?)```", (RESULTS / "README.md").read_text(), re.DOTALL)
    exec(code, {})
