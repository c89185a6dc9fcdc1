"""Draws, weights and exits in which the released codes of the field differ from look-alikes.

Sources are in methods/README.md. Each test states a property of the training of a whole run.
"""

import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from distill_bench.config.errors import ConfigError
from distill_bench.config.resolve import resolve
from distill_bench.draws import Draws
from distill_bench.method import Batch, Nets
from distill_bench.methods.decoupled_dmd import DecoupledDMD
from distill_bench.methods.dp_dmd import DPDMD
from distill_bench.noise import teacher_sigmas
from distill_bench.train.run import Run
from distill_bench.train.setup import build

SHAPE, B = (1, 4, 2, 2), 500
UPDATES = 400


def run_of(tmp_path, **fields) -> Run:
    plain = {"teacher": "gaussian", "trackers": [], "nfe": 4, "batch_size": 4}
    return build(resolve(plain | fields), tmp_path)


def batch_of(phase: str = "student", update: int = 0, **fields) -> Batch:
    draws = Draws(0, update, phase, range(B), torch.device("cpu"), torch.float64)
    return Batch(torch.zeros(B, 1, 1, dtype=torch.float64), draws, SHAPE, 2.0, 0.02, 0.98, **fields)


def exits_of(run: Run, phase: str) -> Counter:
    """Number of rollouts per exit step over UPDATES updates."""
    batches = (run.batches.batch(update, phase, 0) for update in range(UPDATES))
    return Counter(run.student_input.exit_step.step(batch) for batch in batches)


def assert_uniform(counts: Counter, steps: range) -> None:
    """Each of `steps`, and no other, within five standard deviations of its share."""
    assert set(counts) == set(steps)
    share = 1 / len(steps)
    tolerance = 5 * (UPDATES * share * (1 - share)) ** 0.5
    assert all(abs(count - UPDATES * share) < tolerance for count in counts.values())


class Recorder:
    """A teacher that predicts a multiple of its input, and keeps noise levels and noise."""

    def __init__(self, x0: Tensor) -> None:
        self.x0 = x0
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        s = sigma[:B].reshape(-1, 1, 1, 1, 1)  # the guidance term stacks two texts
        self.calls.append((sigma[:B], (x_t[:B] - (1 - s) * self.x0) / s))
        return 0.5 * x_t


def decoupled_draws(exit_level: float) -> list[tuple[Tensor, Tensor]]:
    """Noise levels (B,) and noise of the matching and of the guidance term."""
    batch = batch_of()
    x0 = batch.noise("x0")
    teacher = Recorder(x0)
    nets = Nets(
        student=teacher,
        fake_score=lambda x_t, sigma, text: 0.3 * x_t,
        teacher=teacher,
        rollout=lambda _: x0.clone().requires_grad_(),
        exit_sigma=lambda _: torch.full((B,), exit_level, dtype=torch.float64),
        unguided_teacher=teacher,
        null_text=torch.zeros(1, 1, 1, dtype=torch.float64),
        guidance_scale=3.0,
    )
    DecoupledDMD().student_loss(nets, batch)
    return teacher.calls


@pytest.mark.parametrize("exit_level", [1.0, 0.9, 0.4, 0.05, 0.01])
def test_the_guidance_of_decoupled_dmd_has_levels_between_data_and_the_exit(exit_level):
    """The paper's tau_CA > t, with its t from noise to data: uniform in [0, exit level]."""
    (matching, _), (guidance, _) = decoupled_draws(exit_level)
    assert guidance.min() >= min(0.02, exit_level)
    assert guidance.max() <= min(0.98, exit_level)
    if exit_level >= 0.4:
        inside = guidance[(guidance > 0.02) & (guidance < 0.98)]
        assert inside.mean() == pytest.approx(exit_level / 2, rel=0.1)
        assert inside.max() > 0.95 * min(0.98, exit_level)
    # the matching term covers the run's range, whatever the exit
    assert matching.min() < 0.1 < 0.9 < matching.max()


