"""Closed forms for a Gaussian mixture: scores at every noise level, densities, mode weights.

The components ("modes") share one orthonormal basis, in which their covariances are diagonal. The
prompts share the modes and differ in the modes' weights, so a mixture over prompts is the same
mixture with averaged weights. At noise level s, x_t has the density of a mixture with means
(1 - s) mu and variances k = (1 - s)^2 v + s^2, all in the basis.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from scipy import special
from torch import Tensor, nn

DRAWN_AXES = 0  # seed of the axes without a meaning


@dataclass(frozen=True)
class Mixture:
    """Parameters of a mixture of M modes in d dimensions with P prompts.

    Raises:
        ValueError: if the basis is not orthonormal, a variance is not positive, a mode is not round
            in the motion plane, or the weights of a prompt are negative or do not add up to 1.
    """

    basis: Tensor  # (d, d), one axis per column; the first two are the motion
    means: Tensor  # (M, d), in the basis
    variances: Tensor  # (M, d), in the basis
    weights: Tensor  # (P, M)

    def __post_init__(self) -> None:
        eye = torch.eye(len(self.basis), dtype=self.basis.dtype)
        if not torch.allclose(self.basis.T @ self.basis, eye, atol=1e-5):
            raise ValueError("the basis of a mixture must be orthonormal")
        if not (self.variances > 0).all():
            raise ValueError(f"variances must be positive; found {float(self.variances.min()):.3g}")
        if not torch.equal(self.variances[:, 0], self.variances[:, 1]):
            raise ValueError("both motion axes of a mode must have the same variance")
        total = self.weights.sum(1)
        if (self.weights < 0).any() or not torch.allclose(total, torch.ones_like(total), atol=1e-5):
            raise ValueError(
                "the weights of each prompt must be positive and add up to 1; they add up to "
                f"{float(total.min()):.6g} to {float(total.max()):.6g}"
            )

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class MixtureBlock(nn.Module):
    """The teacher: E[noise - x0 | x_t], exact. A text of zeros means the mixture over prompts."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        for name, value in mixture.tensors().items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Velocity of x_t (B, d) at sigma (B,) with text (B, P), as tokens (B, 1, d)."""
        weights = text @ self.weights + (1 - text.sum(1, keepdim=True)) * self.weights.mean(0)
        z_t, s = x_t @ self.basis, sigma[:, None, None]
        centred = z_t[:, None] - (1 - s) * self.means
        noisy = (1 - s) ** 2 * self.variances + s**2
        share = (weights.log() + log_normal(centred, noisy)).softmax(1)
        velocity = (s - (1 - s) * self.variances) / noisy * centred - self.means
        return ((share[..., None] * velocity).sum(1) @ self.basis.T)[:, None]


def log_normal(centred: Tensor, variances: Tensor) -> Tensor:
    """Log density (...,) of N(0, diag(variances)) at centred (..., d)."""
    square = centred.square() / variances + variances.log() + math.log(2 * math.pi)
    return -0.5 * square.sum(-1)


def joint_log_density(mixture: Mixture, x: Tensor, weights: Tensor) -> Tensor:
    """log w_k p_k(x), (B, M), for x (B, d) and weights (B, M) or (M,); logsumexp is log p(x)."""
    centred = (x @ mixture.basis)[:, None] - mixture.means
    return weights.log() + log_normal(centred, mixture.variances)


def motion(mixture: Mixture, x: Tensor) -> Tensor:
    """Norm (B,) of the two motion coordinates of x (B, d)."""
    return (x @ mixture.basis[:, :2]).norm(dim=1)


def with_motion(mixture: Mixture, x: Tensor, coordinates: Tensor) -> Tensor:
    """The samples x (B, d) with other motion coordinates (B, 2); all other axes keep theirs."""
    plane = mixture.basis[:, :2]
    return x + (coordinates - x @ plane) @ plane.T


def total_variation(shares: Tensor, weights: Tensor) -> Tensor:
    """Total variation (...,) of shares of modes (..., M) from weights, (M,) or (1, M)."""
    return 0.5 * (shares - weights).abs().sum(-1)


def motion_distribution(mixture: Mixture, weights: Tensor, at: Tensor) -> Tensor:
    """Probability (G,) that the motion of a sample is below each value `at` (G,); weights (M,).

    Modes are round in the motion plane, so (motion / sd)^2 has a noncentral chi-square distribution
    with two degrees of freedom.
    """
    variance = mixture.variances[:, 0]
    offset = mixture.means[:, :2].square().sum(1) / variance
    below = special.chndtr((at.square()[:, None] / variance).numpy(), 2, offset.numpy())
    return torch.from_numpy(below) @ weights


