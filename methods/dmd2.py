"""DMD2: the reverse-KL gradient with a fake score on a faster time scale, optionally with a GAN."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from distill_bench.discriminator import (
    Head,
    approximate_r1,
    discriminator_loss,
    renoised_features,
    student_gan_loss,
)
from distill_bench.method import (
    Batch,
    Citation,
    Depth,
    Equals,
    Loss,
    Method,
    Nets,
    NotNegative,
    Positive,
    Preset,
    Raises,
    Role,
    Scales,
    Space,
    added,
    denoising_loss,
    renoise,
    reverse_kl,
)


@dataclass(frozen=True)
class DMD2(Method):
    """Gradient (x0_fake - x0_teacher) / n at x0, plus gan_weight * softplus(-D) if there is a GAN.

    n = mean |x0 - x0_teacher| per sample. Both predictions are detached, so no Jacobian of a
    network enters (Yin et al., 2024, eq. 2-3; Yin et al., 2023, eq. 7-8). The two-time-scale update
    rule is the run's `fake_score_updates`.

    D is a small head on the hidden states of noised samples, after the share `feature_depth` of the
    blocks. Its loss is discriminator_weight * (softplus(D(x0)) + softplus(-D(real))). The field
    `gan` selects the network that provides the blocks:

    - `fake_score` (the paper, section 4.3): head and fake score share an optimiser, and the loss of
      D also trains the blocks;
    - `teacher` (FastGen@34f30e8, methods/distribution_matching/dmd2.py): the blocks are frozen, the
      head has its own optimiser, and r1_weight adds APT's approximate R1.
    """

    paper: ClassVar[Citation] = Citation(
        "2405.14867",
        "Improved Distribution Matching Distillation for Fast Image Synthesis",
        "Tianwei Yin, Michaël Gharbi, Taesung Park, Richard Zhang, Eli Shechtman, Frédo Durand, "
        "William T. Freeman",
        2024,
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "video": Preset(
            "Self-Forcing@33593df, model/dmd.py; CausVid@ca21150, causvid/dmd.py; "
            "LightX2V@f8aee98, trainers/dmd",
            {"method.gan": "none", "fake_score_updates": 5},
        ),
        "paper": Preset(
            "DMD2@8d8fa55, main/sd_guidance.py, main/train_sd.py (SDXL's weights)",
            {
                "method.gan": "fake_score",
                "method.gan_weight": 5e-3,
                "method.denoise": "noise",
                "method.discriminator_weight": 5e-3,  # half of theirs, as is our denoising loss
                "fake_score_updates": 5,
                "reuse_rollout": True,
            },
        ),
        "fastgen": Preset(
            "FastGen@34f30e8, methods/distribution_matching/dmd2.py, configs/experiments/WanT2V",
            {
                "method.gan": "teacher",
                "method.gan_weight": 0.03,
                "method.discriminator_weight": 1.0,
                "method.discriminator_lr": 1e-4,
                "method.denoise": "x0",
                "fake_score_updates": 4,
                "student_input": "real_data",
                "stepping": "ode",
            },
        ),
    }

    gan: Literal["none", "fake_score", "teacher"] = "none"
    gan_weight: Annotated[NotNegative, Scales("gan")] = 5e-3
    discriminator_weight: Annotated[NotNegative, Scales("discriminator", "r1")] = 1e-2
    # None: the head shares the fake score's optimiser
    discriminator_lr: Annotated[Positive | None, Equals("rate/head")] = None
    feature_depth: Depth = 0.5
    r1_weight: Annotated[NotNegative, Scales("r1")] = 0.0
    r1_std: Annotated[Positive, Raises("r1")] = 0.1
    denoise: Space = added("velocity")  # space of the fake score's denoising loss

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.gan == "none" else frozenset({"real_latents"})

    def modules(self, feature_width: int) -> Mapping[str, nn.Module]:
        return {} if self.gan == "none" else {"head": Head(feature_width)}

    def learning_rates(self) -> Mapping[str, float]:
        if self.gan == "none" or self.discriminator_lr is None:
            return {}
        return {"head": self.discriminator_lr}

    @property
    def differentiated_roles(self) -> frozenset[str]:
        roles = {"none": (), "fake_score": ("fake_score",), "teacher": ("unguided_teacher",)}
        return frozenset(roles[self.gan])

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        kl, logs = reverse_kl(x0, renoise(nets, batch, x0.detach(), through_fake_score=False))
        terms = {"kl": kl}
        if self.gan != "none":
            logits = self._logits(nets, batch, x0, batch.text, "gan")
            terms["gan"] = self.gan_weight * student_gan_loss(logits)
        return Loss(terms, x0, logs)

    def fake_score_loss(self, nets: Nets, batch: Batch, x0: Tensor) -> Loss:
        terms = {"denoise": denoising_loss(nets.fake_score, batch, x0, self.denoise)}
        if self.gan != "none":
            data = batch.extra("real_latents")
            fake = self._logits(nets, batch, x0, batch.text, "gan")
            real = self._logits(nets, batch, data["x0"], data["text"], "gan_real")
            terms["discriminator"] = self.discriminator_weight * discriminator_loss(fake, real)
            if self.r1_weight:
                clean = batch, data["x0"], data["text"], self.feature_depth, self.r1_std
                r1 = approximate_r1(real, nets.modules["head"], self._role(nets), *clean)
                terms["r1"] = self.discriminator_weight * self.r1_weight * r1
        return Loss(terms)

    def _role(self, nets: Nets) -> Role:
        """The network whose hidden states D reads."""
        return nets.fake_score if self.gan == "fake_score" else nets.unguided_teacher

    def _logits(self, nets: Nets, batch: Batch, x0: Tensor, text: Tensor, purpose: str) -> Tensor:
        # frozen blocks need no graph for detached samples
        with torch.set_grad_enabled(x0.requires_grad or self.gan == "fake_score"):
            features = renoised_features(
                self._role(nets), batch, x0, text, purpose, self.feature_depth
            )
        return nets.modules["head"](features)
