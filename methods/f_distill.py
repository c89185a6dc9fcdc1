"""f-distill: the reverse-KL gradient, each sample weighted by its density ratio as the divergence wants it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

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
    Cost,
    Count,
    Depth,
    Loss,
    Method,
    Nets,
    NotNegative,
    Passes,
    Positive,
    Preset,
    Share,
    renoise,
    reverse_kl,
    velocity_loss,
)
from distill_bench.noise import over

# the weight h of each f-divergence as a function of r = p_data / p_student (Xu et al., 2025)
WEIGHTS = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: 1 - 1 / (1 + r),
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "squared_hellinger": lambda r: r**0.5,
    "jeffreys": lambda r: 1 + r,
}


@dataclass(frozen=True)
class FDistill(Method):
    """At x0 the gradient h(r) (x0_fake - x0_teacher) / n, plus gan_weight * softplus(-D), D a head on the teacher's features.

    r = exp(clip(D(x_t), -10, 10)), clipped to [ratio_low, ratio_high], over the moving average of the r of its noise level
    (`bins` of sigma, kept in the checkpoint); h is `WEIGHTS[divergence]`, over its mean over the global batch (Xu et al., 2025;
    FastGen@34f30e8, methods/distribution_matching/f_distill.py). D sees the x_t of the score comparison itself.
    """

    paper: ClassVar[str] = "arXiv:2502.15681"
    presets: ClassVar[Mapping[str, Preset]] = {
        "fastgen": Preset(
            "FastGen@34f30e8, methods/distribution_matching/f_distill.py",
            {"fake_score_updates": 4, "student_input": "real_data"},
        )
    }

    divergence: Literal[
        "reverse_kl",
        "forward_kl",
        "jensen_shannon",
        "softened_reverse_kl",
        "neyman",
        "squared_hellinger",
        "jeffreys",
    ] = "jensen_shannon"
    gan_weight: NotNegative = 1e-3
    discriminator_weight: NotNegative = 1.0
    discriminator_lr: Positive | None = (
        1e-4  # of the head; None: it shares the fake score's optimiser
    )
    feature_depth: Depth = 0.5
    r1_weight: NotNegative = 0.0
    r1_std: Positive = 0.1
    ratio_low: Positive = 0.1
    ratio_high: Positive = 20.0
    ratio_average: Share = 0.9  # decay of the moving averages
    bins: Count = 10

    def __post_init__(self) -> None:
        if self.ratio_low >= self.ratio_high:
            raise ValueError(
                f"ratio_low {self.ratio_low:g} must be below ratio_high {self.ratio_high:g}"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"real_latents"})

    def modules(self, feature_width: int) -> Mapping[str, nn.Module]:
        histogram = nn.Module()
        histogram.register_buffer("ratio", torch.ones(self.bins))
        return {"head": Head(feature_width), "histogram": histogram}

    def learning_rates(self) -> Mapping[str, float]:
        return {} if self.discriminator_lr is None else {"head": self.discriminator_lr}

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0, through_fake_score=False)
        logits = nets.modules["head"](
            nets.unguided_teacher.features(scores.x_t, scores.sigma, batch.text, self.feature_depth)
        )
        h = self.weight(nets, batch, logits.detach(), scores.sigma)
        kl, logs = reverse_kl(x0, scores, over(h, x0))
        terms = {"kl": kl, "gan": self.gan_weight * student_gan_loss(logits)}
        return Loss(terms, x0, logs | {"h_variance": h.square().mean() - 1})

    def weight(self, nets: Nets, batch: Batch, logits: Tensor, sigma: Tensor) -> Tensor:
        """h (B,), of mean 1 over the global batch; moves the histogram on."""
        ratio = logits.clamp(-10, 10).exp().clamp(self.ratio_low, self.ratio_high)
        place = (sigma - batch.sigma_min) / (batch.sigma_max - batch.sigma_min) * self.bins
        one_hot = torch.nn.functional.one_hot(
            place.floor().long().clamp(0, self.bins - 1), self.bins
        ).to(ratio.dtype)
        count, total = nets.mean_over_ranks(torch.stack([one_hot.sum(0), one_hot.T @ ratio]))
        average = nets.modules["histogram"].ratio
        moved = torch.lerp(total / count.clamp(min=1e-6), average, self.ratio_average)
        average.copy_(torch.where(count > 0, moved, average))
        h = WEIGHTS[self.divergence](ratio / (one_hot @ average + 1e-6))
        return h / (nets.mean_over_ranks(h.mean()) + 1e-6)

    def fake_score_loss(self, nets: Nets, batch: Batch, x0: Tensor) -> Loss:
        data, head, role = batch.extra("real_latents"), nets.modules["head"], nets.unguided_teacher
        with torch.no_grad():  # the teacher is frozen, and so are its features
            fake = renoised_features(role, batch, x0, batch.text, "gan", self.feature_depth)
            real = renoised_features(
                role, batch, data["x0"], data["text"], "gan_real", self.feature_depth
            )
        logit = head(real)
        terms = {
            "denoise": velocity_loss(nets.fake_score, batch, x0),
            "discriminator": self.discriminator_weight * discriminator_loss(head(fake), logit),
        }
        if self.r1_weight:
            r1 = approximate_r1(
                logit, head, role, batch, data["x0"], data["text"], self.feature_depth, self.r1_std
            )
            terms["r1"] = self.discriminator_weight * self.r1_weight * r1
        return Loss(terms)

    def cost(self) -> Cost:
        e = self.feature_depth
        student = {
            "rollout": Passes(1, full_backward=1),
            "fake_score": Passes(1),
            "teacher": Passes(1),
            "unguided_teacher": Passes(e, e),
        }
        return Cost(
            student,
            {
                "fake_score": Passes(1, full_backward=1),
                "unguided_teacher": Passes((2 + bool(self.r1_weight)) * e),
            },
        )
