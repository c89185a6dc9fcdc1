"""Expected gradients against closed forms: a linear student of Gaussian data, with exact scores.

Expectations are exact, too: they are averages over the points of a cubature of degree three.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from distill_bench.domain.gaussian import gaussian_velocity
from distill_bench.methods.decoupled_dmd import DecoupledDMD
from distill_bench.methods.dmd import DMD
from distill_bench.methods.dmd2 import DMD2
from distill_bench.methods.f_distill import FDistill
from distill_bench.methods.gradient_template import GradientTemplate
from distill_bench.methods.ida import IDA
from distill_bench.methods.sgmd import SGMD
from distill_bench.methods.sid import SiD
from distill_bench.methods.tsg_fisher import TSGFisher
from distill_bench.methods.tsg_sim import TSGSIM
from distill_bench.testing.gradient import student_gradient


@dataclasses.dataclass
class Gaussians:
    """Student x0 = mean + scale z and target N(target_mean, target_scale target_scale^T).

    In d dimensions, at one noise level; the student equals the target if `at_optimum`.
    """

    sigma: float
    at_optimum: bool = False
    d: int = 3

    def __post_init__(self):
        generator = torch.Generator().manual_seed(5)
        eye = torch.eye(self.d, dtype=torch.float64)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.target_mean = draw(self.d)
        self.target_scale = draw(self.d, self.d) / 2 + eye
        self.mean = draw(self.d)
        self.scale = draw(self.d, self.d) / 2 + eye
        if self.at_optimum:
            self.mean, self.scale = self.target_mean, self.target_scale

    def points(self) -> tuple[Tensor, Tensor]:
        """Values of z and noise, (4 d, d) each: 4 d points on the axes.

        Their average is the expectation of every polynomial up to degree three.
        """
        axes = (2 * self.d) ** 0.5 * torch.eye(2 * self.d, dtype=torch.float64)
        both = torch.cat([axes, -axes])
        return both[:, : self.d], both[:, self.d :]

    def denoiser(self, mean: Tensor, scale: Tensor):
        def predict(x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
            flat = x_t.flatten(1)
            velocity = gaussian_velocity(flat, sigma, mean.expand_as(flat), scale @ scale.T)
            return (flat - sigma[:, None] * velocity).reshape(x_t.shape)

        return predict

    def expected_gradient(self, method) -> tuple[Tensor, Tensor]:
        """E[g] and E[g z^T]: derivatives by the student's mean and scale."""
        z, noise = self.points()
        x0 = (self.mean + z @ self.scale.T).reshape(-1, self.d, 1, 1, 1)
        at_x0 = student_gradient(
            method,
            x0,
            noise.reshape(x0.shape),
            torch.full((len(x0),), self.sigma, dtype=torch.float64),
            self.denoiser(self.mean, self.scale),
            self.denoiser(self.target_mean, self.target_scale),
        )
        gradient = self.d * at_x0.flatten(1)
        return gradient.sum(0), gradient.T @ z  # the loss is a mean over samples already

    def kl(self, mean: Tensor, scale: Tensor) -> Tensor:
        """KL of the noisy student from the noisy target."""
        s, eye = self.sigma, torch.eye(self.d, dtype=torch.float64)
        p, q = ((1 - s) ** 2 * a @ a.T + s**2 * eye for a in (scale, self.target_scale))
        shift = (1 - s) * (mean - self.target_mean)
        log_ratio = torch.linalg.slogdet(q)[1] - torch.linalg.slogdet(p)[1]
        trace = torch.trace(torch.linalg.solve(q, p))
        return 0.5 * (trace - self.d + shift @ torch.linalg.solve(q, shift) + log_ratio)

    def affine(self, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """P (d, d) and q (d,) of the exact denoiser P x_t + q."""
        s, covariance = self.sigma, scale @ scale.T
        noisy = (1 - s) ** 2 * covariance + s**2 * torch.eye(self.d, dtype=torch.float64)
        p = (1 - s) * covariance @ torch.linalg.inv(noisy)
        return p, mean - (1 - s) * p @ mean


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_the_expected_gradient_of_dmd_is_that_of_the_reverse_kl(sigma):
    """Up to (1 - s)^2 / s^2: score differences are (1 - s)/s^2 D, and dx_t/dx0 is 1 - s."""
    k = Gaussians(sigma)
    mean, scale = (x.clone().requires_grad_() for x in (k.mean, k.scale))
    expected_mean, expected_scale = torch.autograd.grad(k.kl(mean, scale), (mean, scale))
    weight = (1 - sigma) ** 2 / sigma**2
    gradient_mean, gradient_scale = k.expected_gradient(GradientTemplate("1", normaliser="none"))
    torch.testing.assert_close(weight * gradient_mean, expected_mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(weight * gradient_scale, expected_scale, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_tsg_fisher_follows_the_fisher_term_and_the_residual_of_sgmd_moves_no_mean(sigma):
    """Derivative of c/2 E|P x_t + q - sg(x0_teacher)|^2 by the input of an exact fake score."""
    k = Gaussians(sigma)
    (p, q), (p_t, q_t) = k.affine(k.mean, k.scale), k.affine(k.target_mean, k.target_scale)
    c = (1 - sigma) ** 2 / sigma**4
    expected_mean = c * (1 - sigma) * p.T @ ((p - p_t) @ k.mean * (1 - sigma) + q - q_t)
    expected_scale = c * (1 - sigma) ** 2 * p.T @ (p - p_t) @ k.scale
    fisher_mean, fisher_scale = k.expected_gradient(TSGFisher("c_t"))
    torch.testing.assert_close(fisher_mean, expected_mean, rtol=1e-9, atol=1e-9 * float(c))
    torch.testing.assert_close(fisher_scale, expected_scale, rtol=1e-9, atol=1e-9 * float(c))
    sgmd_mean, sgmd_scale = k.expected_gradient(SGMD("c_t", "x0"))
    torch.testing.assert_close(sgmd_mean, expected_mean, rtol=1e-9, atol=1e-9 * float(c))
    # E[r | x_t] = 0, but the detached x0 in r stays correlated with z: along the scale, the
    # residual pulls by lam (1 - s) P^T E[r z^T]
    pull = 0.1 * (1 - sigma) * p.T @ (k.scale - (1 - sigma) * p @ k.scale)
    torch.testing.assert_close(sgmd_scale, expected_scale + pull, rtol=1e-9, atol=1e-9 * float(c))


# Weight of the residual that methods with a detached x0 or a detached teacher keep.
DETACHED = {
    SGMD(): lambda s, n: 0.1 / s,
    SGMD("c_t", "x0"): lambda s, n: 0.1,
    TSGSIM(): lambda s, n: 1 / n,
}
AT_OPTIMUM = [
    DMD2(),
    DMD(),
    IDA(),
    FDistill(gan_weight=0.0),
    TSGFisher(),
    TSGFisher("c_t"),
    SiD(1.2),
    DecoupledDMD(),
    *DETACHED,
]


@pytest.mark.parametrize("method", AT_OPTIMUM, ids=lambda m: type(m).__name__)
def test_at_the_optimum_only_a_detached_residual_leaves_a_pull(method):
    """Along the mean every expected gradient vanishes.

    Along the scale SGMD and TSG-SIM keep the pull of their residual, E[lam J^T r z^T]. SiD has the
    same residual, but differentiates through the teacher, which cancels the pull.
    """
    k = Gaussians(0.5, at_optimum=True)
    mean, scale = k.expected_gradient(method)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
    pull = torch.zeros_like(scale)
    if method in DETACHED:
        (p, q), (z, noise) = k.affine(k.mean, k.scale), k.points()
        x0 = k.mean + z @ k.scale.T
        residual = x0 - ((0.5 * x0 + 0.5 * noise) @ p.T + q)
        weight = DETACHED[method](0.5, residual.abs().mean(1, keepdim=True))
        pull = (weight * residual @ (0.5 * p)).T @ z / len(z)
        assert pull.abs().max() > 1e-3
    torch.testing.assert_close(scale, pull, rtol=1e-7, atol=1e-12)
