"""f-distill: the reverse-KL gradient with samples weighted by their density ratio."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

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
    Count,
    Depth,
    Equals,
    Loss,
    Lowers,
    Method,
    Nets,
    NotNegative,
    Positive,
    Preset,
    Raises,
    Scales,
    Share,
    renoise,
    reverse_kl,
    velocity_loss,
)
from distill_bench.noise import over

# weight h of each f-divergence as a function of r = p_data / p_student (Xu et al., 2025)
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
    """Gradient h(r) (x0_fake - x0_teacher) / n at x0, plus gan_weight * softplus(-D).

    D is a head on the teacher's features of the x_t at which the scores are compared, and
    n = mean |x0 - x0_teacher| per sample. The ratio r = exp(clip(D, -10, 10)) is clipped to
    [ratio_low, ratio_high] and divided by its moving average at this noise level (`bins` of sigma,
    kept in the checkpoint). h is `WEIGHTS[divergence]`, divided by its mean over the global batch.

    Xu et al., 2025; FastGen@34f30e8, methods/distribution_matching/f_distill.py.
    """

    paper: ClassVar[Citation] = Citation(
        "2502.15681",
        "One-step Diffusion Models with f-Divergence Distribution Matching",
        "Yilun Xu, Weili Nie, Arash Vahdat",
        2025,
    )
    title: ClassVar[str] = "f-distill"
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
    gan_weight: Annotated[NotNegative, Scales("gan")] = 1e-3
    discriminator_weight: Annotated[NotNegative, Scales("discriminator", "r1")] = 1.0
    # None: the head shares the fake score's optimiser
    discriminator_lr: Annotated[Positive | None, Equals("rate/head")] = 1e-4
    feature_depth: Depth = 0.5
    r1_weight: Annotated[NotNegative, Scales("r1")] = 0.0
    r1_std: Annotated[Positive, Raises("r1")] = 0.1
    ratio_low: Annotated[Positive, Raises("mean/histogram")] = 0.1
    ratio_high: Annotated[Positive, Raises("mean/histogram")] = 20.0
    # decay of the moving averages, per micro-batch
    ratio_average: Annotated[Share, Lowers("moves/histogram", linear=True)] = 0.9
    bins: Annotated[Count, Equals("size/histogram")] = 10

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

    @property
    def differentiated_roles(self) -> frozenset[str]:
        return frozenset({"unguided_teacher"})

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        scores = renoise(nets, batch, x0, through_fake_score=False)
        features = nets.unguided_teacher.features(
            scores.x_t, scores.sigma, batch.text, self.feature_depth
        )
        logits = nets.modules["head"](features)
        h = self.weight(nets, batch, logits.detach(), scores.sigma)
        kl, logs = reverse_kl(x0, scores, over(h, x0))
        terms = {"kl": kl, "gan": self.gan_weight * student_gan_loss(logits)}
        return Loss(terms, x0, logs | {"h_variance": h.square().mean() - 1})

    def weight(self, nets: Nets, batch: Batch, logits: Tensor, sigma: Tensor) -> Tensor:
        """h (B,), with mean 1 over the global batch; updates the moving averages of the ratio."""
        ratio = logits.clamp(-10, 10).exp().clamp(self.ratio_low, self.ratio_high)
        position = (sigma - batch.sigma_min) / (batch.sigma_max - batch.sigma_min) * self.bins
        bins = one_hot(position.floor().long().clamp(0, self.bins - 1), self.bins).to(ratio.dtype)
        count, total = nets.mean_over_ranks(torch.stack([bins.sum(0), bins.T @ ratio]))
        average = nets.modules["histogram"].ratio  # per bin
        updated = torch.lerp(total / count.clamp(min=1e-6), average, self.ratio_average)
        average.copy_(torch.where(count > 0, updated, average))
        h = WEIGHTS[self.divergence](ratio / (bins @ average + 1e-6))
        return h / (nets.mean_over_ranks(h.mean()) + 1e-6)

    def fake_score_loss(self, nets: Nets, batch: Batch, x0: Tensor) -> Loss:
        data = batch.extra("real_latents")
        real, text, depth = data["x0"], data["text"], self.feature_depth
        head, teacher = nets.modules["head"], nets.unguided_teacher
        with torch.no_grad():  # the teacher's features are frozen
            fake_features = renoised_features(teacher, batch, x0, batch.text, "gan", depth)
            real_features = renoised_features(teacher, batch, real, text, "gan_real", depth)
        real_logit = head(real_features)
        discriminator = discriminator_loss(head(fake_features), real_logit)
        terms = {
            "denoise": velocity_loss(nets.fake_score, batch, x0),
            "discriminator": self.discriminator_weight * discriminator,
        }
        if self.r1_weight:
            r1 = approximate_r1(real_logit, head, teacher, batch, real, text, depth, self.r1_std)
            terms["r1"] = self.discriminator_weight * self.r1_weight * r1
        return Loss(terms)
