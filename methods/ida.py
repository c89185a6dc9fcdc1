"""IDA: DMD2's gradient, and a fake score that is pulled towards the student after each of the student's updates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from distill_bench.method import Batch, Loss, Method, Nets, Preset, Share, renoise, reverse_kl


@dataclass(frozen=True)
class IDA(Method):
    """At x0 (x0_fake - x0_teacher) / n; after each student update fake_score <- keep fake_score + (1 - keep) student.

    Implicit distribution alignment (SenseFlow, arXiv:2506.00523, section 3; keep 0.97 as LightX2V@f8aee98, trainers/dmd, trick
    `ida`): the pull is the part of the fake score's lag that needs no rollout and no pass.
    """

    paper: ClassVar[str] = "arXiv:2506.00523"
    mixes_weights: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = {
        "lightx2v": Preset(
            "LightX2V@f8aee98, trick ida",
            {"method.keep": 0.97, "fake_score_updates": 5, "stepping": "ode"},
        )
    }

    keep: Share = 0.97

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        kl, logs = reverse_kl(x0, renoise(nets, batch, x0.detach(), through_fake_score=False))
        return Loss({"kl": kl}, x0, logs)

    def after_student_update(self, networks: Mapping[str, nn.Module]) -> None:
        student = dict(networks["student"].named_parameters())
        fake_score = (
            dict(networks["fake_score"].named_parameters()) if "fake_score" in networks else {}
        )
        if {k: p.shape for k, p in student.items()} != {k: p.shape for k, p in fake_score.items()}:
            raise ValueError(
                "ida averages the weights of student and fake score: they must be trained networks of one architecture"
            )
        for name, parameter in fake_score.items():
            parameter.lerp_(student[name], 1 - self.keep)
