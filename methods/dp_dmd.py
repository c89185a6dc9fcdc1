"""DP-DMD: the student's first step keeps the teacher's diversity, the later ones match distributions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from distill_bench.method import (
    Batch,
    Cost,
    Count,
    Loss,
    Method,
    Nets,
    NotNegative,
    Passes,
    Preset,
    renoise,
    reverse_kl,
)
from distill_bench.noise import over, teacher_sigmas, x0_to_velocity
from distill_bench.rollout import euler


@dataclass(frozen=True)
class DPDMD(Method):
    """The first step's velocity at noise z regressed to (z - x_a) / (1 - s_a); DMD2's gradient where the rollout ends later.

    x_a, at level s_a, is where `anchor` of the guided teacher's `teacher_steps` Euler steps from z end: the student's first
    step then goes where the teacher's own trajectory of this noise goes. Loss diversity_weight * |velocity - target|^2 / 2
    (DP-DMD, author's code and notes; LightX2V@f8aee98, trick `div_loss`: weight 0.05; 40 steps and anchor 10 in the DMD configs,
    30 and 5 in SGMD's of 1.3B). The teacher must be an ODE; its levels have the run's score_shift.
    """

    paper: ClassVar[str] = "DP-DMD (github.com/Multimedia-Analytics-Laboratory/dpdmd)"
    presets: ClassVar[Mapping[str, Preset]] = {
        "lightx2v": Preset(
            "LightX2V@f8aee98, configs/train/dmd/wan2_1_t2v_14b_dmd.yaml, div_loss",
            {
                "method.diversity_weight": 0.05,
                "method.teacher_steps": 40,
                "method.anchor": 10,
                "fake_score_updates": 5,
                "stepping": "ode",
                "exit_step": "random",
            },
        )
    }

    diversity_weight: NotNegative = 0.05
    teacher_steps: Count = 30
    anchor: Count = 5

    def __post_init__(self) -> None:
        if self.anchor > self.teacher_steps:
            raise ValueError(
                f"anchor {self.anchor} must be at most teacher_steps {self.teacher_steps}"
            )

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        later = (nets.exit_sigma(batch) < 1).to(x0.dtype)
        kl, logs = reverse_kl(
            x0, renoise(nets, batch, x0.detach(), through_fake_score=False), over(later, x0)
        )
        z = batch.noise("diversity/noise")
        sigmas = teacher_sigmas(self.teacher_steps, batch.score_shift).to(z)[: self.anchor + 1]
        anchored = euler(nets.teacher, z, sigmas, batch.text)
        one = torch.ones_like(later)
        velocity = x0_to_velocity(nets.student(z, one, batch.text), z, one)
        error = velocity - (z - anchored) / (1 - sigmas[-1])
        return Loss(
            {"kl": kl, "diversity": self.diversity_weight * 0.5 * error.square().mean()}, x0, logs
        )

    def cost(self) -> Cost:
        student = {
            "rollout": Passes(1, full_backward=1),
            "student": Passes(1, full_backward=1),
            "fake_score": Passes(1),
            "teacher": Passes(1 + self.anchor),
        }
        return Cost(student, {"fake_score": Passes(1, full_backward=1)})
