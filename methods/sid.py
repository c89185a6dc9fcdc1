"""SiD: score identity distillation, which also differentiates the teacher."""

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
class SiD(Method):
    """Loss (T - F) . ((T - x0) - alpha (T - F)) / n, with T = x0_teacher and F = x0_fake.

    T, F and x0 are differentiated; n = max(mean |x0 - T| per sample, 1e-5) is not. With
    J = (1 - sigma) d/dx_t, the gradient at x0 is

        (F - T) / n + J_F^T ((1 - 2 alpha) (F - T) + (x0 - F)) / n
                    + J_T^T ((1 - 2 alpha) (T - F) + (T - x0)) / n.

    The guided teacher needs two input-only backwards.

    Zhou et al., 2024, algorithm 1; SiD@01fbb13, training/sid_loss.py:25-56; in clean predictions as
    in Self-Forcing@33593df, model/sid.py:83-145.
    """

    paper: ClassVar[Citation] = Citation(
        "2404.04057",
        "Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion "
        "Models for One-Step Generation",
        "Mingyuan Zhou, Huangjie Zheng, Zhendong Wang, Mingzhang Yin, Hai Huang",
        2024,
    )
    title: ClassVar[str] = "SiD"
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            "SiD@01fbb13, training/sid_loss.py, 1:1", {"method.alpha": 1.2, "fake_score_updates": 1}
        ),
        "video": Preset(
            "Self-Forcing@33593df, model/sid.py", {"method.alpha": 1.0, "fake_score_updates": 5}
        ),
    }

    alpha: Annotated[float, Lowers("sid", linear=True)] = 1.0

    @property
    def differentiated_roles(self) -> frozenset[str]:
        return frozenset({"fake_score", "teacher"})

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0, through_fake_score=True, through_teacher=True)
        n = dmd_normaliser(x0, scores.x0_teacher).clamp(min=1e-5)
        gap = scores.x0_teacher - scores.x0_fake
        loss = (gap * ((scores.x0_teacher - x0) - self.alpha * gap) / n).mean()
        return Loss({"sid": loss}, x0, {"score_gap": (gap.detach().abs() / n).mean()})
