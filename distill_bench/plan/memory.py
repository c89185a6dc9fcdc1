"""Predict peak memory by role, and FLOPs per update, from the configs of a teacher.

`distill-bench cost SWEEP --memory` prints both. On a GPU with less memory, training stops before
its first step.
"""

import math

import torch

from distill_bench.config.schema import RunConfig
from distill_bench.networks.ranks import ranks
from distill_bench.plan.cost import block_counts
from distill_bench.plan.prediction import Prediction, extrapolate, sharded
from distill_bench.plan.rehearsal import rehearsed
from distill_bench.plan.sampling import sampling_peak
from distill_bench.plan.too_large import too_large, too_large_to_sample
from distill_bench.teachers.folder import TeacherError
from distill_bench.teachers.kinds import find_teacher


def predicted(config: RunConfig, processes: int = 1) -> Prediction:
    """Predict the memory per process and the FLOPs per forward of every role.

    Args:
        processes: number of processes that train the run together.

    Raises:
        TeacherError: if the teacher has no networks.
    """
    if not find_teacher(config.teacher).has_networks:
        raise TeacherError(
            f"teacher {config.teacher!r} has no networks: its memory cannot be predicted"
        )
    share = processes if config.sharding else 1
    config = config.model_copy(
        update={"sharding": False, "compile": False, "trackers": (), "threads": None}
    )
    keeps_samples = config.reuse_rollout == "graph" or config.fake_score_rollouts == "batched"
    if config.accumulation > 2 and not keeps_samples:
        # every micro-batch after the second needs as much as the second
        batch_size = config.batch_size // config.accumulation * 2
        config = config.model_copy(update={"accumulation": 2, "batch_size": batch_size})
    blocks = block_counts(config)
    # All blocks have the same size, so every number is linear in the block count, at a fixed ratio
    # of teacher to student blocks.
    whole = math.gcd(*blocks)
    ratio = [count // whole for count in blocks]
    few = math.ceil(2 / min(ratio))
    if 2 * few >= whole:
        prediction, in_flight = rehearsed(config, blocks, processes)
    else:
        low, in_flight = rehearsed(config, tuple(few * n for n in ratio), processes)
        high, _ = rehearsed(config, tuple(2 * few * n for n in ratio), processes)
        prediction = extrapolate(low, high, (whole - few) / few)
    return prediction if share == 1 else sharded(prediction, share, in_flight)


def check_memory(config: RunConfig) -> None:
    """Compare the predicted memory of a run with this process's GPU before anything is loaded.

    Raises:
        ValueError: if training or sampling needs more than the GPU has.
    """
    here = ranks()
    if here.device.type != "cuda" or not find_teacher(config.teacher).has_networks:
        return
    available = torch.cuda.get_device_properties(here.device).total_memory
    reason = too_large(predicted(config, here.world), available, config)
    reason = reason or too_large_to_sample(sampling_peak(config), available, config)
    if reason is not None:
        raise ValueError(reason)
