"""A sweep file over the tiny pipeline."""

import json
from pathlib import Path

import pytest
from runs import TINY_RUN


@pytest.fixture
def sweep_file(tiny_wan: Path, tmp_path: Path) -> Path:
    """A sweep of two seeds of one tiny run."""
    path = tmp_path / "few.yaml"
    base = TINY_RUN | {"teacher": str(tiny_wan)}
    path.write_text(json.dumps({"question": "Does it end?", "base": base, "seeds": 2}))
    return path
