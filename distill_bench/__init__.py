"""distill_bench: compares objectives that distil video diffusion models into few-step students."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout `methods/` and `eval/` lie beside this folder; installed, they are subpackages of it. Guarded: an unguarded
# append would let `import distill_bench.pip` succeed from site-packages.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "methods").is_dir():
    __path__.append(str(_checkout))
