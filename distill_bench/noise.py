"""The one noise convention of the package: flow matching.

x_t = (1 - sigma) x0 + sigma noise, sigma in [0, 1] (0 is clean), velocity = noise - x0.

Every function takes sigma as (B,) and latents as (B, C, T, H, W); other trailing axes work too.
The functions `vp_*` translate networks that were trained with variance-preserving noise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# `renoise`, `ode`, or the share of noise that a step draws anew (`distill_bench.rollout.mixed`)
Stepping = str | float


@dataclass(frozen=True)
class GuidanceByLevel:
    """Guidance scales of a teacher with two experts, each for the samples of its noise levels."""

    high_noise: float
    low_noise: float
    boundary: float  # lowest noise level of the high-noise expert


GuidanceScale = float | GuidanceByLevel


def guidance_at(scale: GuidanceScale, sigma: Tensor, x: Tensor) -> Tensor | float:
    """Guidance scale at noise levels sigma (B,); one per sample broadcasts over x (B, ...)."""
    if isinstance(scale, GuidanceByLevel):
        high = is_high_noise(sigma, scale.boundary)
        return over(torch.where(high, scale.high_noise, scale.low_noise), x)
    return scale


def is_high_noise(sigma: Tensor, boundary: float) -> Tensor:
    """True for noise levels of the high-noise expert, by diffusers' WanPipeline's rule."""
    return 1000 * sigma >= 1000 * boundary


def over(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma (B,) reshaped to broadcast over the latents x (B, ...), in their dtype."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t (B, C, T, H, W) at noise level sigma (B,)."""
    s = over(sigma, x0)
    return (1 - s) * x0 + s * noise


def velocity_to_x0(velocity: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """Clean prediction (B, C, T, H, W) that a velocity implies."""
    return x_t - over(sigma, x_t) * velocity


def x0_to_velocity(x0: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """Velocity (B, C, T, H, W) that a clean prediction implies; sigma must be above 0."""
    return (x_t - x0) / over(sigma, x_t)


def x0_to_noise(x0: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """Noise (B, C, T, H, W) that a clean prediction implies; sigma must be above 0."""
    s = over(sigma, x_t)
    return (x_t - (1 - s) * x0) / s


def x0_to_score(x0: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """Score, grad log p_t(x_t), that a clean prediction implies; sigma must be above 0.

    ((1 - sigma) x0 - x_t) / sigma^2 (Tweedie's formula).
    """
    s = over(sigma, x_t)
    return ((1 - s) * x0 - x_t) / s**2


def warp(sigma: Tensor, shift: float) -> Tensor:
    """Resolution shift of SD3, shift * sigma / (1 + (shift - 1) * sigma).

    Esser et al., 2024, eq. 23.

    Args:
        sigma: noise levels in [0, 1], any shape.
        shift: above 0; 1 changes nothing, more moves levels towards noise.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def student_sigmas(nfe: int, shift: float) -> Tensor:
    """The student's noise levels, high to low, (nfe,): 1 - i / nfe, warped.

    For nfe 4 and shift 5: 1, 0.9375, 0.8333, 0.625.
    """
    return warp(1 - torch.arange(nfe, dtype=torch.float64) / nfe, shift).float()


def teacher_sigmas(steps: int, shift: float) -> Tensor:
    """The teacher's noise levels for `steps` Euler steps, from 1 to 0, warped, (steps + 1,)."""
    return warp(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


# --- variance-preserving networks ---
#
# They take z = a x0 + b noise with a^2 + b^2 = 1. With sigma = b / (a + b), z is x_t divided by
# `vp_scale`. `table` holds the sigma of each of their timesteps, low to high.


def vp_scale(sigma: Tensor) -> Tensor:
    """x_t / z at noise level sigma: sqrt((1 - sigma)^2 + sigma^2)."""
    return ((1 - sigma) ** 2 + sigma**2).sqrt()


def vp_sigmas(alphas_cumprod: Tensor) -> Tensor:
    """Noise level b / (a + b) of each timestep, float64, in the shape of alphas_cumprod = a^2."""
    a = alphas_cumprod.double().clamp(min=0).sqrt()
    b = (1 - alphas_cumprod.double()).clamp(min=0).sqrt()
    return b / (a + b)


def vp_timestep(sigma: Tensor, table: Tensor) -> Tensor:
    """Fractional timestep (B,) of noise level sigma (B,).

    Linear in sigma between two entries of the table; clamped to its first and last timestep.
    """
    table = table.to(sigma.device)
    level = sigma.double()
    upper = torch.searchsorted(table, level).clamp(1, len(table) - 1)
    share = (level - table[upper - 1]) / (table[upper] - table[upper - 1])
    return (upper - 1 + share.clamp(0, 1)).to(sigma.dtype)


def vp_velocity(output: Tensor, x_t: Tensor, sigma: Tensor, table: Tensor, kind: str) -> Tensor:
    """Velocity, noise - x0, that a variance-preserving network's output implies, (B, C, T, H, W).

    Args:
        output: of the network at z = x_t / vp_scale(sigma), (B, C, T, H, W).
        x_t: (B, C, T, H, W).
        sigma: (B,); the network's output counts as one at the table's last level if sigma is above.
        table: noise level of each timestep, low to high.
        kind: `v_prediction` (output = a noise - b x0) or `epsilon` (output = noise).
    """
    known = sigma.clamp(max=table[-1].to(sigma))
    a = over((1 - known) / vp_scale(known), x_t)
    b = over(known / vp_scale(known), x_t)
    z = x_t / over(vp_scale(sigma), x_t)
    x0 = a * z - b * output if kind == "v_prediction" else (z - b * output) / a
    return (x_t - x0) / over(sigma, x_t)
