"""SGMD: score gradient matching, a Fisher term through the fake score's input and a residual that corrects its lag."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from distill_bench.method import (
    Batch,
    Cost,
    Loss,
    Method,
    Nets,
    NotNegative,
    Passes,
    Preset,
    dmd_normaliser,
    renoise,
)
from distill_bench.noise import add_noise, over


@dataclass(frozen=True)
class SGMD(Method):
    """Fisher term minus residual_weight times the residual; both reach x0 only by the input of the fake score.

    With D = x0_fake - x0_teacher, r = sg(x0) - x0_fake and J = (1 - sigma) dx0_fake/dx_t, the gradient at x0 is
    J^T (b D + lambda r); the teacher and x0 in r are detached (arXiv:2605.30116, eq. 13, 21, 22, as third-party notes give them).

    - weighting: b is `inv_n`: 1/n, n = mean |x0 - x0_teacher| per sample + 1e-8; `c_t`: (1 - sigma)^2 / sigma^4, which spans ten
      decades; `c_t_batchnorm`: c_t over its mean in the batch.
    - residual_space: lambda is `x0`: residual_weight; `x0_over_sigma`: residual_weight / sigma.
    - correction: the fake score minimises |r|^2 / 2 in `x0` space, times residual_weight, or in `velocity` space without a
      weight.

    The paper is c_t, x0, x0; the released code (LightX2V@f8aee98, trainers/sgmd.py) inv_n, x0_over_sigma, velocity.
    With `reuse_rollout: graph` the fake score learns from the student's own x_t and the one forward made of it (the paper's
    appendix B): both phases then have the same residual, with opposite signs.
    With an exact fake score E[r | x_t] = 0: the residual only corrects the fake score's lag.
    """

    paper: ClassVar[str] = "arXiv:2605.30116"
    shares_graph: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            "arXiv:2605.30116, eq. 13, 21, 22, appendix B (one graph for both), from third-party notes",
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
    residual_weight: NotNegative = 0.1

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0, through_fake_score=True)
        sigma, n = over(scores.sigma, x0), dmd_normaliser(x0, scores.x0_teacher)
        if self.weighting == "inv_n":
            fisher_weight = 1 / (n + 1e-8)
        else:
            fisher_weight = (1 - sigma) ** 2 / sigma**4
            if self.weighting == "c_t_batchnorm":
                fisher_weight = fisher_weight / nets.mean_over_ranks(fisher_weight.mean())
        residual_weight = (
            self.residual_weight / sigma
            if self.residual_space == "x0_over_sigma"
            else self.residual_weight
        )
        gap = scores.x0_fake - scores.x0_teacher
        fisher = 0.5 * (fisher_weight * gap.square()).mean()
        r = x0.detach() - scores.x0_fake
        residual = 0.5 * (residual_weight * r.square()).mean()
        terms, logs = (
            {"fisher": fisher, "residual": -residual},
            {"score_gap": (gap.abs() / n).mean()},
        )
        return Loss(terms, x0, logs, fake_score_terms={"denoise": self._denoise(r, sigma)})

    def fake_score_loss(self, nets: Nets, batch: Batch, x0: Tensor) -> Loss:
        sigma = batch.sigma("denoise/sigma")
        x_t = add_noise(x0, batch.noise("denoise/noise"), sigma)
        return Loss(
            {
                "denoise": self._denoise(
                    x0 - nets.fake_score(x_t, sigma, batch.text), over(sigma, x0)
                )
            }
        )

    def _denoise(self, r: Tensor, sigma: Tensor) -> Tensor:
        if self.correction == "velocity":  # (x0 - x0_fake) / sigma is the error of the velocity
            return 0.5 * (r / sigma).square().mean()
        # With a residual of weight 0 (an ablation) the fake score must still learn; under Adam the weight is a no-op.
        return 0.5 * (self.residual_weight or 1.0) * r.square().mean()

    def cost(self) -> Cost:
        student = {
            "rollout": Passes(1, full_backward=1),
            "fake_score": Passes(1, 1),
            "teacher": Passes(1),
        }
        return Cost(student, {"fake_score": Passes(1, full_backward=1)})
