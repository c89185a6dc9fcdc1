"""IDA: DMD2's gradient, with the fake score's weights pulled towards the student's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import nn

from distill_bench.method import (
    Batch,
    Citation,
    Loss,
    Lowers,
    Method,
    Nets,
    Preset,
    Share,
    renoise,
    reverse_kl,
)


@dataclass(frozen=True)
class IDA(Method):
    """Gradient (x0_fake - x0_teacher) / n at x0; n = mean |x0 - x0_teacher| per sample.

    After each student update, weights move: fake_score <- keep * fake_score + (1 - keep) * student.
    This reduces the fake score's lag without a rollout or a network pass.

    Implicit distribution alignment: SenseFlow, arXiv:2506.00523, section 3; keep = 0.97 as in
    LightX2V@f8aee98, trainers/dmd, trick `ida`.
    """

    paper: ClassVar[Citation] = Citation(
        "2506.00523",
        "SenseFlow: Scaling Distribution Matching for Flow-based Text-to-Image Distillation",
        "Xingtong Ge, Xin Zhang, Tongda Xu, Yi Zhang, Xinjie Zhang, Yan Wang, Jun Zhang",
        2025,
    )
    mixes_weights: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = {
        "lightx2v": Preset(
            "LightX2V@f8aee98, trick ida",
            {"method.keep": 0.97, "fake_score_updates": 5, "stepping": "ode"},
        )
    }

    keep: Annotated[Share, Lowers("moves/fake_score", linear=True)] = 0.97

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        kl, logs = reverse_kl(x0, renoise(nets, batch, x0.detach(), through_fake_score=False))
        return Loss({"kl": kl}, x0, logs)

    def after_student_update(self, networks: Mapping[str, nn.Module]) -> None:
        student, fake_score = (
            dict(networks[role].named_parameters()) if role in networks else {}
            for role in ("student", "fake_score")
        )
        if {k: p.shape for k, p in student.items()} != {k: p.shape for k, p in fake_score.items()}:
            raise ValueError(
                "student and fake score have different weights; ida averages them, so both must be "
                "trained networks of one architecture"
            )
        for name, parameter in fake_score.items():
            parameter.lerp_(student[name], 1 - self.keep)
