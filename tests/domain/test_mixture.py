"""The mixture's closed forms against sampling, autograd and each other."""

import dataclasses
import functools

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from distill_bench.domain import mixture as m
from distill_bench.domain.closed_form import FlatNetwork
from distill_bench.networks.denoiser import Denoiser, Guided
from distill_bench.networks.ledger import Ledger
from distill_bench.noise import add_noise, x0_to_score

SIGMAS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
PROMPT = 3  # mostly to the right
MIXTURE = m.motion_mixture()
NET = FlatNetwork(m.MixtureBlock(MIXTURE)).requires_grad_(False)


def denoise(net=NET):
    return Denoiser(net, "teacher", Ledger(1))


def texts(count: int, prompt: int | None = PROMPT) -> torch.Tensor:
    """One-hot texts (count, 1, P); zeros for the null text."""
    rows = torch.zeros(count, 1, len(MIXTURE.weights), dtype=torch.float64)
    if prompt is not None:
        rows[:, :, prompt] = 1
    return rows


def noisy_density(sigma: float, weights: torch.Tensor) -> MixtureSameFamily:
    """Density of x_t by torch's own distributions, with full covariances."""
    basis, means = MIXTURE.basis, MIXTURE.means @ MIXTURE.basis.T
    clean = basis @ torch.diag_embed(MIXTURE.variances) @ basis.T
    covariance = (1 - sigma) ** 2 * clean + sigma**2 * torch.eye(len(basis), dtype=torch.float64)
    modes = MultivariateNormal((1 - sigma) * means, covariance)
    return MixtureSameFamily(Categorical(weights), modes)


@functools.cache
def data(first: int, end: int) -> torch.Tensor:
    """Exact samples (N, d) of the prompt, float64."""
    draws = torch.Generator().manual_seed(first)
    share = torch.rand(end - first, generator=draws)
    noise = torch.randn(end - first, 16, generator=draws)
    return m.transported(MIXTURE, [PROMPT] * len(share), share, noise).double()


