"""Conformance checks that a run's settings and draws reach their places under a method."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill_bench.config.resolve import load_run
from distill_bench.draws import Draws
from distill_bench.method import Batch, Loss
from distill_bench.noise import student_sigmas
from distill_bench.testing.runs import Runs, conformance
from distill_bench.train import checkpoint
from distill_bench.train.loop import train, update
from distill_bench.train.run import Run
from distill_bench.train.setup import build

WIDE = 2**62  # integers below this identify their stream; smaller ones coincide by chance

# distinct, so that a value in another place shows
SETTINGS = {
    "student_input": "rollout",
    "student_lr": 3e-3,
    "fake_score_lr": 1e-3,
    "ema": 0.75,
    "nfe": 3,
    "shift": 3.0,
    "exit_step": "last",
    "score_shift": 1.5,
    "sigma_min": 0.1,
    "sigma_max": 0.9,
    "guidance_scale": 2.5,
    "grad_clip": 1e6,
}


@conformance
def check_draws(runs: Runs) -> None:
    """Phases draw for the whole batch; updates, phases, purposes and samples share no draw.

    One purpose names one draw of a phase: noise and its level have different purposes. The noise of
    the rollout is the rollout's own: no term of a loss may use it again.
    """
    record = _Record()

    class Recorded(Draws):
        def noise(self, purpose: str, shape: Any) -> Tensor:
            assert record.in_rollout or not purpose.startswith("rollout/"), (
                f"a loss draws {purpose!r}, the rollout's own noise; give the draw another purpose"
            )
            record.samples.setdefault((self.student_update, self.phase), set()).update(self.indices)
            noise = super().noise(purpose, shape)
            record.rows(self, purpose, f"noise {tuple(shape)}", noise)
            return noise

        def uniform(self, purpose: str) -> Tensor:
            uniform = super().uniform(purpose)
            record.rows(self, purpose, "uniform", uniform)
            return uniform

        def integers(self, purpose: str, high: int) -> list[int]:
            stream = torch.tensor(super().integers(purpose, WIDE))
            record.rows(self, purpose, f"integers below {high}", stream)
            return super().integers(purpose, high)

        def shared_uniform(self, purpose: str) -> Tensor:
            uniform = super().shared_uniform(purpose)
            record.shared(self, purpose, "shared uniform", float(uniform[0]))
            return uniform

        def shared_integer(self, purpose: str, high: int) -> int:
            stream = super().shared_integer(purpose, WIDE)
            record.shared(self, purpose, f"shared integer below {high}", stream)
            return super().shared_integer(purpose, high)

    run_dir = runs.make(accumulation=2)
    run = build(load_run(run_dir), run_dir.parent, draws=Recorded)
    rollout = record.during_rollout(run.nets.rollout)
    object.__setattr__(run.nets, "rollout", rollout)  # every part of the run holds these nets
    phases = ["student", *(f"fake_score/{index}" for index in range(run.fake_score_updates))]
    for _ in range(2):
        update(run)
    expected = {(u, phase): set(range(run.config.batch_size)) for u in (0, 1) for phase in phases}
    for key, indices in expected.items():
        assert record.samples.get(key) == indices, (
            f"the phase {key[1]} of update {key[0]} draws noise for the samples "
            f"{sorted(record.samples.get(key, ()))}, not {sorted(indices)}"
        )
    unexpected = sorted(record.samples.keys() - expected.keys())
    assert not unexpected, f"draws for unknown phases: {unexpected}"


class _Record:
    """All draws of a run, by their values; a draw of integers is known by its stream."""

    def __init__(self) -> None:
        self.names: dict[Any, str] = {}  # by value
        self.kinds: dict[str, str] = {}  # by purpose, phase and update
        self.once: dict[str, float] = {}  # value of a shared draw
        self.samples: dict[tuple[int, str], set[int]] = {}  # that draw noise
        self.in_rollout = False

    def rows(self, draws: Draws, purpose: str, kind: str, values: Tensor) -> None:
        """Record the draws of each sample."""
        where = self._where(draws, purpose, kind)
        for index, row in zip(draws.indices, values, strict=True):
            name = where.replace(",", f" of sample {index},", 1)
            self._unlike_others(row.numpy(force=True).tobytes(), name, kind)

    def shared(self, draws: Draws, purpose: str, kind: str, value: float) -> None:
        """Record a draw that all samples share."""
        name = self._where(draws, purpose, kind)
        assert self.once.setdefault(name, value) == value, (
            f"{name}: the {kind} differs between micro-batches"
        )
        self._unlike_others(value, name, kind)

    def _where(self, draws: Draws, purpose: str, kind: str) -> str:
        name = f"{purpose!r}, {draws.phase}, update {draws.student_update}"
        other = self.kinds.setdefault(name, kind)
        assert other == kind, (
            f"{name} draws both {other} and {kind} from one stream; give each its own purpose"
        )
        return name

    def _unlike_others(self, value: Any, name: str, kind: str) -> None:
        kind = kind.partition(" below")[0].partition(" (")[0]
        other = self.names.setdefault((kind, value), name)
        assert other == name, f"{name} and {other} have the same {kind}"

    def during_rollout(self, make_samples: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
        """A rollout during which `in_rollout` is true."""

        def rollout(batch: Batch) -> Tensor:
            self.in_rollout = True
            try:
                return make_samples(batch)
            finally:
                self.in_rollout = False

        return rollout


@conformance
def check_settings(runs: Runs) -> None:
    """The run's rates, average, noise levels and guidance reach their places."""
    run_dir = runs.make(**SETTINGS)
    levels: set[tuple[float, ...]] = set()

    class Recorded(Draws):
        def sigma(self, purpose: str, *options: float) -> Tensor:
            levels.add(options[:3])
            return super().sigma(purpose, *options)

    run = build(load_run(run_dir), run_dir.parent, draws=Recorded)
    start = {name: p.detach().clone() for name, p in run.trained["student"].named_parameters()}
    _check_guidance(run)
    _check_sampler(run)
    _check_rates(run)
    expected = {(1.5, 0.1, 0.9)}
    assert levels <= expected, f"noise levels are drawn with (shift, low, high) {levels - expected}"

    train(run_dir)
    weights = load_file(checkpoint.folders(run_dir)[-1] / "weights.safetensors")
    kept = load_file(checkpoint.students(run_dir)[1])
    for name, first in start.items():
        average = 0.75 * first + 0.25 * weights[f"student.{name}"]
        assert torch.allclose(kept[name], average, rtol=1e-5, atol=1e-7), (
            f"the kept student's {name} is not its moving average"
        )


