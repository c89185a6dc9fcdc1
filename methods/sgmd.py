"""SGMD: a Fisher term through the fake score's input, and a residual that corrects its lag."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from distill_bench.method import (
    Batch,
    Citation,
    Loss,
    Method,
    Nets,
    NotNegative,
    Preset,
    Scales,
    dmd_normaliser,
    renoise,
)
from distill_bench.noise import add_noise, over


@dataclass(frozen=True)
class SGMD(Method):
    """Student's loss b |D|^2 / 2 - lambda |r|^2 / 2.

    D = x0_fake - x0_teacher and r = sg(x0) - x0_fake. The teacher is detached, so x0 is reached
    only through the fake score's input: with J = (1 - sigma) dx0_fake/dx_t, the gradient at x0 is
    J^T (b D + lambda r). For an exact fake score E[r | x_t] = 0, so the residual only corrects the
    fake score's lag.

    - weighting, b: `inv_n` is 1 / (n + 1e-8), n = mean |x0 - x0_teacher| per sample; `c_t` is
      (1 - sigma)^2 / sigma^4, which spans ten decades; `c_t_batchnorm` is c_t over its batch mean.
    - residual_space, lambda: `x0` is residual_weight; `x0_over_sigma` is residual_weight / sigma.
    - correction, the fake score's loss: `x0` is residual_weight |r|^2 / 2; `velocity` is
      |r / sigma|^2 / 2.

    The paper has c_t, x0, x0; the released code (LightX2V@f8aee98, trainers/sgmd.py) has inv_n,
    x0_over_sigma, velocity. With `reuse_rollout: graph` the fake score learns from the student's
    own x_t and forward pass (the paper's appendix B), so both phases share one residual with
    opposite signs.

    arXiv:2605.30116, eq. 13, 21 and 22, from third-party notes.
    """

    paper: ClassVar[Citation] = Citation(
        "2605.30116",
        "SGMD: Score Gradient Matching Distillation for Few-Step Video Diffusion Distillation",
        "Zhuguanyu Wu, Ruihao Gong, Yang Yong, Yushi Huang, Xiangyu Fan, Lei Yang, Dahua Lin, "
        "Xianglong Liu",
        2026,
    )
    shares_graph: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            "arXiv:2605.30116, eq. 13, 21, 22, appendix B (one graph for both), from notes",
            {
                "method.weighting": "c_t",
                "method.residual_space": "x0",
                "method.correction": "x0",
                "fake_score_updates": 1,
                "reuse_rollout": "graph",
                "stepping": "ode",
            },
        ),
        "official": Preset(
            "LightX2V@f8aee98, lightx2v_train/trainers/sgmd.py",
            {
                "method.weighting": "inv_n",
                "method.residual_space": "x0_over_sigma",
                "method.correction": "velocity",
                "fake_score_updates": 1,
                "stepping": "ode",
            },
        ),
        "shared": Preset(
            "as `official`, with the student's rollout reused by the fake score",
            {
                "method.weighting": "inv_n",
                "method.residual_space": "x0_over_sigma",
                "method.correction": "velocity",
                "fake_score_updates": 1,
                "stepping": "ode",
                "reuse_rollout": True,
            },
        ),
    }

    weighting: Literal["inv_n", "c_t", "c_t_batchnorm"] = "inv_n"
    residual_space: Literal["x0_over_sigma", "x0"] = "x0_over_sigma"
    correction: Literal["velocity", "x0"] = "velocity"
    residual_weight: Annotated[NotNegative, Scales("residual")] = 0.1

    @property
    def differentiated_roles(self) -> frozenset[str]:
        return frozenset({"fake_score"})

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0, through_fake_score=True)
        sigma, n = over(scores.sigma, x0), dmd_normaliser(x0, scores.x0_teacher)
        if self.weighting == "inv_n":
            b = 1 / (n + 1e-8)
        else:
            b = (1 - sigma) ** 2 / sigma**4
            if self.weighting == "c_t_batchnorm":
                b = b / nets.mean_over_ranks(b.mean())
        lam = self.residual_weight
        if self.residual_space == "x0_over_sigma":
            lam = self.residual_weight / sigma
        gap = scores.x0_fake - scores.x0_teacher
        r = x0.detach() - scores.x0_fake
        fisher = 0.5 * (b * gap.square()).mean()
        residual = 0.5 * (lam * r.square()).mean()
        return Loss(
            {"fisher": fisher, "residual": -residual},
            x0,
            {"score_gap": (gap.detach().abs() / n).mean()},
            fake_score_terms={"denoise": self._denoise(r, sigma)},
        )

    def fake_score_loss(self, nets: Nets, batch: Batch, x0: Tensor) -> Loss:
        sigma = batch.sigma("denoise/sigma")
        x_t = add_noise(x0, batch.noise("denoise/noise"), sigma)
        r = x0 - nets.fake_score(x_t, sigma, batch.text)
        return Loss({"denoise": self._denoise(r, over(sigma, x0))})

    def _denoise(self, r: Tensor, sigma: Tensor) -> Tensor:
        if self.correction == "velocity":  # r / sigma is the error of the velocity
            return 0.5 * (r / sigma).square().mean()
        # without the residual (weight 0) the fake score must still learn; Adam ignores the scale
        return 0.5 * (self.residual_weight or 1.0) * r.square().mean()
