"""Network passes of one update, counted by running the method's own code on a stand-in network.

The trainer's phases and the ledger do the counting, so a method declares nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import torch

from distill_bench.config.resolve import method_of
from distill_bench.config.schema import AdapterConfig, RunConfig
from distill_bench.draws import Draws
from distill_bench.networks.ledger import PASSES, Ledger
from distill_bench.plan.stand_in import LAYER, SHAPE, StandIn
from distill_bench.teachers.architecture import block_count
from distill_bench.teachers.folder import teacher_folder
from distill_bench.teachers.kinds import find_teacher
from distill_bench.train.assemble import assemble
from distill_bench.train.inputs import Rows, exits, needs_of
from distill_bench.train.processes import OneProcess
from distill_bench.train.run import Run

Counts = dict[str, dict[str, float]]  # role -> kind of pass -> count, as in `Ledger.counts`

# Settings that decide which passes an update makes, besides `adapter` and `guidance_scale`.
DECISIVE = (
    "method",
    "fake_score",
    "fake_score_updates",
    "nfe",
    "stepping",
    "exit_step",
    "student_input",
    "reuse_rollout",
)
BATCH = 2


def passes(config: RunConfig) -> Counts:
    """Batched passes per student update, fake-score updates included; mean over exit steps.

    Raises:
        ValueError: if the method fails on the stand-in network.
    """
    settings = {name: getattr(config, name) for name in DECISIVE}
    reduced = RunConfig(
        **settings,
        guidance_scale=1.0 if config.guidance_scale == 1 else 2.0,
        adapter=None if config.adapter is None else AdapterConfig(rank=1, targets=(LAYER,)),
        batch_size=BATCH,
        ema=None,
    )
    counts = _passes(reduced.model_dump_json(), *block_counts(config))
    return {role: dict(row) for role, row in counts.items()}


def priced(counts: Counts, sizes: Mapping[str, float]) -> float:
    """Forward equivalents of `counts`; roles missing in `sizes` are as large as the student."""
    ledger = Ledger(1, dict(sizes), counts)
    return ledger.forward_equivalents()


def step_flops(flops: Mapping[str, float], config: RunConfig) -> tuple[float, float]:
    """FLOPs of one student update with its fake-score updates on the whole batch.

    Args:
        flops: of one forward per sample, by role.

    Returns:
        The FLOPs that the ledger counts, and the FLOPs recomputed by gradient checkpointing.
    """
    needed = recomputed = 0.0
    for role, row in passes(config).items():
        per_pass = flops[role] * config.batch_size
        needed += sum(PASSES[kind] * count for kind, count in row.items()) * per_pass
        recomputed += (row["input_backward"] + row["full_backward"]) * per_pass
    return needed, recomputed if config.gradient_checkpointing else 0.0


def block_counts(config: RunConfig) -> tuple[int, int]:
    """Blocks of the teacher's and the student's network; (1, 1) if the teacher has no networks."""
    teacher = find_teacher(config.teacher)
    if not teacher.has_networks:
        return 1, 1
    student = teacher.folder if config.student is None else teacher_folder(config.student)
    return block_count(teacher.folder), block_count(student)


@functools.cache
def _passes(config_json: str, blocks: int, student_blocks: int) -> Counts:
    config = RunConfig.model_validate_json(config_json)
    name = config.method["name"]
    method = method_of(config).rehearsed()
    steps = exits(config)
    # both phases meet each of their exits equally often
    points = range(math.lcm(len(steps), len([s for s in steps if s >= method.first_exit])))
    pipeline = StandIn(blocks, student_blocks)
    one = torch.zeros(1, *SHAPE)
    rows = Rows("extra", {"x0": one, "noise": one}, pipeline.texts(pipeline.prompts()), [0])
    try:
        with torch.random.fork_rng(devices=[]):
            run = assemble(
                config,
                pipeline,
                OneProcess(torch.device("cpu")),
                dict.fromkeys(needs_of(config), rows),
                method,
            )
            for point in points:
                run.batches = dataclasses.replace(run.batches, draws=_exiting_at(point))
                _rehearse(run)
    except Exception as error:
        raise ValueError(
            f"{name}: an update on a stand-in network failed ({type(error).__name__}: {error}); "
            "its cost is unknown"
        ) from error
    return {
        role: {kind: row[kind] / len(points) for kind in PASSES}
        for role, row in run.ledger.counts.items()
    }


def _rehearse(run: Run) -> None:
    """Run the forwards and backwards of one update, without optimiser steps."""
    kept = []
    run.student.backward(run.student_losses(kept))
    for index, samples in enumerate(run.fake_score_samples(kept)):
        run.fake_score.backward(run.fake_score_losses(index, samples))


@functools.cache
def _exiting_at(point: int) -> type[Draws]:
    """Class of draws with which every rollout exits at step `point` modulo the number of exits."""

    class ExitingDraws(Draws):
        def shared_integer(self, purpose: str, high: int) -> int:
            return point % high if purpose == "exit" else super().shared_integer(purpose, high)

    return ExitingDraws
