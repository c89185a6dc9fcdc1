"""TODO: export.draws."""

import contextlib
import functools
import itertools
from collections.abc import Iterator

import diffusers
import torch

from distill_bench.draws import generator


@contextlib.contextmanager
def harness_draws(pipe: diffusers.DiffusionPipeline, seed: int) -> Iterator[torch.Generator]:
    """Inside, an exported pipeline that is given this generator draws the noises of one clip as `distill_bench.sample` does.

    On a CPU. The pipeline makes the first noise by the generator, and its scheduler the later ones by that or by torch's own:
    both are seeded before each step.
    """
    draws, step, after = generator("sample", seed, 0), pipe.scheduler.step, itertools.count(1)

    @functools.wraps(step)  # pipelines look at what it takes
    def seeded(*inputs: object, **options: object) -> object:
        for_this = generator("sample", seed, next(after)).initial_seed()
        draws.manual_seed(for_this)
        torch.manual_seed(for_this)
        return step(*inputs, **options)

    with torch.random.fork_rng(devices=[]):
        pipe.scheduler.step = seeded
        try:
            yield draws
        finally:
            del pipe.scheduler.step
