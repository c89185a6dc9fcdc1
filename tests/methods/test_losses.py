"""Loss terms beside the matching term: regression, denoising losses of the fake score, R1."""

import dataclasses

import pytest
import torch
from torch import Tensor

from distill_bench.discriminator import Head, approximate_r1, renoised_features
from distill_bench.draws import Draws
from distill_bench.method import Batch, Nets, velocity_loss
from distill_bench.methods.dmd import DMD
from distill_bench.methods.dmd2 import DMD2
from distill_bench.methods.sgmd import SGMD
from distill_bench.noise import add_noise, over

SHAPE, B = (2, 2, 2, 2), 3


def smooth_net(seed: int):
    """Nonlinear denoiser that mixes all latents."""
    generator = torch.Generator().manual_seed(seed)
    size = 2**4
    mix, out = torch.randn(2, size, size, generator=generator, dtype=torch.float64) / 4

    def net(x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        flat = x_t.reshape(len(x_t), -1)
        return (flat + torch.tanh(flat @ mix + sigma[:, None]) @ out).reshape(x_t.shape)

    return net


@pytest.fixture
def setting():
    draws = Draws(3, 0, "student", range(B), torch.device("cpu"), torch.float64)
    pairs = {
        "noise": draws.noise("z", SHAPE),
        "x0": draws.noise("y", SHAPE),
        "text": torch.zeros(B, 1, 1, dtype=torch.float64),
    }
    batch = Batch(
        torch.zeros(B, 1, 1, dtype=torch.float64),
        draws,
        SHAPE,
        2.0,
        0.02,
        0.98,
        {"ode_pairs": lambda _: pairs},
    )
    x0 = draws.noise("x0", SHAPE).requires_grad_()
    nets = Nets(
        student=smooth_net(0), fake_score=smooth_net(1), teacher=smooth_net(2), rollout=lambda _: x0
    )
    return nets, batch, x0


def test_the_regression_of_dmd_reaches_the_student_with_its_weight(setting):
    nets, batch, _ = setting
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    nets = dataclasses.replace(nets, student=lambda x, s, t: scale * x)
    (slope,) = torch.autograd.grad(
        DMD(regression_weight=0.25).student_loss(nets, batch).total, scale
    )
    z, y = (batch.extra("ode_pairs")[key] for key in ("noise", "x0"))
    torch.testing.assert_close(slope, 0.25 * ((z - y) * z).mean())


def test_the_fake_score_learns_to_denoise_in_velocity_or_in_x0(setting):
    nets, batch, x0 = setting
    sigma, noise = batch.sigma("denoise/sigma"), batch.noise("denoise/noise")
    error = x0.detach() - nets.fake_score(add_noise(x0.detach(), noise, sigma), sigma, batch.text)
    velocity = 0.5 * (error / over(sigma, x0)).square().mean()
    for loss in (
        velocity_loss(nets.fake_score, batch, x0.detach()),
        DMD2().fake_score_loss(nets, batch, x0.detach()).total,
        SGMD().fake_score_loss(nets, batch, x0.detach()).total,
    ):
        torch.testing.assert_close(loss, velocity)
    paper = SGMD("c_t", "x0", "x0").fake_score_loss(nets, batch, x0.detach())
    torch.testing.assert_close(paper.total, 0.05 * error.square().mean())


def test_approximate_r1_differentiates_both_of_its_passes_through_trained_features():
    """Its derivative by a weight of the role agrees with finite differences of the stated loss."""
    draws = Draws(0, 0, "fake_score/0", range(B), torch.device("cpu"), torch.float64)
    batch = Batch(torch.zeros(B, 1, 1, dtype=torch.float64), draws, SHAPE, 1.0, 0.02, 0.98)
    real = draws.noise("real", SHAPE)
    weight = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Head(2).double()

    class Role:
        def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
            return torch.tanh(weight * x_t).flatten(2).transpose(1, 2)

    def r1() -> Tensor:
        logit = head(renoised_features(Role(), batch, real, batch.text, "gan_real", 0.5))
        return approximate_r1(logit, head, Role(), batch, real, batch.text, 0.5, 0.1)

    (slope,) = torch.autograd.grad(r1(), weight)
    step = 1e-5
    with torch.no_grad():
        weight += step
        above = r1()
        weight -= 2 * step
        below = r1()
    torch.testing.assert_close(slope, (above - below) / (2 * step), rtol=1e-6, atol=0)
