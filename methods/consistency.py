"""Consistency distillation: no fake score, the student agrees with its own average one step of the teacher's ODE further."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from distill_bench.method import (
    Batch,
    Cost,
    Count,
    Loss,
    Method,
    Nets,
    Passes,
    Preset,
    mean_per_sample,
)
from distill_bench.noise import add_noise, over, warp, x0_to_velocity


@dataclass(frozen=True)
class Consistency(Method):
    """d(student(x_s, s), sg target(x_r, r)) / (s - r), x_r one Euler step of the guided teacher from real data noised to s.

    s and r are neighbours on a grid of `steps` levels with the run's score_shift, d is |.|^2 / 2 per element or pseudo-Huber,
    sqrt(|.|^2 + c^2) - c per sample with c = 0.00054 sqrt(d) (Song et al., 2023; Song and Dhariwal, 2024; weight and
    Euler step as FastGen@34f30e8, methods/consistency_model/CM.py). The target is the run's moving average (`ema`); at r = 0 it
    is x_r itself: a clean prediction there is its input.
    """

    paper: ClassVar[str] = "arXiv:2303.01469"
    has_fake_score: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            "arXiv:2303.01469, algorithm 2, N = 18 levels",
            {"method.steps": 18, "method.distance": "mse"},
        ),
        "fastgen": Preset(
            "FastGen@34f30e8, methods/consistency_model/CM.py", {"method.distance": "pseudo_huber"}
        ),
    }

    steps: Count = 32
    distance: Literal["mse", "pseudo_huber"] = "mse"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"real_latents"})

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        data = batch.extra("real_latents")
        real, text = data["x0"], data["text"]
        step = (
            (batch.draws.uniform("consistency/sigma") * self.steps)
            .floor()
            .clamp(max=self.steps - 1)
        )
        sigma, lower = (warp((step + up) / self.steps, batch.score_shift) for up in (1, 0))
        x_t = add_noise(real, batch.noise("consistency/noise"), sigma)
        with torch.no_grad():
            velocity = x0_to_velocity(nets.teacher(x_t, sigma, text), x_t, sigma)
            target = nets.target(x_t + over(lower - sigma, x_t) * velocity, lower, text)
        x0 = nets.student(x_t, sigma, text)
        error = (x0 - target).square()
        if self.distance == "mse":
            distance = 0.5 * mean_per_sample(error)
        else:
            size = error[0].numel()
            c = 0.00054 * size**0.5
            distance = (
                (error.sum(dim=tuple(range(1, error.ndim)), keepdim=True) + c**2).sqrt() - c
            ) / size
        return Loss({"consistency": (distance / over(sigma - lower, x0)).mean()}, x0)

    def cost(self) -> Cost:
        return Cost(
            {"student": Passes(1, full_backward=1), "target": Passes(1), "teacher": Passes(1)}, {}
        )
