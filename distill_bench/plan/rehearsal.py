"""Rehearses both phases of a run on fake tensors and counts the bytes alive at the worst moment.

The count comes from the method's own code, the run's settings and the architecture, not from a
formula. Not counted: savings of `compile`, workspace inside kernels, rounding and fragmentation of
the allocator, the text encoder (freed before the first step), and teacher samples kept as data.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from distill_bench.config.schema import RunConfig
from distill_bench.method import Loss
from distill_bench.networks.precision import Masters
from distill_bench.plan.fake import FakeDraws, fake_tensors
from distill_bench.plan.live_bytes import LiveBytes, device_bytes, offloaded_bytes, total_bytes
from distill_bench.plan.outline import Outline, outline
from distill_bench.plan.prediction import MOMENTS, Prediction
from distill_bench.teachers.architecture import architecture_called
from distill_bench.teachers.experts import networks_in
from distill_bench.train.assemble import assemble
from distill_bench.train.inputs import Rows, needs_of
from distill_bench.train.phase import Phase
from distill_bench.train.processes import OneProcess
from distill_bench.train.reuse import Samples
from distill_bench.train.run import Run

T = TypeVar("T")


def rehearsed(config: RunConfig, blocks: tuple[int, int], processes: int) -> tuple[Prediction, int]:
    """Predict for networks of a given depth; also returns the unsharded bytes that FSDP adds.

    Args:
        blocks: block counts of teacher and student.
        processes: ranks that share the batch.
    """
    # FakeDraws exits at the first step; earlier steps would keep no activations
    config = config.model_copy(update={"exit_step": "random"})
    with fake_tensors():
        pipeline = outline(config, blocks)
        run = assemble(
            config,
            pipeline,
            OneProcess(torch.device("cpu"), processes),
            _extras(config, pipeline),
            draws=FakeDraws,
        )
        return _prediction(run, pipeline, _stages(run)), _in_flight(run)


def _extras(config: RunConfig, pipeline: Outline) -> dict[str, Rows]:
    """Extra data of the right shape for each need of the run."""
    one = torch.empty(1, *pipeline.latent_shape(config.frames, config.height, config.width))
    rows = Rows("extra", {"x0": one, "noise": one}, pipeline.texts([""]), [0])
    return dict.fromkeys(needs_of(config), rows)


def _stages(run: Run) -> dict[str, tuple[int, ...]]:
    """Peak live bytes of each stage (from one network pass to the next), by phase.

    Batched rollouts for the fake score are a phase "rollouts", without gradients.
    """
    live = LiveBytes()
    count = run.ledger.add

    def add(*passed: object) -> None:
        live.mark()
        count(*passed)

    by_phase: dict[str, tuple[int, ...]] = {}

    def record(name: str, work: Callable[[], T]) -> T:
        live.restart()
        result = work()
        by_phase[name] = (*by_phase.get(name, ()), *live.peaks)
        return result

    def backward(phase: Phase, losses: Iterable[Loss]) -> None:
        record(phase.name, lambda: phase.backward(losses))
        phase.zero_grad()

    run.ledger.add = add
    kept: list[Samples | None] = []
    batched = run.config.fake_score_rollouts == "batched"
    with live:
        backward(run.student, run.student_losses(kept))
        updates = run.fake_score_samples(kept)
        # of batched rollouts, the update that makes them and the first that keeps them
        for index in range(min(run.fake_score_updates, 2 if batched else 1)):
            samples = record("rollouts", lambda: next(updates)) if batched else next(updates)
            backward(run.fake_score, run.fake_score_losses(index, samples))
    run.ledger.add = count
    return by_phase


def _prediction(run: Run, pipeline: Outline, stages: Mapping[str, tuple[int, ...]]) -> Prediction:
    """Add up the memory of a run."""
    teacher = run.nets.unguided_teacher.net
    nets = {role: net for role, net in run.networks.items() if role != "modules"}
    trained = {role: run.trained[role] for role in nets}
    sizes = {role: total_bytes(net.parameters()) for role, net in trained.items()}
    modules = total_bytes(run.networks["modules"].parameters())
    vae = 0 if pipeline.vae is None else total_bytes(pipeline.vae.parameters())
    gradients = {
        "student": sizes["student"],
        "fake_score": sizes.get("fake_score", 0) + modules,
        "rollouts": 0,
    }
    flops = {
        role: run.ledger.flops.get(role, run.ledger.flops["student"])
        for role in ("student", "fake_score", "teacher", "target")
    }
    return Prediction(
        weights={role: device_bytes(net) for role, net in {**nets, "teacher": teacher}.items()},
        masters={role: _master_bytes(trained[role], net) for role, net in nets.items()},
        gradients={role: gradients[role] for role in stages},
        moments={role: MOMENTS * size for role, size in sizes.items()},
        ema=total_bytes(run.average.weights.values()),
        other=total_bytes([run.nets.null_text]) + vae + (1 + MOMENTS) * modules,
        stages=stages,
        flops=flops,
        held_back=offloaded_bytes(teacher),
    )


def _master_bytes(trained: nn.Module, net: nn.Module) -> int:
    """Bytes of the float32 masters beside a network, without weights that are their own masters."""
    if not isinstance(trained, Masters):
        return 0
    own = {id(parameter) for parameter in net.parameters()}
    return total_bytes(parameter for parameter in trained.parameters() if id(parameter) not in own)


def _in_flight(run: Run) -> int:
    """Peak unsharded bytes under FSDP2.

    Two gathered blocks (the current and the prefetched one) and, for a trained role, the gradients
    of one block plus their float32 copy during the reduce-scatter.
    """
    most = 0
    roles = {"teacher": run.nets.unguided_teacher.net, **run.networks}
    del roles["modules"]
    for role, net in roles.items():
        net = networks_in(net)[0]  # all have blocks of one size, and one runs at a time
        blocks = [list(block.parameters()) for block in architecture_called(net).blocks(net)]
        in_blocks = {parameter for block in blocks for parameter in block}
        units = [*blocks, [p for p in net.parameters() if p not in in_blocks]]
        size = _largest(total_bytes, units)
        in_float32 = _largest(lambda unit: sum(4 * p.numel() for p in unit), units)
        trained = size + max(size, in_float32)
        most = max(most, 2 * size + (0 if role == "teacher" else trained))
    return most


def _largest(size: Callable[[list[Tensor]], int], units: list[list[Tensor]]) -> int:
    return max(map(size, units))