def _check_guidance(run: Run) -> None:
    batch = run.batch("student")
    inputs = batch.noise("testing/noise"), batch.sigma("testing/sigma")
    with torch.no_grad():
        cond = run.nets.unguided_teacher(*inputs, batch.text)
        uncond = run.nets.unguided_teacher(*inputs, run.nets.null_text.expand_as(batch.text))
        guided = run.nets.teacher(*inputs, batch.text)
    assert torch.allclose(guided, uncond + 2.5 * (cond - uncond), rtol=1e-4, atol=1e-5), (
        "the teacher is not uncond + guidance_scale (cond - uncond)"
    )


def _check_sampler(run: Run) -> None:
    """The student predicts at its own levels, one after the other."""
    student, sampled = run.nets.student, []
    velocity = student.velocity

    def recorded(x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        sampled.append(float(sigma[0]))
        return velocity(x_t, sigma, text)

    student.velocity = recorded
    try:
        with torch.no_grad():
            run.nets.rollout(run.batch("student"))
    finally:
        student.velocity = velocity
    expected = student_sigmas(3, 3.0).tolist()
    assert torch.allclose(torch.tensor(sampled), torch.tensor(expected)), (
        f"the rollout predicts at the levels {sampled}, not {expected}"
    )


def _check_rates(run: Run) -> None:
    """The first step of Adam moves the weights with a clear gradient by the learning rate."""
    student = run.networks["student"]
    start = _weights(student)
    run.update_student()
    _check_rate("the student", _weights(student) - start, 3e-3)
    if run.fake_score is None:
        return
    own = run.method.learning_rates()
    nets = {"the fake score": (run.networks["fake_score"], 1e-3)}
    for name, module in run.networks["modules"].items():
        if list(module.parameters()):
            nets[f"the module {name}"] = module, own.get(name, 1e-3)
    before = {name: _weights(net) for name, (net, _) in nets.items()}
    run.update_fake_score(0)
    for name, (net, rate) in nets.items():
        _check_rate(name, _weights(net) - before[name], rate)


def _check_rate(name: str, moves: Tensor, rate: float) -> None:
    largest = float(moves.abs().max())
    assert 0.8 * rate < largest < 1.01 * rate, (
        f"{name} moves by {largest:.3g} in its first step, but its learning rate is {rate:g}"
    )


def _weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in net.parameters()])


