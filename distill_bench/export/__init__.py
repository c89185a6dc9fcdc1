"""Export a run's student as a diffusers pipeline folder with scheduler and model card."""

from distill_bench.export.draws import harness_draws
from distill_bench.export.pipeline import export

__all__ = ["export", "harness_draws"]
