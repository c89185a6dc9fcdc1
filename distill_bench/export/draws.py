"""Makes an exported pipeline draw the noise that the harness draws for a clip."""

import contextlib
import functools
import itertools
from collections.abc import Iterator

import diffusers
import torch

from distill_bench.draws import generator


@contextlib.contextmanager
def harness_draws(pipe: diffusers.DiffusionPipeline, seed: int) -> Iterator[torch.Generator]:
    """Make `pipe`, on a CPU, draw the noise that `distill_bench.sample` draws for one clip.

    The first noise comes from the yielded generator, which must be passed to the pipeline. The
    scheduler draws later noises from this generator or from torch's global generator, depending on
    its class, so both are seeded before each step.

    Args:
        pipe: an exported pipeline.
        seed: sampling seed of the clip, as in manifest.jsonl.

    Yields:
        The generator to pass: `pipe(..., generator=draws)`.
    """
    draws = generator("sample", seed, 0)
    step = pipe.scheduler.step
    later_steps = itertools.count(1)

    @functools.wraps(step)  # pipelines inspect the signature
    def seeded_step(*inputs: object, **options: object) -> object:
        step_seed = generator("sample", seed, next(later_steps)).initial_seed()
        draws.manual_seed(step_seed)
        torch.manual_seed(step_seed)
        return step(*inputs, **options)

    with torch.random.fork_rng(devices=[]):
        pipe.scheduler.step = seeded_step
        try:
            yield draws
        finally:
            del pipe.scheduler.step
