"""Discriminator: its head, its losses and the noised data that it reads."""

import pytest
import torch
from torch import Tensor

from distill_bench.discriminator import (
    Head,
    approximate_r1,
    discriminator_loss,
    renoised_features,
    student_gan_loss,
)
from distill_bench.draws import Draws
from distill_bench.method import Batch

SHAPE, B = (4, 2, 1, 1), 3
DRAWS = Draws(0, 0, "fake_score/0", range(B), torch.device("cpu"), torch.float64)
BATCH = Batch(torch.zeros(B, 1, 1, dtype=torch.float64), DRAWS, SHAPE, 2.0, 0.1, 0.8)


class Role:
    """Features are x_t as tokens; the call is recorded."""

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        self.x_t, self.sigma, self.text, self.depth = x_t, sigma, text, depth
        return x_t.flatten(2).transpose(1, 2)


@pytest.fixture
def head() -> Head:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Head(4).double()


def noised(x0: Tensor, purpose: str) -> Tensor:
    s = BATCH.sigma(f"{purpose}/sigma").reshape(-1, 1, 1, 1, 1)
    return (1 - s) * x0 + s * BATCH.noise(f"{purpose}/noise")


def test_a_logit_is_the_mean_over_the_samples_own_tokens(head):
    tokens = DRAWS.noise("tokens", (5, 4))
    logits = head(tokens)
    assert logits.shape == (B,)
    each = torch.stack([head(tokens[:, i : i + 1]) for i in range(5)])
    torch.testing.assert_close(logits, each.mean(0))
    assert logits.std() > 0


def test_a_logit_depends_on_the_direction_of_a_token_and_not_on_its_size(head):
    """Of its deviation from its mean, and not linearly."""
    tokens = DRAWS.noise("tokens", (1, 4))
    torch.testing.assert_close(head(50 * tokens + 3), head(50 * tokens), rtol=0, atol=1e-5)
    torch.testing.assert_close(head(100 * tokens), head(50 * tokens), rtol=0, atol=1e-5)
    middle = head(torch.zeros(B, 1, 4, dtype=torch.float64))
    opposite = head(50 * tokens) + head(-50 * tokens) - 2 * middle
    assert opposite.abs().min() > 1e-3
    assert sum(p.numel() for p in head.parameters()) == (4 + 4) + (4 * 4 + 4) + (4 + 1)


def test_losses_are_cross_entropies_with_data_labelled_one():
    fake, real = (torch.tensor(values, dtype=torch.float64) for values in ([0.3, -2], [1.5, 0.2]))
    probability_fake, probability_real = fake.sigmoid(), real.sigmoid()
    torch.testing.assert_close(
        discriminator_loss(fake, real),
        -(1 - probability_fake).log().mean() - probability_real.log().mean(),
    )
    torch.testing.assert_close(student_gan_loss(fake), -probability_fake.log().mean())


def test_the_discriminators_loss_falls_on_data_and_rises_on_samples_and_the_students_opposes_it():
    fake, real = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    by_fake, by_real = torch.autograd.grad(discriminator_loss(fake, real), (fake, real))
    (by_student,) = torch.autograd.grad(student_gan_loss(fake), fake)
    assert (by_fake > 0).all()
    assert (by_real < 0).all()
    assert (by_student < 0).all()


def test_features_are_those_of_the_noised_samples():
    role, x0 = Role(), DRAWS.noise("x0", SHAPE)
    text = torch.ones(B, 1, 1)
    features = renoised_features(role, BATCH, x0, text, "gan", 0.3)
    torch.testing.assert_close(role.x_t, noised(x0, "gan"))
    assert torch.equal(role.sigma, BATCH.sigma("gan/sigma"))
    assert role.text is text
    assert role.depth == 0.3
    assert torch.equal(features, role.x_t.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("std", [0.1, 0.7])
def test_approximate_r1_is_the_mean_square_of_the_change_under_the_perturbation(std, head):
    role, real = Role(), DRAWS.noise("real", SHAPE)
    text = torch.ones(B, 1, 1)
    logit = head(noised(real, "gan_real").flatten(2).transpose(1, 2)) + torch.arange(B)
    r1 = approximate_r1(logit, head, role, BATCH, real, text, 0.3, std)
    x_t = noised(real, "gan_real") + std * BATCH.noise("gan_real/nudge")
    torch.testing.assert_close(role.x_t, x_t)
    assert torch.equal(role.sigma, BATCH.sigma("gan_real/sigma"))
    assert role.text is text
    assert role.depth == 0.3
    change = logit - head(x_t.flatten(2).transpose(1, 2))
    torch.testing.assert_close(r1, (change**2).sum() / B)
    assert change[2] > 1.5  # a mean of absolute changes would differ
    # both logits have gradients
    found, expected = (
        torch.autograd.grad(value, head.parameters(), retain_graph=True)
        for value in (r1, (change**2).sum() / B)
    )
    for part, by_hand in zip(found, expected, strict=True):
        torch.testing.assert_close(part, by_hand)
