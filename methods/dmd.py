"""DMD: the reverse-KL gradient plus regression on the teacher's ODE pairs."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from distill_bench.method import Batch, Loss, Method, Nets, dmd_normaliser, renoise, toward


@dataclass(frozen=True)
class DMD(Method):
    """The gradient of DMD2 at x0, (x0_fake - x0_teacher) / n, plus regression_weight * |student(z) - y|^2 / 2.

    (z, y) are noise and the clip that the guided teacher's ODE makes of it; z is pure noise, sigma = 1, so the regression
    anchors the student's first step (Yin et al., 2023, eq. 7-9). The paper's distance is LPIPS on decoded images, here it is
    the squared error in latents; its weight there is 0.25.
    """

    paper: ClassVar[str] = "arXiv:2311.18828"
    needs: ClassVar[frozenset[str]] = frozenset({"ode_pairs"})

    regression_weight: float = 0.25

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0.detach(), through_fake_score=False)
        gradient = (scores.x0_fake - scores.x0_teacher) / dmd_normaliser(x0, scores.x0_teacher)
        kl = toward(x0, gradient)
        noise, target, text = (batch.extras[f"ode_pairs/{key}"] for key in ("noise", "x0", "text"))
        regressed = nets.student(noise, torch.ones(len(noise), device=noise.device), text)
        regression = 0.5 * (regressed - target).square().mean()
        parts = {"kl": kl.detach(), "score_gap": gradient.abs().mean(), "regression": regression.detach()}
        return Loss(kl + self.regression_weight * regression, parts, x0)
