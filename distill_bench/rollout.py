"""Sampling: the student in a few steps, also during training, and the teacher in many."""

import itertools

import torch
from torch import Tensor

from distill_bench.method import Denoise, Role
from distill_bench.noise import add_noise, over, x0_to_velocity


def rollout(
    student: Role,
    noises: list[Tensor],
    sigmas: Tensor,
    text: Tensor,
    stepping: str,
    graph: bool = False,
) -> Tensor:
    """The student's clean prediction after len(noises) steps, (B, C, T, H, W).

    Step i predicts x0 at sigmas[i]. `renoise` then adds the fresh noise noises[i + 1] at level
    sigmas[i + 1]; `ode` takes an Euler step to sigmas[i + 1] and ignores the later noises. Both
    give the bits of diffusers' flow-matching scheduler. Only the last step may keep its graph
    (backward simulation: Yin et al., 2024, section 4.5).

    Args:
        student: the network that is sampled.
        noises: one (B, C, T, H, W) per step; sampling starts from noises[0].
        sigmas: the student's noise levels, high to low, at least len(noises).
        text: (B, L, D).
        stepping: `renoise` or `ode`.
        graph: keep the graph of the last step.
    """
    x_t = noises[0]
    last = len(noises) - 1
    levels = [sigma.expand(len(x_t)) for sigma in sigmas[: last + 1]]
    with torch.no_grad():
        for step in range(last):
            sigma, lower = levels[step], levels[step + 1]
            if stepping == "renoise":
                x_t = add_noise(student(x_t, sigma, text), noises[step + 1], lower)
            else:
                x_t = x_t + over(lower - sigma, x_t) * student.velocity(x_t, sigma, text)
    with torch.set_grad_enabled(graph):
        return student(x_t, levels[last], text)


@torch.no_grad()
def euler(denoise: Denoise, noise: Tensor, sigmas: Tensor, text: Tensor) -> Tensor:
    """Samples (B, C, T, H, W) of the teacher's ODE by Euler steps.

    Args:
        denoise: the teacher, usually guided.
        noise: where sampling starts, (B, C, T, H, W).
        sigmas: noise levels from 1 to 0, (steps + 1,).
        text: (B, L, D).
    """
    x_t = noise
    for high, low in itertools.pairwise(sigmas):
        sigma = high.expand(len(x_t))
        x0 = denoise(x_t, sigma, text)
        x_t = x_t + over(low.expand(len(x_t)) - sigma, x_t) * x0_to_velocity(x0, x_t, sigma)
    return x_t