def samples(count: int, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and noisy samples, (count, C, T, H, W), float64."""
    x0 = data(0, count).reshape(-1, *m.SHAPE)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=x0.dtype)
    return x0, add_noise(x0, noise, torch.full((count,), sigma, dtype=x0.dtype))


def tweedie_error(net: FlatNetwork, sigma: float, prompt: int | None = PROMPT) -> float:
    """Largest relative difference between a network's score and autograd of the log density."""
    _, x_t = samples(40, sigma)
    x_t.requires_grad_()
    weights = MIXTURE.weights.mean(0) if prompt is None else MIXTURE.weights[prompt]
    log_density = noisy_density(sigma, weights).log_prob(x_t.flatten(1))
    (expected,) = torch.autograd.grad(log_density.sum(), x_t)
    level = torch.full((40,), sigma, dtype=torch.float64)
    x0 = denoise(net)(x_t, level, texts(40, prompt))
    score = x0_to_score(x0, x_t, level).detach()
    return float((score - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("prompt", [PROMPT, None])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_score_is_the_gradient_of_the_log_density(sigma, prompt):
    """Tweedie's formula against autograd of torch's own mixture, in float64."""
    assert tweedie_error(NET, sigma, prompt) < 1e-9


@pytest.mark.parametrize(
    "fault",
    [
        {"variances": MIXTURE.variances.sqrt()},  # a standard deviation taken for a variance
        {"basis": MIXTURE.basis.T},
        {"means": 1.01 * MIXTURE.means},
        {"weights": MIXTURE.weights[torch.tensor([0, 1, 2, 4, 3])]},
    ],
    ids=lambda fault: next(iter(fault)),
)
def test_a_planted_fault_in_a_parameter_fails_the_comparison(fault):
    broken = FlatNetwork(m.MixtureBlock(dataclasses.replace(MIXTURE, **fault)))
    assert tweedie_error(broken.requires_grad_(False), 0.3) > 1e-3


def test_a_wrong_noise_level_fails_the_comparison():
    class Off(FlatNetwork):
        def forward(self, x_t, timestep, text, return_dict=False):
            return super().forward(x_t, 1.01 * timestep, text)

    off = Off(m.MixtureBlock(MIXTURE)).requires_grad_(False)
    assert tweedie_error(off, 0.3) > 1e-3


@pytest.mark.parametrize("sigma", [0.5, 0.7, 0.9])
def test_the_prediction_is_the_posterior_mean_by_monte_carlo(sigma):
    """Self-normalised importance sampling with the data as proposal, within 5 standard errors."""
    _, x_t = samples(6, sigma)
    x0 = data(10_000, 30_000)
    away = x_t.flatten(1)[:, None] - (1 - sigma) * x0
    weight = (-away.square().sum(-1) / (2 * sigma**2)).softmax(1)
    mean = weight @ x0
    spread = (x0 - mean[:, None]).square()
    error = (weight.square()[..., None] * spread).sum(1).sqrt()
    level = torch.full((6,), sigma, dtype=torch.float64)
    predicted = denoise()(x_t, level, texts(6)).flatten(1)
    assert ((predicted - mean).abs() / error).max() < 5
    assert error.mean() < 0.2  # the comparison says something


def test_the_prediction_is_the_best_denoiser_of_the_data():
    """No affine correction of its prediction reduces the error on fresh data."""
    x0, x_t = samples(6000, 0.4)
    predicted = denoise()(x_t, torch.full((6000,), 0.4, dtype=torch.float64), texts(6000))
    error = (x0 - predicted).flatten(1)
    inputs = torch.cat([x_t.flatten(1), torch.ones(6000, 1, dtype=torch.float64)], 1)
    correction = torch.linalg.lstsq(inputs, error).solution
    assert (inputs @ correction).square().mean() / error.square().mean() < 0.01


def test_the_null_text_is_the_mixture_over_prompts_and_guidance_follows_the_formula():
    _, x_t = samples(8, 0.6)
    sigma, guidance = torch.full((8,), 0.6, dtype=torch.float64), 3.0
    null = torch.zeros(1, 1, len(MIXTURE.weights), dtype=torch.float64)
    guided = Guided(denoise(), null, guidance)(x_t, sigma, texts(8))
    scores = []
    for weights in (MIXTURE.weights[PROMPT], MIXTURE.weights.mean(0)):
        leaf = x_t.clone().requires_grad_()
        log_density = noisy_density(0.6, weights).log_prob(leaf.flatten(1))
        scores.append(torch.autograd.grad(log_density.sum(), leaf)[0])
    score = scores[1] + guidance * (scores[0] - scores[1])
    torch.testing.assert_close((x_t + 0.36 * score) / 0.4, guided, rtol=1e-9, atol=1e-9)


def test_the_log_density_is_torchs():
    x0, _ = samples(50, 0.1)
    joint = m.joint_log_density(MIXTURE, x0.flatten(1), MIXTURE.weights[PROMPT])
    expected = noisy_density(0.0, MIXTURE.weights[PROMPT]).log_prob(x0.flatten(1))
    torch.testing.assert_close(joint.logsumexp(1), expected, rtol=1e-9, atol=1e-9)


def test_samples_have_the_modes_motion_and_variance_of_their_prompt():
    x, _ = samples(20_000, 0.1)
    x, weights = x.flatten(1), MIXTURE.weights[PROMPT]
    mode = m.joint_log_density(MIXTURE, x, weights).argmax(1)
    shares = torch.bincount(mode, minlength=len(weights)) / len(x)
    assert 0.5 * (shares - weights).abs().sum() < 0.02
    at = torch.tensor([0.1, 0.5, 0.9, 1.5, 2.2, 2.5], dtype=torch.float64)
    below = (m.motion(MIXTURE, x)[:, None] <= at).double().mean(0)
    expected = m.motion_distribution(MIXTURE, weights, at)
    torch.testing.assert_close(below, expected, rtol=0, atol=4 * 0.5 / 20_000**0.5)
    z = x @ MIXTURE.basis
    torch.testing.assert_close(z[:, 2:].var(0), MIXTURE.variances[0, 2:], rtol=0.05, atol=0)


def test_modes_have_the_meaning_that_their_motion_says():
    """Motion to the right brightens the right half over time; a frozen clip has no motion."""
    right, down = (MIXTURE.basis[:, i].reshape(m.SHAPE)[0] for i in (0, 1))
    contrast = right[:, :, 1].sum(1) - right[:, :, 0].sum(1)
    assert (contrast.diff() > 0).all()
    assert (down.diff(dim=0)[:, 1] > 0).all()
    frozen = torch.randn(5, 1, 1, 2, 2, dtype=torch.float64).expand(5, *m.SHAPE).flatten(1)
    assert m.motion(MIXTURE, frozen).max() < 1e-9
    radius = MIXTURE.means[:, :2].norm(dim=1)
    assert radius[0] == 0
    expected = torch.tensor([m.SLOW, m.FAST], dtype=torch.float64).repeat_interleave(m.HEADINGS)
    torch.testing.assert_close(radius[1:], expected)
    for weights, (still, slow, fast, _) in zip(MIXTURE.weights, m.PROMPTS.values(), strict=True):
        sums = [float(part.sum()) for part in weights.split([1, m.HEADINGS, m.HEADINGS])]
        assert sums == pytest.approx([still, slow, fast])
    left = list(m.PROMPTS).index("mostly to the left")
    assert int(MIXTURE.weights[left][1:9].argmax()) == m.HEADINGS // 2


def at_first(value: float) -> torch.Tensor:
    """Factors (M, d) of 1, but of `value` at the last axis of the first mode."""
    factors = torch.ones_like(MIXTURE.variances)
    factors[0, -1] = value
    return factors


# factors of weights, one of which turns negative while each sum stays 1
TURNED = torch.ones_like(MIXTURE.weights)
TURNED[0, 1] = -1.0
TURNED[0, 0] = 1 + 2 * MIXTURE.weights[0, 1] / MIXTURE.weights[0, 0]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"weights": 2 * MIXTURE.weights}, "add up to 1; they add up to 2"),
        ({"weights": MIXTURE.weights - 0.1}, "must be positive"),
        ({"basis": 1.1 * MIXTURE.basis}, "orthonormal"),
        ({"variances": MIXTURE.variances * at_first(-1.0)}, "variances must be positive"),
        ({"variances": MIXTURE.variances * at_first(0.0)}, "variances must be positive"),
        ({"weights": MIXTURE.weights * TURNED}, "must be positive"),
        (
            {"variances": MIXTURE.variances * torch.linspace(1, 2, 16, dtype=torch.float64)},
            "both motion axes",
        ),
    ],
)
def test_impossible_parameters_are_refused(fault, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MIXTURE, **fault)


