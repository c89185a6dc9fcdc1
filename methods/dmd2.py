"""DMD2 as it is used for video: the reverse-KL gradient alone, without GAN and without regression."""

from dataclasses import dataclass
from typing import ClassVar

from distill_bench.method import Batch, Loss, Method, Nets, dmd_normaliser, renoise, toward


@dataclass(frozen=True)
class DMD2(Method):
    """Distribution matching by the reverse KL: the gradient at x0 is (x0_fake - x0_teacher) / n.

    n = mean |x0 - x0_teacher| per sample; both predictions are detached, so no network's Jacobian enters (Yin et al.,
    2024, eq. 2-3, and Yin et al., 2023, eq. 7-8). Video codes drop the paper's GAN: Self-Forcing@33593df,
    model/dmd.py; LightX2V@f8aee98, trainers/dmd. The two-time-scale rule is the run's `fake_score_updates`.
    """

    paper: ClassVar[str] = "arXiv:2405.14867"

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0.detach(), through_fake_score=False)
        gradient = (scores.x0_fake - scores.x0_teacher) / dmd_normaliser(x0, scores.x0_teacher)
        total = toward(x0, gradient)
        return Loss(total, {"kl": total.detach(), "score_gap": gradient.abs().mean()}, x0)
