"""Provenance of a result: code, packages, machine, job. Recorded in every attempt of every run."""

import ast
import hashlib
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from distill_bench import ROOT, __version__
from distill_bench.registry import method_file
from distill_bench.store.files import text_lines

PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "safetensors", "numpy", "submitit")
SLURM_KEYS = {
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_NODELIST",
    "SLURM_NNODES",
    "SLURM_NTASKS",
    "SLURM_CPUS_PER_TASK",
    "SLURM_JOB_ACCOUNT",
    "SLURM_JOB_QOS",
}

# Packages and modules that decide a run's weights and clips. Everything else may change during a
# run: the run's id covers all steps before run.yaml is written, and evaluators have their own
# versions.
NUMBERS = (
    "autoencoder",
    "config/protocol",
    "config/resolve",
    "config/rows",
    "config/schema",
    "discriminator",
    "domain",
    "draws",
    "expressions",
    "method",
    "networks",
    "noise",
    "rollout",
    "sample/references",
    "sample/released_weights",
    "sample/rows",
    "sample/run",
    "sample/sampler",
    "sample/write_folder",
    "teachers",
    "train",
)


def provenance() -> dict:
    """Versions, commit, hardware and scheduler of this process."""
    return {
        "version": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": hardware(),
        "machine": {
            "platform": platform.platform(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "gpus": _gpus(),
        },
        "slurm": {key: value for key, value in sorted(os.environ.items()) if key in SLURM_KEYS},
    }


def hardware() -> str:
    """Name of the device that a run computes on; rounding differs between devices."""
    return ", ".join(dict.fromkeys(_gpus())) or _cpu()


def dirty_diff() -> str:
    """Uncommitted changes of the checkout, as a patch; empty if it is clean or not a checkout."""
    return _git("diff", "HEAD", "--no-color") or ""


def code_fingerprint(method: str) -> str:
    """Digest (12 digits) of a method's file, if the method is not "", and of the code in NUMBERS.

    Comments, docstrings, layout and command lines (`__main__.py`) do not count.
    """
    own = method_file(method) if method else None
    files = [own, *sorted(path for name in NUMBERS for path in _sources(name))]
    trees = [syntax_digest(path.read_text(encoding="utf-8")) for path in files if path is not None]
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:12]


def _sources(name: str) -> list[Path]:
    """The files of a module or, recursively, of a package."""
    if (ROOT / name).is_dir():
        return [path for path in (ROOT / name).rglob("*.py") if path.name != "__main__.py"]
    return [ROOT / f"{name}.py"]


@cache
def syntax_digest(source: str) -> str:
    """Digest of a module's syntax tree without docstrings (also those of attributes)."""
    tree = _WithoutDocstrings().visit(ast.parse(source))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        constant = node.value if isinstance(node.value, ast.Constant) else None
        return None if constant is not None and isinstance(constant.value, str) else node


def _git(*arguments: str) -> str | None:
    """Output of git in this package's checkout; None if it is not in a checkout or git fails."""
    if not (ROOT.parent / "pyproject.toml").is_file():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT.parent), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    """Name and numbers of the processor; on virtual machines several models share a name."""
    try:
        first, _, _ = (
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")
        )
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in text_lines(first))
    info = {key.strip(): value.strip() for key, _, value in pairs}
    keys = [key for key in ("cpu family", "model", "stepping") if key in info]
    numbers = [f"{key.removeprefix('cpu ')} {info[key]}" for key in keys]
    return " ".join([info.get("model name") or platform.machine(), *numbers])


def _gpus() -> list[str]:
    import torch  # takes seconds, and --status needs only fingerprints

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
