"""Closed forms for Gaussian data: scores, and a linear student's moments and fake score.

For a prompt, data are N(m, C) with m = mean + text @ shifts. The noisy density is N((1 - s) m, K)
with K = (1 - s)^2 C + s^2 I, so the clean prediction is m + (1 - s) C K^-1 (x_t - (1 - s) m).
Guidance moves the mean only: the guided teacher is the exact denoiser of N(m_null + g (m - m_null),
C). A linear student maps Gaussians to Gaussians at every step, so its samples have exact moments
and an exact fake score.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill_bench.noise import Stepping

# Noise levels between which the student's linear map is interpolated: on the bundled teacher, a new
# student is within 4 % of the map that it starts from.
KNOTS = 9
# Variance added to the student's start: at sigma 1 the teacher predicts its mean, without variance.
SPREAD = 0.5


def noisy_covariance(covariance: Tensor, sigma: Tensor) -> Tensor:
    """Covariance K (B, d, d) of x_t at sigma (B,), for clean samples of covariance (d, d)."""
    s = sigma[:, None, None]
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return (1 - s) ** 2 * covariance + s**2 * eye


def gaussian_velocity(x_t: Tensor, sigma: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """E[noise - x0 | x_t] (B, d) for data N(mean, covariance).

    Equals (s I - (1 - s) C) K^-1 (x_t - (1 - s) m) - m, and stays accurate down to sigma 0.

    Args:
        x_t: noisy samples, (B, d).
        sigma: noise levels in [0, 1], (B,).
        mean: one per sample, (B, d), or M of them, (M, B, d), for M velocities (M, B, d).
        covariance: (d, d).
    """
    s = sigma[:, None]
    centred = x_t - (1 - s) * mean
    whitened = solve(noisy_covariance(covariance, sigma), centred)
    return s * whitened - (1 - s) * whitened @ covariance - mean


def velocity_matrix(sigma: Tensor, covariance: Tensor) -> Tensor:
    """W (B, d, d) of the velocity W (x_t - (1 - s) m) - m at sigma (B,), for data N(m, C)."""
    s = sigma[:, None, None]
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return (s * eye - (1 - s) * covariance) @ torch.linalg.inv(noisy_covariance(covariance, sigma))


def of_mean(weight: Tensor, sigma: Tensor) -> Tensor:
    """Matrix (B, d, d) by which a velocity weight (x_t - (1 - s) m) - m depends on m."""
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    return -((1 - sigma[:, None, None]) * weight + eye)


def solve(matrix: Tensor, x: Tensor) -> Tensor:
    """Solutions y of matrix y = x; each matrix is factored once.

    Args:
        matrix: one per sample, (B, d, d).
        x: (B, d) or (M, B, d), as are the solutions.
    """
    columns = x.reshape(-1, *x.shape[-2:]).permute(1, 2, 0)
    return torch.linalg.solve(matrix, columns).permute(2, 0, 1).reshape(x.shape)


def log_density(x_t: Tensor, sigma: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """log p(x_t) without the constant -d/2 log(2 pi), (B,) or (M, B).

    The arguments are those of `gaussian_velocity`.
    """
    noisy = noisy_covariance(covariance, sigma)
    centred = x_t - (1 - sigma[:, None]) * mean
    mahalanobis = (centred * solve(noisy, centred)).sum(-1)
    return -0.5 * (mahalanobis + torch.linalg.slogdet(noisy)[1])


class GaussianBlock(nn.Module):
    """Denoiser of N(mean + text @ shifts, factor factor^T): teacher and trained fake score."""

    def __init__(self, mean: Tensor, shifts: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.mean = nn.Parameter(mean.clone())
        self.shifts = nn.Parameter(shifts.clone())
        self.factor = nn.Parameter(torch.linalg.cholesky(covariance))

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Velocity of x_t (B, d), as tokens (B, 1, d)."""
        mean = self.mean + text @ self.shifts
        return gaussian_velocity(x_t, sigma, mean, self.factor @ self.factor.T)[:, None]

    def at(self, sigma: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Matrix (B, d, d) and offset (B, d) of the velocity at sigma (B,) for text (B, E)."""
        weight = velocity_matrix(sigma, self.factor @ self.factor.T)
        mean = self.mean + text @ self.shifts
        return weight, torch.einsum("bij,bj->bi", of_mean(weight, sigma), mean)


class LinearBlock(nn.Module):
    """The student: a velocity linear in x_t and text, interpolated in sigma between KNOTS maps."""

    def __init__(self, mean: Tensor, shifts: Tensor, covariance: Tensor) -> None:
        super().__init__()
        s = torch.linspace(0, 1, KNOTS, dtype=mean.dtype)
        eye = torch.eye(len(mean), dtype=mean.dtype)
        # the teacher's own velocity, minus a term that leaves variance at sigma 1
        weight = velocity_matrix(s, covariance) - SPREAD * s[:, None, None] ** 2 * eye
        on_mean = of_mean(weight, s)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(on_mean @ mean)
        self.shifts = nn.Parameter(shifts @ on_mean.transpose(1, 2))

    def at(self, sigma: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Matrix (B, d, d) and offset (B, d) of the velocity at sigma (B,) for text (B, E)."""
        place = sigma.clamp(0, 1) * (KNOTS - 1)
        below = place.floor().clamp(max=KNOTS - 2).long()
        share = (place - below).to(self.weight.dtype)
        weight = torch.lerp(self.weight[below], self.weight[below + 1], share[:, None, None])
        offset = self.bias + torch.einsum("be,ked->bkd", text, self.shifts)
        rows = torch.arange(len(sigma), device=sigma.device)
        return weight, torch.lerp(offset[rows, below], offset[rows, below + 1], share[:, None])

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Velocity of x_t (B, d), as tokens (B, 1, d)."""
        weight, offset = self.at(sigma, text)
        return (torch.einsum("bij,bj->bi", weight, x_t) + offset)[:, None]


def step_moments(
    block: LinearBlock | GaussianBlock, sigmas: Tensor, stepping: Stepping, text: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Means (B, d) and covariance (d, d) of the clean prediction at each step of a rollout.

    Mirrors `distill_bench.rollout.rollout`.

    Args:
        sigmas: the student's noise levels, high to low.
        stepping: as for `rollout`.
        text: (B, E).
    """
    dtype, d = block.shifts.dtype, block.shifts.shape[-1]
    eye = torch.eye(d, dtype=dtype, device=text.device)
    # moments of x_t; the rollout starts from pure noise
    mean = torch.zeros(len(text), len(eye), dtype=dtype, device=text.device)
    covariance = eye
    moments = []
    for step, sigma in enumerate(sigmas.to(dtype)):
        weight, offset = block.at(sigma.expand(len(text)), text.to(dtype))
        weight = weight[0]  # equal for all texts
        clean = eye - sigma * weight
        clean_mean = mean @ clean.T - sigma * offset
        clean_covariance = clean @ covariance @ clean.T
        moments.append((clean_mean, clean_covariance))
        if step + 1 == len(sigmas):
            break
        lower = sigmas[step + 1].to(dtype)
        if stepping == "renoise":
            mean = (1 - lower) * clean_mean
            covariance = (1 - lower) ** 2 * clean_covariance + lower**2 * eye
        elif stepping == "ode":
            move = eye + (lower - sigma) * weight
            mean = mean @ move.T + (lower - sigma) * offset
            covariance = move @ covariance @ move.T
        else:
            share = float(stepping)
            of_x_t = lower * math.sqrt(1 - share**2) / sigma
            of_clean = 1 - lower - of_x_t * (1 - sigma)
            move = of_x_t * eye + of_clean * clean
            mean = of_x_t * mean + of_clean * clean_mean
            covariance = move @ covariance @ move.T + (share * lower) ** 2 * eye
    return moments


@dataclass(frozen=True)
class Gaussians:
    """M weighted Gaussians per sample, which share a covariance."""

    mean: Tensor  # (M, B, d)
    covariance: Tensor  # (d, d)
    log_weight: Tensor  # (M, B), up to a constant per sample


@dataclass(frozen=True)
class RolloutSamples:
    """The student's own rollouts: one Gaussian per exit step."""

    sigmas: Tensor  # the student's noise levels, high to low
    stepping: Stepping
    exits: Sequence[int]

    def density(self, block: LinearBlock, text: Tensor) -> list[Gaussians]:
        """Density of the samples for each text (B, E), as parts of a mixture."""
        moments = step_moments(block, self.sigmas, self.stepping, text)
        log_weight = text.new_zeros(1, len(text))
        return [
            Gaussians(mean[None], covariance, log_weight)
            for mean, covariance in (moments[i] for i in self.exits)
        ]


@dataclass(frozen=True)
class DataSamples:
    """Predictions from noised real latents: one Gaussian per exit step and per row of the data.

    Given a row y and the exit level s, the input is N((1 - s) y, s^2 I), and the student is linear.
    A sample has a row of its own text, each of these rows equally likely.
    """

    sigmas: Tensor  # the student's noise levels, high to low
    exits: Sequence[int]
    x0: Tensor  # rows, (N, d)
    text: Tensor  # of the rows, (N, E)

    def density(self, block: LinearBlock, text: Tensor) -> list[Gaussians]:
        """Density of the samples for each text (B, E), as parts of a mixture."""
        dtype = block.weight.dtype
        own_text = (self.text[:, None] == text).all(-1)  # (N, B)
        log_weight = own_text.to(dtype).log()
        eye = torch.eye(self.x0.shape[1], dtype=dtype, device=text.device)
        parts = []
        for sigma in self.sigmas[list(self.exits)].to(dtype):
            weight, offset = block.at(sigma.expand(len(text)), text.to(dtype))
            clean = eye - sigma * weight[0]  # equal for all texts
            mean = (1 - sigma) * self.x0.to(dtype) @ clean.T
            means = mean[:, None] - sigma * offset
            parts.append(Gaussians(means, sigma**2 * clean @ clean.T, log_weight))
        return parts


@dataclass(frozen=True)
class ExactFakeScore:
    """E[x0 | x_t] of the student's current samples, whose density is a mixture of Gaussians.

    Each component's denoiser is weighted by the component's posterior probability.
    """

    student: nn.Module  # a FlatNetwork of a LinearBlock
    samples: RolloutSamples | DataSamples

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Clean prediction (B, C, T, H, W) of x_t at sigma (B,) with text (B, 1, E)."""
        flat = x_t.flatten(1)
        with torch.no_grad():
            density = self.samples.density(self.student.blocks[0], text[:, 0])
        predictions, log_weights = [], []
        for part in density:
            moments = part.mean.to(flat.dtype), part.covariance.to(flat.dtype)
            predictions.append(flat - sigma[:, None] * gaussian_velocity(flat, sigma, *moments))
            log_weights.append(log_density(flat, sigma, *moments) + part.log_weight.to(flat.dtype))
        weight = torch.cat(log_weights).softmax(0)
        return (weight[..., None] * torch.cat(predictions)).sum(0).reshape(x_t.shape)

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        """Velocity as tokens (B, 1, d), as a `FlatNetwork` returns; `depth` has no effect."""
        return ((x_t - self(x_t, sigma, text)) / sigma.reshape(-1, 1, 1, 1, 1)).flatten(1)[:, None]
