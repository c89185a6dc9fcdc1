"""The one noise convention: flow matching, x_t = (1 - sigma) x0 + sigma noise, sigma in [0, 1], velocity = noise - x0.

Every function takes sigma as (B,) and latents as (B, C, T, H, W) (any trailing axes do).
"""

import torch
from torch import Tensor


def over(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma (B,) shaped to broadcast over the latents x (B, ...)."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t (B, C, T, H, W) at noise level sigma (B,)."""
    s = over(sigma, x0)
    return (1 - s) * x0 + s * noise


def velocity_to_x0(velocity: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """The clean prediction that a velocity implies."""
    return x_t - over(sigma, x_t) * velocity


def x0_to_velocity(x0: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """The velocity that a clean prediction implies; sigma must be above 0."""
    return (x_t - x0) / over(sigma, x_t)


def x0_to_score(x0: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """grad log p_t(x_t) that a clean prediction implies: ((1 - sigma) x0 - x_t) / sigma^2 (Tweedie)."""
    s = over(sigma, x_t)
    return ((1 - s) * x0 - x_t) / s**2


def warp(sigma: Tensor, shift: float) -> Tensor:
    """Resolution shift of SD3 (Esser et al., 2024, eq. 23): shift * sigma / (1 + (shift - 1) * sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def student_sigmas(nfe: int, shift: float) -> Tensor:
    """The student's noise levels, high to low, (nfe,): 1 - i/nfe, warped. nfe 4, shift 5: 1, .9375, .8333, .625."""
    return warp(1 - torch.arange(nfe, dtype=torch.float64) / nfe, shift).float()


def teacher_sigmas(steps: int, shift: float) -> Tensor:
    """The teacher's noise levels for `steps` Euler steps, 1 to 0, (steps + 1,)."""
    return warp(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def scale(sigma: Tensor) -> Tensor:
    """The scale between x_t and z: sqrt((1 - sigma)^2 + sigma^2)."""
    return ((1 - sigma) ** 2 + sigma**2).sqrt()


def sigmas_of(alphas_cumprod: Tensor) -> Tensor:
    """The noise level of flow matching at each timestep, float64: b / (a + b)."""
    a, b = (
        alphas_cumprod.double().clamp(0, 1).sqrt(),
        (1 - alphas_cumprod.double()).clamp(0, 1).sqrt(),
    )
    return b / (a + b)


def timestep_of(sigma: Tensor, sigmas: Tensor) -> Tensor:
    """The timestep (B,) of the network at sigma (B,): between two of its own linear in sigma, beyond the last ones those."""
    table, at = sigmas.to(sigma.device), sigma.double()
    above = torch.searchsorted(table, at).clamp(1, len(table) - 1)
    share = (at - table[above - 1]) / (table[above] - table[above - 1])
    return (above - 1 + share.clamp(0, 1)).to(sigma.dtype)


def velocity_of(predicted: Tensor, x_t: Tensor, sigma: Tensor, sigmas: Tensor, kind: str) -> Tensor:
    """noise - x0 by the network's prediction (B, C, T, H, W) at x_t; a level above its last one is taken for that."""
    known = sigma.clamp(max=sigmas[-1].to(sigma))
    a, b = (over(each / scale(known), x_t) for each in (1 - known, known))
    z = x_t / over(scale(sigma), x_t)
    x0 = a * z - b * predicted if kind == "v_prediction" else (z - b * predicted) / a
    return (x_t - x0) / over(sigma, x_t)
