"""Consistency distillation: the student matches its own average one teacher step later."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from distill_bench.method import (
    Batch,
    Citation,
    Count,
    Loss,
    Method,
    Nets,
    Preset,
    Raises,
    added,
    mean_per_sample,
)
from distill_bench.noise import add_noise, over, warp, x0_to_velocity


@dataclass(frozen=True)
class Consistency(Method):
    """Loss weight * distance(student(x_s, s), sg target(x_r, r)); there is no fake score.

    x_s is real data noised to level s, and x_r follows from it by one Euler step of the guided
    teacher. s and r are neighbours among `steps` + 1 levels from 0 to 1, warped by the run's
    score_shift.
    The target is the run's moving average (`ema`) or the student itself; at r = 0 it returns x_r,
    its input. The weight is 1 / (s - r) (`inverse_step`) or 1 (`one`).

    Distances, with |.| the norm over the d elements of a sample: `mse` is |.|^2 / 2d, and
    `pseudo_huber` is (sqrt(|.|^2 + c^2) - c) / d with c = 0.00054 sqrt(d).

    Song et al., 2023; Song and Dhariwal, 2024; FastGen@34f30e8, methods/consistency_model/CM.py.
    """

    paper: ClassVar[Citation] = Citation(
        "2303.01469",
        "Consistency Models",
        "Yang Song, Prafulla Dhariwal, Mark Chen, Ilya Sutskever",
        2023,
    )
    has_fake_score: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            "arXiv:2303.01469, algorithm 2, N = 18 levels",
            {"method.steps": 17, "method.distance": "mse", "method.weight": "one"},
        ),
        "fastgen": Preset(
            "FastGen@34f30e8, methods/consistency_model/CM.py",
            {"method.distance": "pseudo_huber", "method.target": "student"},
        ),
    }

    steps: Annotated[Count, Raises("level/target")] = 32
    distance: Literal["mse", "pseudo_huber"] = "mse"
    weight: Literal["inverse_step", "one"] = added("inverse_step")
    target: Literal["average", "student"] = added("average")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"real_latents"})

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        data = batch.extra("real_latents")
        real, text = data["x0"], data["text"]
        level = (batch.draws.uniform("consistency/sigma") * self.steps).floor()
        level = level.clamp(max=self.steps - 1)
        s = warp((level + 1) / self.steps, batch.score_shift)
        r = warp(level / self.steps, batch.score_shift)
        x_s = add_noise(real, batch.noise("consistency/noise"), s)
        with torch.no_grad():
            velocity = x0_to_velocity(nets.teacher(x_s, s, text), x_s, s)
            x_r = x_s + over(r - s, x_s) * velocity
            target = (nets.target if self.target == "average" else nets.student)(x_r, r, text)
        x0 = nets.student(x_s, s, text)
        error = (x0 - target).square()
        if self.distance == "mse":
            distance = 0.5 * mean_per_sample(error)
        else:
            d = error[0].numel()
            c = 0.00054 * d**0.5
            squared_norm = error.sum(dim=tuple(range(1, error.ndim)), keepdim=True)
            distance = ((squared_norm + c**2).sqrt() - c) / d
        if self.weight == "inverse_step":
            distance = distance / over(s - r, x0)
        return Loss({"consistency": distance.mean()}, x0)
