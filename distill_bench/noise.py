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
