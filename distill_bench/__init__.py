"""distill_bench: compares objectives that distil video diffusion models into few-step students.

Where to look, in the order in which a run goes through it:

the line            sweep > train > sample > evaluate > report > plot, and job, which does one run of it
contracts           method (an objective), evaluator (a metric); registry finds both, testing holds objectives against theirs
the border          config (YAML, runs, their ids), cli, teacher (what a name means), protocol (what makes rows comparable)
training            noise, draws (randomness), rollout, cost (the ledger), signals, extras, discriminator, checkpoint
networks            models and architectures (diffusers), networks (how a run holds them: masters, adapters, sharding), texts and
                    embed, memory (what a run will need), export and schedulers (students as pipelines)
the embedded domain shapes (its clips), autoencoder, encoders, pretrain (trains what ships), gaussian (the teacher in closed form)
clips               media (folders of them), features (networks that look at them), controls (clips wrong in a known way)
running             store (a folder a run), local, slurm, scheduler, stop, status, provenance
tables              gather (store to data files), results (rows), stats, tables, canvas (what figures share), compare, verify
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout `methods/` and `eval/` lie beside this folder; installed, they are subpackages of it. Guarded: an unguarded
# append would let `import distill_bench.pip` succeed from site-packages.
ROOT = Path(__file__).resolve().parent
ASSETS = ROOT / "assets"
_checkout = ROOT.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "methods").is_dir():
    __path__.append(str(_checkout))
