"""The wheel in an environment of its declared requirements alone, used outside the checkout."""

import os
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SWEEP = """
question: Does an installed package run a sweep?
base:
  student_updates: 2
  nfe: 1
  batch_size: 2
  evaluations: 1
  trackers: []
  protocol: {clips: 4, teacher_steps: 2, evaluators: [motion]}
grid: {method: [dmd2]}
"""


def required_distributions(name: str) -> list[metadata.Distribution]:
    """Installed distributions that `name` requires without any extra, recursively."""
    queue = [(name, frozenset({""}))]
    for required, extras in queue:  # the queue grows as it is read
        for line in metadata.requires(required) or []:
            requirement = Requirement(line)
            marker = requirement.marker
            applies = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)
            entry = (requirement.name, frozenset({"", *requirement.extras}))
            if applies and entry not in queue:
                queue.append(entry)
    return [metadata.distribution(required) for required, _ in queue[1:]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and links to its requirements, which are 6 GB."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = folder / "checkout"  # a copy: setuptools also packs what an older build left behind
    for name in ("distill_bench", "methods", "eval"):
        shutil.copytree(
            ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, checkout], check=True)
    venv.create(folder / "env", with_pip=False)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    for distribution in required_distributions("distill-bench"):
        tops = {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}
        for top in tops:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    (wheel,) = folder.glob("*.whl")
    target = [*pip, "--python", folder / "env" / "bin" / "python"]
    subprocess.run([*target, "install", "--no-deps", wheel], check=True)
    subprocess.run([*target, "check"], check=True)
    return folder / "env"


@pytest.mark.slow
def test_a_wheel_lists_its_plugins_runs_a_sweep_and_verifies_its_tables(environment, tmp_path):
    clean = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    clean |= {"PATH": f"{environment}/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}

    def output(*command: str) -> str:
        return subprocess.run(
            command, cwd=tmp_path, env=clean, check=True, text=True, stdout=subprocess.PIPE
        ).stdout

    where = output("python", "-c", "import distill_bench; print(distill_bench.__file__)")
    assert Path(where.strip()).is_relative_to(environment)
    listed = output("distill-bench", "list")
    for plugin in [*(ROOT / "methods").glob("*.py"), *(ROOT / "eval").glob("*.py")]:
        assert plugin.stem == "__init__" or plugin.stem in listed
    (tmp_path / "tiny.yaml").write_text(SWEEP)
    output("python", "-m", "distill_bench.sweep", "tiny.yaml", "--cluster=local", "--jobs=1")
    assert (tmp_path / "results" / "tiny" / "report.html").exists()
    output("distill-bench", "verify", "results/tiny")
