"""TSG-Fisher: the Fisher divergence, differentiated through the input of the fake score only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from distill_bench.method import (
    Batch,
    Citation,
    Loss,
    Method,
    Nets,
    Preset,
    dmd_normaliser,
    renoise,
)
from distill_bench.noise import over


@dataclass(frozen=True)
class TSGFisher(Method):
    """Loss b |x0_fake(x_t) - sg(x0_teacher(x_t))|^2 / 2.

    The gradient at x0 is J^T b (x0_fake - x0_teacher) with J = (1 - sigma) dx0_fake/dx_t. The fake
    score learns by denoising. Weights b:

    - `inv_n`: 1 / (mean |x0 - x0_teacher| per sample + 1e-8);
    - `c_t`: (1 - sigma)^2 / sigma^4, which makes the loss the squared difference of scores and
      spans ten decades.

    arXiv:2605.30116, a baseline; LightX2V@f8aee98, trainers/sgmd.py:23-35.
    """

    paper: ClassVar[Citation] = Citation(
        "2605.30116",
        "SGMD: Score Gradient Matching Distillation for Few-Step Video Diffusion Distillation",
        "Zhuguanyu Wu, Ruihao Gong, Yang Yong, Yushi Huang, Xiangyu Fan, Lei Yang, Dahua Lin, "
        "Xianglong Liu",
        2026,
    )
    title: ClassVar[str] = "TSG-Fisher"
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            "arXiv:2605.30116, its baseline", {"method.weighting": "c_t", "fake_score_updates": 5}
        ),
        "lightx2v": Preset(
            "LightX2V@f8aee98, trainers/sgmd.py, without the correction",
            {"method.weighting": "inv_n", "fake_score_updates": 5, "stepping": "ode"},
        ),
    }

    weighting: Literal["inv_n", "c_t"] = "inv_n"

    @property
    def differentiated_roles(self) -> frozenset[str]:
        return frozenset({"fake_score"})

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0, through_fake_score=True)
        sigma, n = over(scores.sigma, x0), dmd_normaliser(x0, scores.x0_teacher)
        weight = 1 / (n + 1e-8) if self.weighting == "inv_n" else (1 - sigma) ** 2 / sigma**4
        gap = scores.x0_fake - scores.x0_teacher
        fisher = 0.5 * (weight * gap.square()).mean()
        return Loss({"fisher": fisher}, x0, {"score_gap": (gap.detach().abs() / n).mean()})
