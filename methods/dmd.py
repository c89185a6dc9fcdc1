"""DMD: the reverse-KL gradient plus regression on the teacher's ODE pairs, jointly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
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
    renoise,
    reverse_kl,
)


@dataclass(frozen=True)
class DMD(Method):
    """At x0 the gradient (x0_fake - x0_teacher) / n, n = mean |x0 - x0_teacher| per sample; plus regression.

    The regression is regression_weight * d(student(z), y), (z, y) noise and the clip that the guided teacher's ODE makes of it
    (Yin et al., 2023, eq. 7-9); z is pure noise, sigma = 1, so it anchors the student's first step. d is
    - `mse`: |student(z) - y|^2 / 2 in latents, as the ODE initialisation of the video codes (Self-Forcing@33593df,
      model/ode_regression.py);
    - `lpips`: the paper's, on decoded frames of [-1, 1] (Zhang et al., 2018, VGG); it needs `pip install lpips` and torchvision's
      VGG weights in torch's cache, which nothing here downloads unasked.
    """

    paper: ClassVar[str] = "arXiv:2311.18828"
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            "arXiv:2311.18828, section 4; weight 0.25 unverified",
            {
                "method.regression_weight": 0.25,
                "method.distance": "lpips",
                "fake_score_updates": 1,
                "nfe": 1,
                "reuse_rollout": True,
            },
        ),
        "latent": Preset(
            "as `paper`, where no LPIPS weights are at hand",
            {
                "method.regression_weight": 0.25,
                "method.distance": "mse",
                "fake_score_updates": 1,
                "nfe": 1,
                "reuse_rollout": True,
            },
        ),
    }

    regression_weight: NotNegative = 0.25
    distance: Literal["mse", "lpips"] = "mse"

    @property
    def packages(self) -> frozenset[str]:
        return frozenset({"lpips"} if self.distance == "lpips" else ())

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ode_pairs"})

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        kl, logs = reverse_kl(x0, renoise(nets, batch, x0.detach(), through_fake_score=False))
        pairs = batch.extra("ode_pairs")
        regressed = nets.student(
            pairs["noise"], torch.ones_like(pairs["noise"][:, 0, 0, 0, 0]), pairs["text"]
        )
        if self.distance == "mse":
            distance = 0.5 * (regressed - pairs["x0"]).square().mean()
        else:
            distance = lpips(nets.decode(regressed), nets.decode(pairs["x0"]).detach())
        return Loss({"kl": kl, "regression": self.regression_weight * distance}, x0, logs)

    def cost(self) -> Cost:
        student = {
            "rollout": Passes(1, full_backward=1),
            "student": Passes(1, full_backward=1),
            "fake_score": Passes(1),
            "teacher": Passes(1),
        }
        return Cost(student, {"fake_score": Passes(1, full_backward=1)})


def lpips(video: Tensor, target: Tensor) -> Tensor:
    """Mean LPIPS over the frames of videos (B, 3, T, H, W) in [-1, 1]; frames below 64 pixels are enlarged for VGG."""
    from lpips import LPIPS

    frames, wanted = (v.transpose(1, 2).flatten(0, 1) for v in (video, target))
    if min(frames.shape[-2:]) < 64:
        frames, wanted = (
            torch.nn.functional.interpolate(v, size=(64, 64), mode="bilinear")
            for v in (frames, wanted)
        )
    if not _LPIPS:
        _LPIPS.append(LPIPS(net="vgg", verbose=False).to(video.device).eval().requires_grad_(False))
    return _LPIPS[0](frames, wanted).mean()


_LPIPS: list[torch.nn.Module] = []  # loaded once a process