def test_the_terms_of_decoupled_dmd_have_draws_of_their_own():
    (matching, noise), (guidance, other_noise) = decoupled_draws(1.0)
    levels = torch.corrcoef(torch.stack([matching, guidance]))[0, 1]
    noises = torch.corrcoef(torch.stack([noise.flatten(), other_noise.flatten()]))[0, 1]
    assert abs(levels) < 5 / B**0.5
    assert abs(noises) < 5 / noise.numel() ** 0.5


@pytest.mark.parametrize("anchor", [3, 7, 8, 9])
def test_the_regression_of_dp_dmd_is_an_undivided_mean_square(anchor):
    """The derivative by the student's weight w, for a linear student w z and a linear teacher.

    LightX2V@f8aee98, div_loss, and the author's train_sd35_dpdmd.py: weight * mse_loss(velocity(z),
    (z - x_a) / (1 - s_a)), with x_a at level s_a after `anchor` Euler steps.
    """
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    method, batch = DPDMD(diversity_weight=0.05, teacher_steps=10, anchor=anchor), batch_of()

    def student(x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return x_t - sigma.reshape(-1, 1, 1, 1, 1) * w * x_t

    nets = Nets(
        student=student,
        fake_score=lambda x_t, *_: 0.3 * x_t,
        teacher=lambda x_t, *_: 0.25 * x_t,
        rollout=lambda b: b.noise("x0").requires_grad_(),
    )
    (slope,) = torch.autograd.grad(method.student_loss(nets, batch).total, w)
    z, sigmas = batch.noise("diversity/noise"), teacher_sigmas(10, 2.0).double()
    x_a = z
    for high, low in itertools.pairwise(sigmas[: anchor + 1]):
        x_a = x_a + (low - high) * 0.75 * x_a / high
    error = w.detach() * z - (z - x_a) / (1 - sigmas[anchor])
    torch.testing.assert_close(slope, 0.05 * 2 * (error * z).mean(), rtol=1e-9, atol=0)


def test_every_student_update_of_dp_dmd_has_a_kl_term(tmp_path):
    """Exits of the student's phase begin at the second step; the fake score learns from all."""
    run = run_of(tmp_path, method="dp_dmd")
    assert_uniform(exits_of(run, "student"), range(1, 4))
    assert_uniform(exits_of(run, "fake_score/0"), range(4))
    last = run_of(tmp_path, method="dp_dmd", exit_step="last")
    assert set(exits_of(last, "student")) == {3}
    run.student.only_trainable()
    for update in range(8):
        loss = run.method.student_loss(run.nets, run.batches.batch(update, "student", 0))
        (gradient,) = torch.autograd.grad(loss.terms["kl"], loss.x0)
        assert gradient.abs().max() > 0


def test_dp_dmd_needs_a_second_step():
    with pytest.raises(ConfigError, match="nfe 1: dp_dmd trains the student from step 2 on; write"):
        resolve({"method": "dp_dmd", "nfe": 1})


def test_fastvideo_trains_a_random_step_and_draws_one_level_per_batch(tmp_path):
    """FastVideo@2f3d407, dmd2.py: `_student_rollout` and `_sample_score_timestep`."""
    preset = {"name": "gradient_template", "preset": "fastvideo"}
    run = run_of(tmp_path, method=preset, batch_size=8, accumulation=2)
    for phase in ("student", "fake_score/0"):
        assert_uniform(exits_of(run, phase), range(4))
    levels = []
    for update in range(UPDATES):
        of_batch = [run.batches.batch(update, "student", i).sigma("renoise/sigma") for i in (0, 1)]
        assert len(set(torch.cat(of_batch).tolist())) == 1, "one level for all micro-batches"
        levels.append(float(of_batch[0][0]))
    batch = run.batches.batch(0, "student", 0)
    assert batch.sigma("renoise/sigma")[0] != batch.sigma("denoise/sigma")[0]
    # the levels of different batches have the distribution of the levels of different samples
    batch = dataclasses.replace(batch_of(), sigma_min=batch.sigma_min, sigma_max=batch.sigma_max)
    apart = batch.sigma("renoise/sigma")
    assert len(apart.unique()) > 0.8 * B
    assert abs(torch.tensor(levels).mean() - apart.mean()) < 5 * apart.std() * (2 / UPDATES) ** 0.5
    assert abs(torch.tensor(levels).std() / apart.std() - 1) < 0.15
