"""SGMD: score gradient matching, a Fisher term through the fake score's input and a residual that corrects its lag."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from distill_bench.method import Batch, Loss, Method, Nets, dmd_normaliser, mean_per_sample, renoise, velocity_loss
from distill_bench.noise import add_noise, over


@dataclass(frozen=True)
class SGMD(Method):
    """Fisher term minus residual_weight times the residual; both reach x0 only by the input of the fake score.

    With D = x0_fake - x0_teacher, r = sg(x0) - x0_fake and J = (1 - sigma) dx0_fake/dx_t, the gradient at x0 is
    J^T (b D + lambda r); the teacher and x0 in r are detached.

    - `official` (LightX2V@f8aee98, trainers/sgmd.py): b = 1/n, n = mean |x0 - x0_teacher| per sample + 1e-8,
      lambda = residual_weight / sigma; the fake score learns in velocity space, without a weight.
    - `paper` (arXiv:2605.30116, eq. 13, 21, 22, as third-party notes give them): b = c(t) = (1 - sigma)^2 / sigma^4,
      lambda = residual_weight; the fake score minimises residual_weight |r|^2 / 2 in x0 space. c(t) spans ten decades.

    With an exact fake score E[r | x_t] = 0: the residual only corrects the fake score's lag.
    """

    paper: ClassVar[str] = "arXiv:2605.30116"

    formulation: Literal["official", "paper"] = "official"
    residual_weight: float = 0.1

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0, through_fake_score=True)
        sigma = over(scores.sigma, x0)
        if self.formulation == "official":
            fisher_weight = 1 / (dmd_normaliser(x0, scores.x0_teacher) + 1e-8)
            residual_weight = self.residual_weight / sigma
        else:
            fisher_weight = (1 - sigma) ** 2 / sigma**4
            residual_weight = self.residual_weight
        gap = scores.x0_fake - scores.x0_teacher
        fisher = 0.5 * (fisher_weight * gap.square()).mean()
        residual = 0.5 * (residual_weight * (x0.detach() - scores.x0_fake).square()).mean()
        score_gap = (gap.abs() / dmd_normaliser(x0, scores.x0_teacher)).mean()
        parts = {"fisher": fisher.detach(), "residual": residual.detach(), "score_gap": score_gap.detach()}
        return Loss(fisher - residual, parts, x0)

    def fake_score_loss(self, nets: Nets, batch: Batch, x0: Tensor) -> Loss:
        if self.formulation == "official":
            return velocity_loss(nets.fake_score, batch, x0)
        sigma = batch.sigma("denoise/sigma")
        x_t = add_noise(x0, batch.noise("denoise/noise"), sigma)
        error = mean_per_sample((x0 - nets.fake_score(x_t, sigma, batch.text)).square())
        # With a residual of weight 0 (an ablation) the fake score must still learn; under Adam the weight is a no-op.
        return Loss(0.5 * (self.residual_weight or 1.0) * error.mean())
