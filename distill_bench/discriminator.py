"""Heads and losses of GAN terms: a small classifier on a role's hidden states, and the non-saturating losses on its logits."""

from torch import Tensor, nn
from torch.nn.functional import softplus

from distill_bench.method import Batch, Role
from distill_bench.noise import add_noise


class Head(nn.Module):
    """Tokens (B, N, width) to one logit a sample (B,), the mean over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens).mean(dim=(1, 2))


def renoised_features(
    role: Role, batch: Batch, x0: Tensor, text: Tensor, purpose: str, depth: float
) -> Tensor:
    """Hidden states (B, N, width) of `role` on x0 noised at the level and with the noise of `purpose`."""
    sigma = batch.sigma(f"{purpose}/sigma")
    return role.features(add_noise(x0, batch.noise(f"{purpose}/noise"), sigma), sigma, text, depth)


def student_gan_loss(fake: Tensor) -> Tensor:
    """Mean softplus(-logit) over the student's samples (Goodfellow et al., 2014, non-saturating)."""
    return softplus(-fake).mean()


def discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Mean softplus(logit) over the student's samples plus mean softplus(-logit) over data."""
    return softplus(fake).mean() + softplus(-real).mean()


def approximate_r1(
    logit: Tensor,
    head: nn.Module,
    role: Role,
    batch: Batch,
    real: Tensor,
    text: Tensor,
    depth: float,
    std: float,
):
    """Mean squared change of the logit of noised data under a further Gaussian nudge (Lin et al., 2025, APT).

    The nudge is on the noised data that `logit` (B,) itself is of; where `role` is trained both have its gradient.
    FastGen@34f30e8, methods/distribution_matching/dmd2.py,
    nudges the clean data instead and compares that with the noised one's logit.
    """
    sigma = batch.sigma("gan_real/sigma")
    x_t = add_noise(real, batch.noise("gan_real/noise"), sigma) + std * batch.noise(
        "gan_real/nudge"
    )
    return (logit - head(role.features(x_t, sigma, text, depth))).square().mean()