@conformance
def check_discriminator(runs: Runs) -> None:
    """A module that reads data and samples learns to tell them apart, and the student opposes it.

    A shift of the module's outputs on data and one of those on samples must move the module's loss,
    in opposite directions, and the latter must move the student's loss the other way. Modules that
    read only data, or only samples, are not checked.
    """
    run = runs.untrained
    if run.fake_score is None:
        return
    for name, module in run.networks["modules"].items():
        run.fake_score.only_trainable()
        on_data, on_samples = _slopes(module, lambda scale: _fake_score_loss(run, scale))
        if on_data is None or on_samples is None:
            continue
        assert on_data * on_samples < 0, (
            f"the loss of the module {name} does not move its outputs on data and on the student's "
            f"samples in opposite directions (slopes {on_data:.3g} and {on_samples:.3g})"
        )
        run.student.only_trainable()
        _, of_student = _slopes(module, lambda scale: _student_loss(run, scale))
        assert not of_student or of_student * on_samples <= 0, (
            f"the student's loss does not oppose that of the module {name} "
            f"(slopes {of_student:.3g} and {on_samples:.3g} in its outputs on samples)"
        )


def _fake_score_loss(run: Run, scale: float) -> Loss:
    batch = run.batch("fake_score/0")
    with torch.no_grad():
        x0 = scale * run.nets.rollout(batch)
    return run.method.fake_score_loss(run.nets, batch, x0)


def _student_loss(run: Run, scale: float) -> Loss:
    nets = dataclasses.replace(run.nets, rollout=lambda batch: scale * run.nets.rollout(batch))
    return run.method.student_loss(nets, run.batch("student"))


def _slopes(
    module: nn.Module, loss_of: Callable[[float], Loss]
) -> tuple[float | None, float | None]:
    """Derivatives of a loss by a common shift of a module's outputs on data, and on samples.

    Outputs on samples are those that change if the samples are scaled. A penalty on differences of
    outputs (R1) has no derivative by a common shift. None: the module makes no such outputs.
    """

    def outputs(scale: float) -> tuple[list[Tensor], list[Tensor], Loss]:
        values: list[Tensor] = []
        shifts: list[Tensor] = []

        def shifted(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                return None
            values.append(output.detach())
            shifts.append(output.new_zeros(()).requires_grad_())
            return output + shifts[-1]

        handle = module.register_forward_hook(shifted)
        try:
            return values, shifts, loss_of(scale)
        finally:
            handle.remove()

    values, shifts, loss = outputs(1.0)
    if not shifts:
        return None, None
    others, _, _ = outputs(1.5)
    slopes = torch.autograd.grad(loss.total, shifts, allow_unused=True, materialize_grads=True)
    of_data: list[float] = []
    of_samples: list[float] = []
    for value, other, slope in zip(values, others, slopes, strict=True):
        (of_data if torch.equal(value, other) else of_samples).append(float(slope))
    return sum(of_data) if of_data else None, sum(of_samples) if of_samples else None
