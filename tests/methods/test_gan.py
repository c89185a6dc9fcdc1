"""Methods with a discriminator: its loss on samples and data, R1, and f-distill's density ratio."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from distill_bench.draws import Draws
from distill_bench.method import Batch, Nets
from distill_bench.methods.dmd2 import DMD2
from distill_bench.methods.f_distill import FDistill

SHAPE, B = (4, 2, 1, 1), 3  # four channels: a head normalises, and two would leave a sign
DRAWS = Draws(3, 0, "fake_score/0", range(B), torch.device("cpu"), torch.float64)
TEXT, DATA_TEXT = DRAWS.noise("text", (1, 2)), DRAWS.noise("data text", (1, 2))
X0, DATA = DRAWS.noise("x0", SHAPE), DRAWS.noise("data", SHAPE)
BATCH = Batch(
    TEXT,
    DRAWS,
    SHAPE,
    score_shift=2.0,
    sigma_min=0.2,
    sigma_max=0.7,
    extras={"real_latents": lambda _: {"x0": DATA, "text": DATA_TEXT}},
)


class Role:
    """A network with one weight, whose tokens depend on x_t, sigma, text and depth."""

    def __init__(self, scale: float) -> None:
        self.scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        s = sigma.reshape(-1, 1, 1, 1, 1)
        channel = torch.arange(4, dtype=x_t.dtype).reshape(1, 4, 1, 1, 1)
        return torch.tanh(self.scale * x_t + s + channel * text[:, :, :1, None, None])

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        return depth * self(x_t, sigma, text).flatten(2).transpose(1, 2)


def nets_of(method, x0: Tensor = X0) -> Nets:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = {name: net.double() for name, net in method.modules(4).items()}
    teacher = Role(-1.4)
    return Nets(
        Role(0.8),
        Role(1.1),
        teacher,
        rollout=lambda _: x0,
        unguided_teacher=teacher,
        modules=modules,
    )


def noised(x0: Tensor, purpose: str) -> tuple[Tensor, Tensor]:
    sigma = BATCH.sigma(f"{purpose}/sigma")
    s = sigma.reshape(-1, 1, 1, 1, 1)
    return (1 - s) * x0 + s * BATCH.noise(f"{purpose}/noise"), sigma


WEIGHTS = {"gan_weight": 0.3, "discriminator_weight": 0.6, "r1_weight": 5.0, "r1_std": 0.2}
GANS = {
    "fake_score": DMD2(gan="fake_score", feature_depth=0.4, **WEIGHTS),
    "teacher": DMD2(gan="teacher", feature_depth=0.4, **WEIGHTS),
    "f_distill": FDistill(feature_depth=0.4, **WEIGHTS),
}


def role_of(name: str, nets: Nets) -> Role:
    return nets.fake_score if name == "fake_score" else nets.unguided_teacher


@pytest.mark.parametrize("name", GANS)
def test_the_discriminator_learns_to_tell_data_from_samples(name):
    """Cross-entropy with data labelled one, and R1 of the data, each with its weight."""
    method = GANS[name]
    nets = nets_of(method)
    role, head = role_of(name, nets), nets.modules["head"]

    def logits(x0: Tensor, text: Tensor, purpose: str, nudge: float = 0.0) -> Tensor:
        x_t, sigma = noised(x0, purpose)
        return head(role.features(x_t + nudge * BATCH.noise("gan_real/nudge"), sigma, text, 0.4))

    fake, real = logits(X0, TEXT, "gan"), logits(DATA, DATA_TEXT, "gan_real")
    loss = method.fake_score_loss(nets, BATCH, X0)
    change = real - logits(DATA, DATA_TEXT, "gan_real", nudge=0.2)
    assert change.abs().min() > 1e-4
    expected = {
        "discriminator": 0.6 * (softplus(fake) + softplus(-real)).mean(),
        "r1": 0.6 * 5.0 * change.square().mean(),
    }
    trained = [*head.parameters(), *([role.scale] if name == "fake_score" else [])]
    for term, value in expected.items():
        torch.testing.assert_close(loss.terms[term], value)
        slopes = [
            torch.autograd.grad(one, trained, retain_graph=True, materialize_grads=True)
            for one in (loss.terms[term], value)
        ]
        torch.testing.assert_close(*slopes)
    assert loss.terms.keys() == {"denoise", "discriminator", "r1"}
    without = dataclasses.replace(method, r1_weight=0.0)
    assert without.fake_score_loss(nets, BATCH, X0).terms.keys() == {"denoise", "discriminator"}


@pytest.mark.parametrize("name", GANS)
def test_the_discriminators_loss_trains_its_head_and_only_a_fake_score_with_it(name):
    method = GANS[name]
    nets = nets_of(method)
    terms = method.fake_score_loss(nets, BATCH, X0).terms
    weights = [nets.fake_score.scale, *nets.modules["head"].parameters()]
    for term in ("discriminator", "r1"):
        of_role, *of_head = torch.autograd.grad(
            terms[term], weights, retain_graph=True, allow_unused=True
        )
        assert all(gradient.abs().max() > 0 for gradient in of_head[:-1])
        assert (of_role is not None) == (name == "fake_score")


@pytest.mark.parametrize("name", GANS)
def test_the_student_learns_to_be_taken_for_data(name):
    """f-distill reads the x_t at which scores are compared; DMD2 draws one of its own."""
    method = GANS[name]
    x0 = X0.clone().requires_grad_()
    nets = nets_of(method, x0)
    loss = method.student_loss(nets, BATCH)
    x_t, sigma = noised(x0, "renoise" if name == "f_distill" else "gan")
    logits = nets.modules["head"](role_of(name, nets).features(x_t, sigma, TEXT, 0.4))
    expected = 0.3 * softplus(-logits).mean()
    torch.testing.assert_close(loss.terms["gan"], expected)
    slopes = [
        torch.autograd.grad(term, x0, retain_graph=True) for term in (loss.terms["gan"], expected)
    ]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize(
    "method", [DMD2(gan="teacher"), DMD2(gan="fake_score"), FDistill(discriminator_lr=None)]
)
def test_a_head_without_a_rate_of_its_own_shares_the_fake_scores_optimiser(method):
    assert method.learning_rates() == {}
    own = dataclasses.replace(method, discriminator_lr=3e-3)
    assert own.learning_rates() == {"head": 3e-3}
    assert DMD2(discriminator_lr=3e-3).learning_rates() == {}


# ---- f-distill


def weighted(method: FDistill, logits: list[float], sigma: list[float], **options) -> Tensor:
    """h of samples, and the ratio's moving averages after it."""
    nets = dataclasses.replace(nets_of(method), **options)
    tensors = (torch.tensor(values, dtype=torch.float64) for values in (logits, sigma))
    h = method.weight(nets, BATCH, *tensors)
    return h, nets.modules["histogram"].ratio