def test_parameters_rounded_to_single_precision_are_accepted():
    """As weights files have them."""
    single = {name: value.float() for name, value in MIXTURE.tensors().items()}
    assert m.Mixture(**single).basis.dtype == torch.float32


def test_a_mode_without_weight_is_never_drawn():
    """Not even by a share of 0, nor by one at the border of two modes."""
    weights = torch.zeros(1, len(MIXTURE.means), dtype=torch.float64)
    weights[0, [3, 7]] = 0.5
    mixture = dataclasses.replace(MIXTURE, weights=weights)
    share, still = torch.tensor([0.0, 0.25, 0.5, 0.99]), torch.zeros(4, 16)
    x = m.transported(mixture, [0] * 4, share, still).double()
    torch.testing.assert_close(x @ MIXTURE.basis, MIXTURE.means[[3, 3, 7, 7]], rtol=0, atol=1e-6)


def test_motion_is_that_of_the_first_two_axes():
    """Modes that differ along another axis, too, have the same motion."""
    means = MIXTURE.means.clone()
    means[:, 2] = torch.linspace(-3, 3, len(means), dtype=torch.float64)
    shifted = dataclasses.replace(MIXTURE, means=means)
    at = torch.linspace(0, 3, 20, dtype=torch.float64)
    below = [m.motion_distribution(mix, MIXTURE.weights[PROMPT], at) for mix in (MIXTURE, shifted)]
    torch.testing.assert_close(*below)


def test_total_variation_is_half_the_absolute_difference():
    shares = torch.tensor([0.5, 0.3, 0.2])
    weights = torch.tensor([0.2, 0.3, 0.5])
    assert float(m.total_variation(shares, weights)) == pytest.approx(0.3)
    both = m.total_variation(torch.stack([shares, weights]), weights)
    assert both.tolist() == pytest.approx([0.3, 0.0])
