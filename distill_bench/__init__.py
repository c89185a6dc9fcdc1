"""distill_bench: compares objectives that distil video diffusion models into few-step students.

The packages, in the order in which a run meets them:

store          run folders on disk: atomic files, claims, states, stop requests; needs no torch
teachers       the meaning of a teacher's name: folders, checks, texts, one file per architecture
domain         the embedded domain: moving shapes, teachers in closed form, broken clips
config         keys of a YAML, their checks, and the ids of runs
networks       networks as denoisers: loading, precision, adapters, sharding, offload, cost
train          the only training loop (loop.py) and its parts
sample         clips of students and references
evaluate       scores of clips, and the networks that evaluators look through
plan           cost and memory of a run before it starts
export         a student as a diffusers pipeline with a model card
report         tables, figures and page of a sweep's results; needs no torch
sweep          expands a grid, launches its runs (SLURM or this machine), watches them
pretrain       trains the networks that ship with the package
testing        conformance checks for methods, ours and yours

The contracts and the mathematics, one file each:

method         contract of an objective, and the pieces objectives share; objectives lie in methods/
evaluator      contract of a metric; metrics lie in eval/
registry       finds methods and evaluators by name
noise          the noise convention: sigma, velocity, clean prediction
draws          random numbers keyed by seed, update, purpose and sample
rollout        sampling: the student's few steps, the teacher's many
expressions    the expressions of YAML files, e.g. conditions on runs
discriminator  heads and losses of GAN terms

The rest:

autoencoder    the autoencoder of the embedded teacher; its pipeline folder names this module
schedulers     the noise scheduler of exported CogVideoX students; their folders name this module
cli            distill-bench COMMAND
"""

import io
import logging
import sys
from pathlib import Path

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parent
ASSETS = ROOT / "assets"

# A checkout keeps `methods/` and `eval/` beside this folder; an installed package has them inside.
# The guard keeps site-packages off the path: otherwise `import distill_bench.pip` would succeed.
_checkout = ROOT.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "methods").is_dir():
    __path__.append(str(_checkout))

# A terminal of another encoding than UTF-8 shows `?` for characters that it lacks.
for _stream in (sys.stdout, sys.stderr):
    if isinstance(_stream, io.TextIOWrapper):
        _stream.reconfigure(errors="replace")

# Without a writable home, matplotlib keeps its font cache in a temporary folder, and warns of it.
logging.getLogger("matplotlib").addFilter(
    lambda record: record.funcName != "_get_config_or_cache_dir"
)