def transported(mixture: Mixture, prompts: Sequence[int], share: Tensor, noise: Tensor) -> Tensor:
    """Exact samples (B, d), float32, from uniform and Gaussian draws.

    Args:
        prompts: index of each sample's prompt, B of them.
        share: uniform in [0, 1), (B,); selects the mode.
        noise: Gaussian, (B, d).
    """
    # without the last sum, which is 1 only up to rounding
    below = mixture.weights[list(prompts)].cumsum(1)[:, :-1].contiguous()
    mode = torch.searchsorted(below, share[:, None].to(below), right=True)[:, 0]
    return in_modes(mixture, mode, noise)


def in_modes(mixture: Mixture, mode: Tensor, noise: Tensor) -> Tensor:
    """Samples (B, d), float32, of the modes (B,), from Gaussian noise (B, d)."""
    z = mixture.means[mode] + mixture.variances[mode].sqrt() * noise.to(mixture.means)
    return (z @ mixture.basis.T).float()


# --- the shipped mixture ---

SHAPE = (1, 4, 2, 2)  # (C, T, H, W)
HEADINGS = 8
SLOW, FAST = 0.9, 2.2  # radius of the modes in the motion plane
STILL_SD, MOVING_SD = 0.08, 0.18  # standard deviation of a mode in the motion plane
CONDITION = 20.0  # largest over smallest variance of the other axes, whose mean is 1

# prompt -> shares of still, slow and fast modes, and the favoured heading in radians
PROMPTS: dict[str, tuple[float, float, float, float | None]] = {
    "any motion": (0.40, 0.36, 0.24, None),
    "mostly still": (0.70, 0.18, 0.12, None),
    "mostly fast": (0.05, 0.15, 0.80, None),
    "mostly to the right": (0.25, 0.45, 0.30, 0.0),
    "mostly to the left": (0.25, 0.45, 0.30, math.pi),
}
FAVOUR = 0.8  # weights of headings are proportional to exp(FAVOUR cos(angle to the favoured one))


def motion_mixture() -> Mixture:
    """The shipped mixture, float64: one still mode, then slow and fast ones in eight headings.

    Motion to the right is a latent whose right half brightens over time while its left half
    darkens; motion down likewise. A latent that does not change over time has no motion. Along all
    other axes the data are Gaussian and independent of the mode.
    """
    angles = 2 * math.pi / HEADINGS * torch.arange(HEADINGS, dtype=torch.float64)
    headings = torch.stack([angles.cos(), angles.sin()], 1)
    basis = motion_basis()
    rest = len(basis) - 2
    means = torch.zeros(1 + 2 * HEADINGS, len(basis), dtype=torch.float64)
    means[1:, :2] = torch.cat([SLOW * headings, FAST * headings])
    variances = torch.logspace(0, -math.log10(CONDITION), rest, dtype=torch.float64)
    sd = torch.full((len(means), 2), MOVING_SD, dtype=torch.float64)
    sd[0] = STILL_SD
    other = (variances / variances.mean()).expand(len(means), rest)
    weights = []
    for still, slow, fast, favoured in PROMPTS.values():
        share = torch.ones(HEADINGS, dtype=torch.float64)
        if favoured is not None:
            share = (FAVOUR * (angles - favoured).cos()).exp()
        share = share / share.sum()
        weights.append(torch.cat([share.new_tensor([still]), slow * share, fast * share]))
    return Mixture(basis, means, torch.cat([sd**2, other], 1), torch.stack(weights))


def motion_basis() -> Tensor:
    """Orthonormal basis (d, d) of latents of SHAPE; its first columns move right and down."""
    _, frames, height, width = SHAPE
    time = torch.linspace(-1, 1, frames, dtype=torch.float64)
    across, down = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (width, height))
    right = time[:, None, None] * across.expand(height, width)
    downward = time[:, None, None] * down[:, None].expand(height, width)
    drawn = torch.Generator().manual_seed(DRAWN_AXES)
    d = math.prod(SHAPE)
    axes = torch.randn(d, d, generator=drawn, dtype=torch.float64)
    axes[:, 0], axes[:, 1] = right.flatten(), downward.flatten()
    basis, triangle = torch.linalg.qr(axes)
    return basis * triangle.diagonal().sign()  # QR leaves the axes' signs open
