"""A run's student as a diffusers pipeline folder with scheduler, model card and snippet."""

from distill_bench.export.draws import harness_draws
from distill_bench.export.pipeline import export

__all__ = ["export", "harness_draws"]
