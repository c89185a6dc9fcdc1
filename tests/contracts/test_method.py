"""Pieces that objectives share: normalisers, surrogate losses, and the losses of both scores."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill_bench.draws import Draws
from distill_bench.method import (
    Batch,
    Loss,
    Nets,
    Renoised,
    dmd_normaliser,
    mean_per_sample,
    renoise,
    reverse_kl,
    toward,
    velocity_loss,
)

SHAPE, B = (2, 1, 2, 1), 3
DRAWS = Draws(0, 0, "student", range(B), torch.device("cpu"), torch.float64)
TEXT = DRAWS.noise("text", (1, 1))
BATCH = Batch(TEXT, DRAWS, SHAPE, 2.0, 0.1, 0.8)
X0 = DRAWS.noise("x0", SHAPE)


def linear(scale: float) -> Callable[..., Tensor]:
    """A denoiser that depends on x_t, sigma and text."""

    def predict(x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return scale * x_t + sigma.reshape(-1, 1, 1, 1, 1) + text[..., None, None]

    return predict


def noised(x0: Tensor, purpose: str) -> tuple[Tensor, Tensor]:
    sigma = BATCH.sigma(f"{purpose}/sigma")
    s = sigma.reshape(-1, 1, 1, 1, 1)
    return sigma, (1 - s) * x0 + s * BATCH.noise(f"{purpose}/noise")


def test_a_loss_is_the_sum_of_its_terms():
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(-0.5)}
    assert Loss(terms).total == 1.5


def test_means_per_sample_do_not_mix_samples():
    x = torch.arange(12.0).reshape(3, 2, 2)
    assert mean_per_sample(x).tolist() == [[[1.5]], [[5.5]], [[9.5]]]


def test_the_normaliser_is_the_mean_absolute_distance_to_the_teacher_and_has_no_gradient():
    x0 = X0.clone().requires_grad_()
    n = dmd_normaliser(x0, -X0)
    assert n.shape == (B, 1, 1, 1, 1)
    torch.testing.assert_close(n.flatten(), (2 * X0).abs().flatten(1).mean(1))
    assert not n.requires_grad


def test_toward_has_the_given_gradient_over_the_number_of_elements():
    x0, gradient = X0.clone().requires_grad_(), DRAWS.noise("gradient", SHAPE).requires_grad_()
    loss = toward(x0, gradient)
    at_x0, at_gradient = torch.autograd.grad(loss, (x0, gradient), allow_unused=True)
    torch.testing.assert_close(at_x0, gradient.detach() / x0.numel())
    assert at_gradient is None
    torch.testing.assert_close(loss.detach(), 0.5 * gradient.detach().square().mean())


@pytest.mark.parametrize("weight", [1.0, torch.tensor([0.5, 2, 3]).reshape(B, 1, 1, 1, 1)])
def test_the_reverse_kl_term_pushes_from_the_teacher_to_the_fake_score(weight):
    x0 = X0.clone().requires_grad_()
    fake, teacher = DRAWS.noise("fake", SHAPE), DRAWS.noise("teacher", SHAPE)
    loss, logs = reverse_kl(x0, Renoised(X0, DRAWS.uniform("s"), fake, teacher), weight)
    (gradient,) = torch.autograd.grad(loss, x0)
    n = (X0 - teacher).abs().mean((1, 2, 3, 4), keepdim=True)
    expected = weight * (fake - teacher) / n
    torch.testing.assert_close(gradient, expected / X0.numel())
    torch.testing.assert_close(logs["score_gap"], expected.abs().mean())


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("through_fake_score", [False, True])
@pytest.mark.parametrize("through_teacher", [False, True])
def test_renoising_keeps_the_graphs_that_are_asked_for(
    guidance_scale, through_fake_score, through_teacher
):
    """The teacher is the guided one."""
    x0 = X0.clone().requires_grad_()
    other = {"unguided_teacher": linear(7), "guidance_scale": guidance_scale}
    nets = Nets(linear(9), linear(2), linear(3), rollout=lambda _: x0, **other)
    scores = renoise(nets, BATCH, x0, through_fake_score, through_teacher)
    sigma, x_t = noised(X0, "renoise")
    assert torch.equal(scores.sigma, sigma)
    torch.testing.assert_close(scores.x_t.detach(), x_t)
    torch.testing.assert_close(scores.x0_fake.detach(), linear(2)(x_t, sigma, TEXT))
    torch.testing.assert_close(scores.x0_teacher.detach(), linear(3)(x_t, sigma, TEXT))
    wanted = {2: through_fake_score, 3: through_teacher}
    for scale, prediction in ((2, scores.x0_fake), (3, scores.x0_teacher)):
        assert prediction.requires_grad == wanted[scale]
        if wanted[scale]:
            (gradient,) = torch.autograd.grad(prediction.sum(), x0, retain_graph=True)
            slope = scale * (1 - sigma).reshape(-1, 1, 1, 1, 1)
            torch.testing.assert_close(gradient, slope.expand_as(x0))


def test_the_velocity_loss_is_half_the_mean_square_of_the_velocitys_error():
    """On given text and purpose, else on the batch's."""
    text = DRAWS.noise("other text", (1, 1))
    for given, purpose in ((None, "denoise"), (text, "other")):
        loss = velocity_loss(linear(0.5), BATCH, X0, given, purpose)
        sigma, x_t = noised(X0, purpose)
        error = linear(0.5)(x_t, sigma, TEXT if given is None else given) - X0
        expected = 0.5 * (error / sigma.reshape(-1, 1, 1, 1, 1)).square().mean()
        torch.testing.assert_close(loss, expected)
