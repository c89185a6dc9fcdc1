"""DMD: the reverse-KL gradient plus regression on samples of the teacher's ODE."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distill_bench.method import (
    Batch,
    Citation,
    Loss,
    Method,
    Nets,
    NotNegative,
    Preset,
    Scales,
    renoise,
    reverse_kl,
)


@dataclass(frozen=True)
class DMD(Method):
    """Gradient (x0_fake - x0_teacher) / n at x0, plus regression_weight * distance(student(z), y).

    n = mean |x0 - x0_teacher| per sample. z is noise at sigma = 1, and y the sample that the guided
    teacher's ODE makes from z, so the regression anchors the student's first step (Yin et al.,
    2023, eq. 7-9). Distances:

    - `mse`: |.|^2 / 2 in latents, as in the ODE initialisation of the video codes
      (Self-Forcing@33593df, model/ode_regression.py);
    - `lpips`: the paper's, on decoded frames in [-1, 1] (Zhang et al., 2018, VGG). It needs the
      package lpips and torchvision's VGG weights in torch's cache; nothing here downloads them.
    """

    paper: ClassVar[Citation] = Citation(
        "2311.18828",
        "One-step Diffusion with Distribution Matching Distillation",
        "Tianwei Yin, Michaël Gharbi, Richard Zhang, Eli Shechtman, Frédo Durand, William T. "
        "Freeman, Taesung Park",
        2023,
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            "arXiv:2311.18828, section 4; weight 0.25 by a third party's code",
            {
                "method.regression_weight": 0.25,
                "method.distance": "lpips",
                "fake_score_updates": 1,
                "nfe": 1,
                "reuse_rollout": True,
            },
        ),
        "latent": Preset(
            "as `paper`, without LPIPS weights",
            {
                "method.regression_weight": 0.25,
                "method.distance": "mse",
                "fake_score_updates": 1,
                "nfe": 1,
                "reuse_rollout": True,
            },
        ),
    }

    regression_weight: Annotated[NotNegative, Scales("regression")] = 0.25
    distance: Literal["mse", "lpips"] = "mse"

    @property
    def packages(self) -> frozenset[str]:
        return frozenset({"lpips"} if self.distance == "lpips" else ())

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ode_pairs"})

    def rehearsed(self) -> "DMD":
        return replace(self, distance="mse")  # the same passes, without LPIPS's weights

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        kl, logs = reverse_kl(x0, renoise(nets, batch, x0.detach(), through_fake_score=False))
        pairs = batch.extra("ode_pairs")
        z, y = pairs["noise"], pairs["x0"]
        prediction = nets.student(z, z.new_ones(len(z)), pairs["text"])
        if self.distance == "mse":
            distance = 0.5 * (prediction - y).square().mean()
        else:
            distance = lpips(nets.decode(prediction), nets.decode(y).detach())
        return Loss({"kl": kl, "regression": self.regression_weight * distance}, x0, logs)


def lpips(video: Tensor, target: Tensor) -> Tensor:
    """Mean LPIPS over the frames of videos (B, 3, T, H, W) in [-1, 1].

    Frames below 64 pixels are enlarged to 64x64 for VGG.
    """
    frames, target_frames = (v.transpose(1, 2).flatten(0, 1) for v in (video, target))
    if min(frames.shape[-2:]) < 64:
        frames, target_frames = (
            interpolate(v, size=(64, 64), mode="bilinear") for v in (frames, target_frames)
        )
    return _lpips_net(video.device, type(video))(frames, target_frames).mean()


@cache
def _lpips_net(device: torch.device, _kind: type[Tensor]) -> nn.Module:
    """LPIPS of VGG, cached per type of tensor: in a memory rehearsal, its weights have no data."""
    from lpips import LPIPS  # optional

    return LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
