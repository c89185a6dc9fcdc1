"""Where a result comes from: code, packages, machine, job. Written into every attempt of every run."""

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

PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "safetensors", "numpy", "submitit")
# packages and modules whose code decides a run's numbers; everything else (commands, the store, tables, evaluators, which
# have versions of their own) may change under a run
NUMBERS = (
    "autoencoder", "config", "discriminator", "domain", "draws", "expressions", "method", "networks", "noise", "rollout",
    "sample", "teachers", "train",
)  # fmt: skip


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


def hardware() -> str:
    """The kind of device that a run computes on: another kind rounds otherwise, and training makes much of that in some runs."""
    return ", ".join(dict.fromkeys(_gpus())) or _cpu()


def dirty_diff() -> str:
    """The uncommitted changes of the checkout, as a patch; empty for a clean or installed one."""
    return _git("diff", "HEAD", "--no-color") or ""


def code_fingerprint(method: str) -> str:
    """Digest (12 digits) of the syntax trees of a method's file and of the NUMBERS packages; comments, docstrings and layout
    do not count."""
    modules = sorted(path for name in NUMBERS for path in _sources(name))
    files = [path for path in (method_file(method), *modules) if path is not None]
    trees = [syntax_digest(path.read_text()) for path in files]
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:12]


def _sources(name: str) -> list[Path]:
    """The files of a module or, recursively, of a package."""
    return (
        [ROOT / f"{name}.py"]
        if (ROOT / f"{name}.py").is_file()
        else list((ROOT / name).rglob("*.py"))
    )


@cache
def syntax_digest(source: str) -> str:
    """A digest of a module's syntax tree without docstrings, those of class attributes included."""
    tree = _WithoutDocstrings().visit(ast.parse(source))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        constant = node.value if isinstance(node.value, ast.Constant) else None
        return None if constant is not None and isinstance(constant.value, str) else node


def _git(*arguments: str) -> str | None:
    """The output of git in the checkout that this package lies in; None where it lies in none."""
    if not (ROOT.parent / "pyproject.toml").is_file():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT.parent), *arguments], capture_output=True, text=True, timeout=20
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
    """The processor's name with its numbers: virtual machines call unlike ones by one name."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        return platform.processor() or platform.machine()
    said = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in first.splitlines())
    }
    numbers = [
        f"{key.removeprefix('cpu ')} {said[key]}"
        for key in ("cpu family", "model", "stepping")
        if key in said
    ]
    return " ".join([said.get("model name") or platform.machine(), *numbers])


def _gpus() -> list[str]:
    import torch

    return (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
