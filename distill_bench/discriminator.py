"""GAN terms of methods: a small classifier on a role's hidden states, and losses on its logits."""

from torch import Tensor, nn
from torch.nn.functional import softplus

from distill_bench.method import Batch, Role
from distill_bench.noise import add_noise


class Head(nn.Module):
    """Classifier from tokens (B, N, width) to one logit per sample, (B,): the mean over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.net(tokens)
        return logits.mean(dim=(1, 2))


def renoised_features(
    role: Role, batch: Batch, x0: Tensor, text: Tensor, purpose: str, depth: float
) -> Tensor:
    """Hidden states (B, N, width) of a role on noised samples.

    Args:
        role: its first blocks run.
        batch: draws the noise level and the noise.
        x0: samples, (B, C, T, H, W).
        text: (B, L, D).
        purpose: key of the draws, `{purpose}/sigma` and `{purpose}/noise`.
        depth: share of the blocks that run, in (0, 1].
    """
    sigma = batch.sigma(f"{purpose}/sigma")
    return role.features(add_noise(x0, batch.noise(f"{purpose}/noise"), sigma), sigma, text, depth)


def student_gan_loss(fake: Tensor) -> Tensor:
    """Mean softplus(-logit) over the student's samples (Goodfellow et al., 2014, non-saturating).

    Args:
        fake: logits of the student's samples, (B,).
    """
    return softplus(-fake).mean()


def discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Mean softplus(logit) over the student's samples plus mean softplus(-logit) over data.

    Args:
        fake: logits of the student's samples, (B,).
        real: logits of data, (B,).
    """
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
) -> Tensor:
    """Mean squared change of the logit of noised data under a further Gaussian perturbation.

    Lin et al., 2025 (APT), section on approximate R1. The perturbation is added to the very noised
    data that `logit` belongs to, and both logits have gradients where `role` is trained.
    FastGen@34f30e8, methods/distribution_matching/dmd2.py, perturbs the clean data instead.

    Args:
        logit: of the noised data, (B,): `renoised_features` of `real` under the purpose `gan_real`.
        head: the classifier.
        role: the network whose hidden states it reads.
        batch: draws; the perturbation is keyed `gan_real/nudge`.
        real: clean data, (B, C, T, H, W).
        text: of the data, (B, L, D).
        depth: share of the role's blocks that run, in (0, 1].
        std: standard deviation of the perturbation.
    """
    sigma = batch.sigma("gan_real/sigma")
    x_t = add_noise(real, batch.noise("gan_real/noise"), sigma)
    x_t = x_t + std * batch.noise("gan_real/nudge")
    perturbed: Tensor = head(role.features(x_t, sigma, text, depth))
    return (logit - perturbed).square().mean()
