"""TSG-SIM: score implicit matching, without differentiating the teacher."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from distill_bench.method import (
    Batch,
    Citation,
    Loss,
    Lowers,
    Method,
    Nets,
    Preset,
    dmd_normaliser,
    renoise,
)


@dataclass(frozen=True)
class TSGSIM(Method):
    """SiD's loss (T - F) . ((T - x0) - alpha (T - F)) / n, with T = sg(x0_teacher) and F = x0_fake.

    The gradient at x0 is (F - T) / n + J^T ((1 - 2 alpha) (F - T) + (x0 - F)) / n, with
    J = (1 - sigma) dF/dx_t and n = max(mean |x0 - T| per sample, 1e-5).

    At alpha = 1 this is score implicit matching with the squared distance (Luo et al., 2024) up to
    its time weight. arXiv:2605.30116, a baseline, from third-party notes.
    """

    paper: ClassVar[Citation] = Citation(
        "2605.30116",
        "SGMD: Score Gradient Matching Distillation for Few-Step Video Diffusion Distillation",
        "Zhuguanyu Wu, Ruihao Gong, Yang Yong, Yushi Huang, Xiangyu Fan, Lei Yang, Dahua Lin, "
        "Xianglong Liu",
        2026,
    )
    title: ClassVar[str] = "TSG-SIM"
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            "arXiv:2605.30116, its baseline, 1:1", {"method.alpha": 1.0, "fake_score_updates": 1}
        )
    }

    alpha: Annotated[float, Lowers("sim", linear=True)] = 1.0

    @property
    def differentiated_roles(self) -> frozenset[str]:
        return frozenset({"fake_score"})

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0, through_fake_score=True)
        n = dmd_normaliser(x0, scores.x0_teacher).clamp(min=1e-5)
        gap = scores.x0_teacher - scores.x0_fake
        loss = (gap * ((scores.x0_teacher - x0) - self.alpha * gap) / n).mean()
        return Loss({"sim": loss}, x0, {"score_gap": (gap.detach().abs() / n).mean()})
