"""The gradient of each objective at x0 equals the template of its formula, in float64.

With D = x0_fake - x0_teacher, r = x0 - x0_fake, J = (1 - sigma) d x0_fake / d x_t and N elements, the gradient at x0 is
(a D + J^T (b D + lam r)) / N. The Jacobian is written out by `torch.func.jacrev`, not by the code under test.
"""

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
    """A nonlinear denoiser whose Jacobian is dense: tanh of a random mixing of all latents."""
    g = torch.Generator().manual_seed(seed)
    size = 2**4
    mix, out = (torch.randn(size, size, generator=g, dtype=torch.float64) / 4 for _ in range(2))

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


def template(nets: Nets, batch: Batch, x0: Tensor, a, b, lam) -> Tensor:
    """(a D + J^T (b D + lam r)) / N at the batch's own draws; coefficients are functions of (sigma, n)."""
    sigma, noise = batch.sigma("renoise/sigma"), batch.noise("renoise/noise")
    x_t = add_noise(x0.detach(), noise, sigma)
    x0_fake, x0_teacher = (
        nets.fake_score(x_t, sigma, batch.text),
        nets.teacher(x_t, sigma, batch.text),
    )
    gap, residual = x0_fake - x0_teacher, x0.detach() - x0_fake
    n = (x0.detach() - x0_teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    s = over(sigma, x0)
    cotangent = b(s, n) * gap + lam(s, n) * residual
    rows = []
    for i in range(B):
        jacobian = torch.func.jacrev(
            lambda x, i=i: nets.fake_score(x[None], sigma[i : i + 1], batch.text)[0]
        )(x_t[i])
        jacobian = (1 - sigma[i]) * jacobian.reshape(cotangent[i].numel(), -1)
        rows.append((jacobian.T @ cotangent[i].flatten()).reshape(SHAPE))
    return (a(s, n) * gap + torch.stack(rows)) / x0.numel()


def zero(s, n):
    return torch.zeros_like(s)


ROWS = {
    "dmd2": (DMD2(), lambda s, n: 1 / n, zero, zero),
    "dmd": (DMD(), lambda s, n: 1 / n, zero, zero),
    "sgmd official": (SGMD(), zero, lambda s, n: 1 / (n + 1e-8), lambda s, n: 0.1 / s),
    "sgmd paper": (
        SGMD("c_t", "x0", "x0"),
        zero,
        lambda s, n: (1 - s) ** 2 / s**4,
        lambda s, n: 0.1 + zero(s, n),
    ),
    "sgmd without residual": (SGMD(residual_weight=0.0), zero, lambda s, n: 1 / (n + 1e-8), zero),
}


@pytest.mark.parametrize("row", ROWS)
def test_the_gradient_at_x0_equals_the_template(row, setting):
    nets, batch, x0 = setting
    method, a, b, lam = ROWS[row]
    (gradient,) = torch.autograd.grad(method.student_loss(nets, batch).total, x0)
    assert gradient.dtype == torch.float64
    torch.testing.assert_close(
        gradient, template(nets, batch, x0, a, b, lam), rtol=1e-12, atol=1e-15
    )


def test_the_template_itself_agrees_with_finite_differences_of_the_fisher_term(setting):
    """SGMD without residual is the derivative of |x0_fake - sg(x0_teacher)|^2 / (2 sg(n)): no autograd on this side."""
    nets, batch, x0 = setting
    sigma, noise = batch.sigma("renoise/sigma"), batch.noise("renoise/noise")
    x_t = add_noise(x0.detach(), noise, sigma)
    teacher = nets.teacher(x_t, sigma, batch.text)
    n = (x0.detach() - teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True) + 1e-8

    def fisher(x: Tensor) -> Tensor:
        return (
            0.5
            * (nets.fake_score(add_noise(x, noise, sigma), sigma, batch.text) - teacher) ** 2
            / n
        ).mean()

    (gradient,) = torch.autograd.grad(SGMD(residual_weight=0.0).student_loss(nets, batch).total, x0)
    step = 1e-6
    for index in range(0, x0.numel(), 7):
        bump = torch.zeros(x0.numel(), dtype=torch.float64)
        bump[index] = step
        bump = bump.reshape(x0.shape)
        slope = (fisher(x0.detach() + bump) - fisher(x0.detach() - bump)) / (2 * step)
        torch.testing.assert_close(gradient.flatten()[index], slope, rtol=1e-6, atol=1e-10)


def test_the_regression_of_dmd_reaches_the_student_with_its_weight(setting):
    nets, batch, x0 = setting
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    nets = dataclasses.replace(nets, student=lambda x, s, t: scale * x)
    (slope,) = torch.autograd.grad(
        DMD(regression_weight=0.25).student_loss(nets, batch).total, scale
    )
    z, y = (batch.extra("ode_pairs")[key] for key in ("noise", "x0"))
    torch.testing.assert_close(slope, 0.25 * ((z - y) * z).mean())


def test_the_fake_score_losses_are_denoising_in_their_own_space(setting):
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


def exact(x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """The denoiser of N(0, 1): x_t (1 - sigma) / ((1 - sigma)^2 + sigma^2)."""
    s = over(sigma, x_t)
    return x_t * (1 - s) / ((1 - s) ** 2 + s**2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "lam"),
    [
        (DMD2(), lambda s: 0 * s),
        (SGMD(residual_weight=0.0), lambda s: 0 * s),
        (SGMD(), lambda s: 0.1 / s),
        (SGMD("c_t", "x0", "x0"), lambda s: 0.1 + 0 * s),
    ],
    ids=str,
)
def test_at_the_optimum_only_the_residual_leaves_a_pull_and_it_is_the_closed_form(method, lam):
    """Data and student both N(0, 1), both scores exact: the score terms vanish, in every direction.

    The residual averages to zero given x_t, so it moves no mean; but it detaches x0, which stays correlated with the student's
    own derivative: along a scale of the student it pulls by E[lam (1 - s) k Var(x0 | x_t)], k = (1 - s) / ((1 - s)^2 + s^2),
    Var = s^2 / ((1 - s)^2 + s^2), towards a narrower student.
    """
    many = 20_000
    draws = Draws(0, 0, "student", range(many), torch.device("cpu"), torch.float64)
    batch = Batch(torch.zeros(many, 1, 1), draws, (1, 1, 1, 1), 1.0, 0.3, 0.9)
    x0 = draws.noise("x0", (1, 1, 1, 1)).requires_grad_()
    nets = Nets(student=exact, fake_score=exact, teacher=exact, rollout=lambda _: x0)
    (gradient,) = torch.autograd.grad(method.student_loss(nets, batch).total, x0)
    shift = gradient.flatten() * many
    scale = shift * x0.detach().flatten()
    s = batch.sigma("renoise/sigma")
    variance = (1 - s) ** 2 + s**2
    pull = (lam(s) * (1 - s) ** 2 * s**2 / variance**2).mean()
    for moment, expected in ((shift, 0.0), (scale, pull)):
        assert abs(moment.mean() - expected) <= 4 * moment.std() / many**0.5 + 1e-12


def test_approximate_r1_has_both_sides_of_its_gradient_in_features_that_are_trained():
    """The derivative by a weight of the role is that of the stated loss, by finite differences."""
    draws = Draws(0, 0, "fake_score/0", range(B), torch.device("cpu"), torch.float64)
    batch = Batch(torch.zeros(B, 1, 1, dtype=torch.float64), draws, SHAPE, 1.0, 0.02, 0.98)
    real, weight = (
        draws.noise("real", SHAPE),
        torch.tensor(1.3, dtype=torch.float64, requires_grad=True),
    )
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
    step, ends = 1e-5, []
    with torch.no_grad():
        for move in (step, -2 * step):
            weight += move
            ends.append(r1())
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=0)
