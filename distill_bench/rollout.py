"""Sampling: the student in a few steps, also during training, and the teacher in many."""

import itertools
import math
from typing import Protocol

import torch
from torch import Tensor

from distill_bench.method import Denoise
from distill_bench.noise import (
    Stepping,
    add_noise,
    over,
    velocity_to_x0,
    x0_to_noise,
    x0_to_velocity,
)


class Sampled(Protocol):
    """A network that can be sampled; arguments as for `distill_bench.method.Role`."""

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Clean prediction x0_hat, (B, C, T, H, W)."""

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Prediction of noise - x0, (B, C, T, H, W)."""


def rollout(
    student: Sampled,
    noises: list[Tensor],
    sigmas: Tensor,
    text: Tensor,
    stepping: Stepping,
    graph: bool = False,
) -> Tensor:
    """The student's clean prediction after len(noises) steps, (B, C, T, H, W).

    Step i predicts x0 at sigmas[i]. `renoise` then adds the fresh noise noises[i + 1] at level
    sigmas[i + 1]; `ode` takes an Euler step to sigmas[i + 1] and ignores the later noises. Both
    give the bits of diffusers' flow-matching scheduler. A number steps between the two (`mixed`).
    Only the last step may keep its graph (backward simulation: Yin et al., 2024, section 4.5).
    Samples may end at different steps: the first len(noises[i]) of them make step i.

    Args:
        student: the network that is sampled.
        noises: one (B, C, T, H, W) per step, no longer than the one before; sampling starts from
            noises[0].
        sigmas: the student's noise levels, high to low, at least len(noises).
        text: (B, L, D).
        stepping: `renoise`, `ode`, or the share of fresh noise, in (0, 1).
        graph: keep the graph of the last step.
    """
    x_t = noises[0]
    ended: list[Tensor] = []  # predictions of samples that end before the last step
    predict = student.velocity if stepping == "ode" else student
    with torch.no_grad():
        for high, low, noise in zip(sigmas, sigmas[1:], noises[1:], strict=False):
            going = len(noise)
            sigma, lower = high.expand(len(x_t)), low.expand(going)
            prediction = predict(x_t, sigma, text)
            if going < len(x_t):
                x0 = velocity_to_x0(prediction, x_t, sigma) if stepping == "ode" else prediction
                ended.append(x0[going:])
                prediction, x_t, sigma, text = (
                    rows[:going] for rows in (prediction, x_t, sigma, text)
                )
            if stepping == "renoise":
                x_t = add_noise(prediction, noise, lower)
            elif stepping == "ode":
                x_t = x_t + over(lower - sigma, x_t) * prediction
            else:
                noise = mixed(x0_to_noise(prediction, x_t, sigma), noise, float(stepping))
                x_t = add_noise(prediction, noise, lower)
    with torch.set_grad_enabled(graph):
        x0 = student(x_t, sigmas[len(noises) - 1].expand(len(x_t)), text)
    return torch.cat([x0, *reversed(ended)]) if ended else x0


def mixed(noise: Tensor, fresh: Tensor, share: float) -> Tensor:
    """Unit noise of which `share` is fresh: sqrt(1 - share^2) noise + share fresh.

    DDIM's family (Song et al., 2021, eq. 12) with standard deviation share * sigma of the fresh
    noise. 0 is the ODE and 1 draws all noise anew; DDIM's own eta of 1 is DDPM, which draws less.

    Args:
        noise: that x_t and the clean prediction imply, (B, C, T, H, W).
        fresh: unit Gaussian noise, (B, C, T, H, W).
        share: in [0, 1].
    """
    return math.sqrt(1 - share**2) * noise + share * fresh


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
