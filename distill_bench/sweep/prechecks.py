"""Checks of what follows training, made before the first run: evaluators, batches, folders.

The evaluators see stand-in clips with the size, rate and prompts of the clips that they will score.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from distill_bench.config.errors import ConfigError
from distill_bench.config.schema import RunConfig
from distill_bench.evaluator import Clips
from distill_bench.registry import evaluators, find_evaluator
from distill_bench.sample.sampler import protocol_prompts
from distill_bench.store.failures import first_line
from distill_bench.sweep.manifest import OpenSweep
from distill_bench.teachers.kinds import find_teacher
from distill_bench.teachers.prompts import read_prompts


def check_sweep(sweep: OpenSweep, processes: int) -> list[str]:
    """Check a sweep before its first run; returns warnings, one line each.

    Args:
        processes: processes that train each run together.

    Raises:
        ConfigError: if the runs would fail after their start, or their scores or results could not
            be written.
    """
    for run, config in sweep.runs.items():
        parts = processes * config.accumulation
        if config.batch_size % parts:
            raise ConfigError(
                f"{run}: batch_size {config.batch_size} must be a multiple of processes x "
                f"accumulation = {processes} x {config.accumulation}; set cluster.tasks"
            )
    if (folder := sweep.out / sweep.config.name).exists() and not folder.is_dir():
        raise ConfigError(f"results go to {folder}, which is not a folder; remove it, or set --out")
    return check_evaluators(sweep.runs.values())


def check_evaluators(runs: Iterable[RunConfig]) -> list[str]:
    """Check that the evaluators of the runs can score their clips; returns those left out.

    Raises:
        ConfigError: if an evaluator that the protocol names cannot, or its weights do not load.
    """
    config = next(iter(runs))  # all runs share a protocol
    clips = stand_in_clips(config)
    named = config.protocol.evaluators
    left_out = []
    for name in evaluators() if named is None else named:
        try:
            reason = find_evaluator(name)().reason_to_skip(clips)
        except (ValueError, OSError) as error:
            raise ConfigError(f"evaluator {name}: {first_line(error)}") from error
        if reason is None:
            continue
        if named is not None:
            raise ConfigError(f"protocol.evaluators: {name} cannot score the clips: {reason}")
        left_out.append(f"evaluator {name} is left out: {reason}")
    return left_out


def stand_in_clips(config: RunConfig) -> Clips:
    """Black clips with the size, rate, prompts and seeds of a run's clips."""
    teacher = find_teacher(config.teacher)
    if teacher.has_networks:
        path = teacher.folder / "prompts.txt" if config.prompts is None else Path(config.prompts)
        known = read_prompts(path)
        shape = (config.frames, 3, config.height, config.width)
    else:
        pipeline = teacher.load(torch.device("cpu"))
        known = pipeline.prompts()
        latents = pipeline.latent_shape(config.frames, config.height, config.width)
        shape = tuple(pipeline.decode(torch.zeros(1, *latents)).shape[1:])
    prompts = protocol_prompts(known, config.protocol)
    seeds = [config.protocol.seed + index for index in range(len(prompts))]
    frames = np.broadcast_to(np.uint8(0), (len(prompts), *shape))
    return Clips(frames, prompts, seeds, config.protocol.fps)
