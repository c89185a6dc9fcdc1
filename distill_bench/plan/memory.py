"""TODO: plan.memory."""

import math

import torch

from distill_bench.config.schema import RunConfig
from distill_bench.networks.ledger import PASSES
from distill_bench.networks.ranks import ranks
from distill_bench.plan.cost import declared
from distill_bench.plan.fake import fake_tensors
from distill_bench.plan.prediction import (
    Prediction,
    extrapolate,
    sharded,
    too_large,
    too_large_to_sample,
)
from distill_bench.plan.rehearsal import Rehearsal, RehearsedSampler
from distill_bench.teachers.architectures import architecture_of
from distill_bench.teachers.folder import TeacherError, teacher_folder
from distill_bench.teachers.kinds import find_teacher


def predicted(config: RunConfig, processes: int = 1) -> Prediction:
    """The memory of each of `processes` that train a run together, and the FLOPs of a step.

    Raises:
        TeacherError: for a teacher that is no pipeline of networks.
    """
    teacher = find_teacher(config.teacher)
    folder = teacher.folder
    if not teacher.has_networks:
        raise TeacherError(
            f"teacher {config.teacher!r} has no networks whose memory could be asked for"
        )
    share = processes if config.sharding else 1
    config = config.model_copy(
        update={"sharding": False, "compile": False, "trackers": (), "threads": None}
    )
    if (
        config.accumulation > 2 and config.reuse_rollout != "graph"
    ):  # after the second, micro-batches are as the second
        batch = config.batch_size // config.accumulation * 2
        config = config.model_copy(update={"accumulation": 2, "batch_size": batch})
    student_folder = folder if config.student is None else teacher_folder(config.student)
    blocks = tuple(
        architecture_of(each).transformer["num_layers"] for each in (folder, student_folder)
    )
    # blocks are alike: with all roles in proportion every number is linear in how many there are, each stage by itself
    whole = math.gcd(*blocks)
    unit = [each // whole for each in blocks]
    few = math.ceil(2 / min(unit))
    if 2 * few >= whole:
        found, in_flight = rehearsed(config, blocks, processes)
    else:
        (low, in_flight), (high, _) = (
            rehearsed(config, tuple(n * each for each in unit), processes) for n in (few, 2 * few)
        )
        found = extrapolate(low, high, (whole - few) / few)
    return found if share == 1 else sharded(found, share, in_flight)


def rehearsed(config: RunConfig, blocks: tuple[int, int], processes: int) -> tuple[Prediction, int]:
    """The prediction for networks of so many blocks (the teacher's, the student's), and what sharding would add to a phase."""
    with fake_tensors():
        rehearsal = Rehearsal(config, blocks, processes)
        return rehearsal.prediction(), rehearsal.in_flight()


def sampling_peak(config: RunConfig) -> int:
    """The most bytes at once on one device while a run's clips or their references are drawn and decoded."""
    with fake_tensors():
        return RehearsedSampler(config).peak()


def step_flops(found: Prediction, config: RunConfig) -> tuple[float, float]:
    """FLOPs of one student update with its fake-score updates, over the whole batch; and those of checkpointing on top.

    The first is what the ledger counts; a backward of a checkpointed network runs its forward again.
    """
    needed = again = 0.0
    for role, row in declared(config).items():
        each = found.flops[role] * config.batch_size
        needed += sum(PASSES[kind] * n for kind, n in row.items()) * each
        again += (row["input_backward"] + row["full_backward"]) * each
    return needed, again if config.gradient_checkpointing else 0.0


def check_memory(config: RunConfig) -> None:
    """Compare the predicted memory of a run with this process's GPU, before anything is loaded.

    Raises:
        ValueError: if training or sampling needs more than the GPU has.
    """
    here = ranks()
    if here.device.type != "cuda" or not find_teacher(config.teacher).has_networks:
        return
    available = torch.cuda.get_device_properties(here.device).total_memory
    why = too_large(predicted(config, here.world), available, config)
    why = why or too_large_to_sample(sampling_peak(config), available, config)
    if why is not None:
        raise ValueError(why)