def test_ratios_are_averaged_in_bins_between_the_lowest_and_the_highest_level():
    """Levels run from 0.2 to 0.7, so five bins are a tenth wide; both ends belong to a bin."""
    method = FDistill(bins=5, ratio_average=0.75)
    logits = torch.tensor([2.0, 3.0, 0.5, 7.0, 0.25]).log().tolist()
    _, ratio = weighted(method, logits, [0.2, 0.29, 0.31, 0.7, 0.69])
    expected = 0.75 + 0.25 * torch.tensor([2.5, 0.5, 1, 1, (7 + 0.25) / 2], dtype=torch.float64)
    torch.testing.assert_close(ratio, expected)


def test_ratios_are_clipped_and_h_has_mean_one():
    method = FDistill("forward_kl", bins=1, ratio_low=0.5, ratio_high=4.0, ratio_average=0.0)
    h, ratio = weighted(method, [50.0, -50.0, 0.0], [0.3, 0.4, 0.5])
    clipped = torch.tensor([4, 0.5, 1], dtype=torch.float64)
    torch.testing.assert_close(ratio, clipped.mean(0, keepdim=True))
    torch.testing.assert_close(h, clipped / clipped.mean(), rtol=1e-5, atol=0)


def test_logits_are_clipped_to_ten_if_the_ratio_has_wider_bounds():
    method = FDistill("forward_kl", bins=1, ratio_low=1e-8, ratio_high=1e8, ratio_average=0.0)
    for logit in (50.0, -50.0):
        _, ratio = weighted(method, [logit], [0.3])
        clipped = torch.tensor([10 * logit / abs(logit)], dtype=torch.float64).exp()
        torch.testing.assert_close(ratio, clipped)


def test_a_level_just_below_the_lowest_is_in_the_first_bin():
    method = FDistill(bins=5, ratio_average=0.0)
    _, ratio = weighted(method, [math.log(3.0)], [0.2 - 1e-12])
    assert ratio.tolist() == pytest.approx([3, 1, 1, 1, 1])


def test_a_sample_of_one_rank_in_two_counts_whole():
    """The other rank has none in this bin: count and total are both halved by the mean."""
    method = FDistill(bins=1, ratio_average=0.0)
    _, ratio = weighted(method, [math.log(3.0)], [0.3], mean_over_ranks=lambda value: value / 2)
    assert ratio.tolist() == pytest.approx([3])


def test_averages_and_the_mean_of_h_are_taken_over_the_ranks():
    """A second rank is simulated: it adds two samples of ratio 9 in the only bin, with h = 5."""
    method = FDistill("forward_kl", bins=1, ratio_average=0.0)

    def mean_over_ranks(value: Tensor) -> Tensor:
        other = torch.tensor([[2.0], [18.0]]) if value.ndim else torch.tensor(5.0)
        return (value + other.double()) / 2

    h, ratio = weighted(method, [0.0, 0.0], [0.3, 0.4], mean_over_ranks=mean_over_ranks)
    torch.testing.assert_close(ratio, torch.tensor([5.0], dtype=torch.float64))
    assert h[0] == pytest.approx(0.2 / ((0.2 + 5) / 2), rel=1e-4)


def test_h_multiplies_the_gradient_of_its_own_sample():
    method = FDistill("neyman", bins=1, gan_weight=0.0)
    x0 = X0.clone().requires_grad_()
    nets = nets_of(method, x0)
    loss = method.student_loss(nets, BATCH)
    (gradient,) = torch.autograd.grad(loss.terms["kl"], x0)
    x_t, sigma = noised(X0, "renoise")
    logits = nets.modules["head"](nets.unguided_teacher.features(x_t, sigma, TEXT, 0.5))
    h = method.weight(nets_of(method), BATCH, logits.detach(), sigma)
    gap = nets.fake_score(x_t, sigma, TEXT) - nets.teacher(x_t, sigma, TEXT)
    n = (X0 - nets.teacher(x_t, sigma, TEXT)).abs().mean((1, 2, 3, 4), keepdim=True)
    expected = h.reshape(-1, 1, 1, 1, 1) * gap / n / X0.numel()
    torch.testing.assert_close(gradient, expected.detach())
    assert h.std() > 0.01
    torch.testing.assert_close(loss.logs["h_variance"], h.square().mean() - 1)
