"""Loss terms beside the matching term, means over ranks, and hooks."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from distill_bench.discriminator import Head, approximate_r1, renoised_features
from distill_bench.draws import Draws
from distill_bench.method import Batch, Nets, velocity_loss
from distill_bench.methods.consistency import Consistency
from distill_bench.methods.dmd import DMD
from distill_bench.methods.dmd2 import DMD2
from distill_bench.methods.gradient_template import GradientTemplate
from distill_bench.methods.ida import IDA
from distill_bench.methods.sgmd import SGMD
from distill_bench.noise import add_noise, over

SHAPE, B = (2, 2, 2, 2), 3


def smooth_net(seed: int):
    """Nonlinear denoiser that mixes all latents."""
    generator = torch.Generator().manual_seed(seed)
    size = 2**4
    mix, out = torch.randn(2, size, size, generator=generator, dtype=torch.float64) / 4

    def net(x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        flat = x_t.reshape(len(x_t), -1)
        return (flat + torch.tanh(flat @ mix + sigma[:, None]) @ out).reshape(x_t.shape)

    return net


@pytest.fixture
def setting():
    draws = Draws(3, 0, "student", range(B), torch.device("cpu"), torch.float64)
    pairs = {
        "noise": draws.noise("z", SHAPE),
        "x0": draws.noise("y", SHAPE),
        "text": torch.zeros(B, 1, 1, dtype=torch.float64),
    }
    batch = Batch(
        torch.zeros(B, 1, 1, dtype=torch.float64),
        draws,
        SHAPE,
        2.0,
        0.02,
        0.98,
        {"ode_pairs": lambda _: pairs},
    )
    x0 = draws.noise("x0", SHAPE).requires_grad_()
    nets = Nets(
        student=smooth_net(0), fake_score=smooth_net(1), teacher=smooth_net(2), rollout=lambda _: x0
    )
    return nets, batch, x0


def test_the_regression_of_dmd_reaches_the_student_with_its_weight(setting):
    nets, batch, _ = setting
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    nets = dataclasses.replace(nets, student=lambda x, s, t: scale * x)
    (slope,) = torch.autograd.grad(
        DMD(regression_weight=0.25).student_loss(nets, batch).total, scale
    )
    z, y = (batch.extra("ode_pairs")[key] for key in ("noise", "x0"))
    torch.testing.assert_close(slope, 0.25 * ((z - y) * z).mean())


@pytest.mark.parametrize("correction", ["velocity", "x0"])
@pytest.mark.parametrize("residual_space", ["x0", "x0_over_sigma"])
def test_the_term_of_a_shared_graph_is_the_fake_scores_loss_on_the_students_draws(
    setting, correction, residual_space
):
    nets, batch, x0 = setting
    method = SGMD(correction=correction, residual_space=residual_space)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    net = nets.fake_score
    nets = dataclasses.replace(nets, fake_score=lambda x, s, t: scale * net(x, s, t))
    own = method.student_loss(nets, batch).fake_score_terms["denoise"]

    class OfStudent(Draws):
        def _key(self, purpose: str):
            return super()._key(purpose.replace("denoise/", "renoise/"))

    draws = OfStudent(3, 0, "student", range(B), torch.device("cpu"), torch.float64)
    batch = dataclasses.replace(batch, draws=draws)
    apart = method.fake_score_loss(nets, batch, x0.detach()).terms["denoise"]
    torch.testing.assert_close(own, apart)
    slopes = [torch.autograd.grad(one, scale)[0] for one in (own, apart)]
    assert slopes[0] == pytest.approx(float(slopes[1])) and slopes[0] != 0


def test_the_fake_score_learns_to_denoise_in_velocity_or_in_x0(setting):
    nets, batch, x0 = setting
    sigma, noise = batch.sigma("denoise/sigma"), batch.noise("denoise/noise")
    error = x0.detach() - nets.fake_score(add_noise(x0.detach(), noise, sigma), sigma, batch.text)
    velocity = 0.5 * (error / over(sigma, x0)).square().mean()
    for loss in (
        velocity_loss(nets.fake_score, batch, x0.detach()),
        DMD2().fake_score_loss(nets, batch, x0.detach()).total,
        SGMD().fake_score_loss(nets, batch, x0.detach()).total,
    ):
        torch.testing.assert_close(loss, velocity)
    paper = SGMD("c_t", "x0", "x0").fake_score_loss(nets, batch, x0.detach())
    torch.testing.assert_close(paper.total, 0.05 * error.square().mean())


def test_the_fake_score_of_dmd2_learns_in_the_space_of_the_code_that_its_preset_cites(setting):
    """DMD2 has the mean square of the noise error, FastGen's Wan configs that of the x0 error.

    Ours are half of these. The errors are those of predictions of the noise and of x0.
    """
    nets, batch, x0 = setting
    x0 = x0.detach()
    sigma, noise = batch.sigma("denoise/sigma"), batch.noise("denoise/noise")
    s = over(sigma, x0)
    x_t = add_noise(x0, noise, sigma)
    x0_fake = nets.fake_score(x_t, sigma, batch.text)
    noise_fake = (x_t - (1 - s) * x0_fake) / s
    references = {
        "paper": (noise_fake - noise).square().mean(),
        "fastgen": (x0_fake - x0).square().mean(),
    }
    for preset, theirs in references.items():
        space = DMD2.presets[preset].overrides["method.denoise"]
        ours = DMD2(denoise=space).fake_score_loss(nets, batch, x0).total
        torch.testing.assert_close(ours, theirs / 2, rtol=1e-12, atol=0)


def test_the_paper_preset_of_dmd2_weighs_its_discriminator_as_the_released_code(setting):
    """Theirs: loss_fake + 1e-2 (softplus(D(fake)) + softplus(-D(real))); ours is half of it."""
    nets, batch, x0 = setting
    preset = DMD2.presets["paper"].overrides
    fields = {k.removeprefix("method."): v for k, v in preset.items() if k.startswith("method.")}
    method, x0 = DMD2(**fields), x0.detach()

    class Role:
        def __call__(self, *inputs: Tensor) -> Tensor:
            return smooth_net(1)(*inputs)

        def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
            return torch.tanh(x_t).flatten(2).transpose(1, 2)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Head(2).double()
    real = {"x0": batch.noise("real"), "text": batch.text}
    nets = dataclasses.replace(nets, fake_score=Role(), modules={"head": head})
    batch = dataclasses.replace(batch, extras={"real_latents": lambda _: real})
    terms = method.fake_score_loss(nets, batch, x0).terms
    logits = [
        head(renoised_features(Role(), batch, x, batch.text, purpose, 0.5))
        for x, purpose in ((x0, "gan"), (real["x0"], "gan_real"))
    ]
    theirs = 1e-2 * (softplus(logits[0]).mean() + softplus(-logits[1]).mean())
    torch.testing.assert_close(terms["discriminator"], theirs / 2, rtol=1e-12, atol=0)


def test_approximate_r1_differentiates_both_of_its_passes_through_trained_features():
    """Its derivative by a weight of the role agrees with finite differences of the stated loss."""
    draws = Draws(0, 0, "fake_score/0", range(B), torch.device("cpu"), torch.float64)
    batch = Batch(torch.zeros(B, 1, 1, dtype=torch.float64), draws, SHAPE, 1.0, 0.02, 0.98)
    real = draws.noise("real", SHAPE)
    weight = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Head(2).double()

    class Role:
        def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
            return torch.tanh(weight * x_t).flatten(2).transpose(1, 2)

    def r1() -> Tensor:
        logit = head(renoised_features(Role(), batch, real, batch.text, "gan_real", 0.5))
        return approximate_r1(logit, head, Role(), batch, real, batch.text, 0.5, 0.1)

    (slope,) = torch.autograd.grad(r1(), weight)
    step = 1e-5
    with torch.no_grad():
        weight += step
        above = r1()
        weight -= 2 * step
        below = r1()
    torch.testing.assert_close(slope, (above - below) / (2 * step), rtol=1e-6, atol=0)


def test_the_regression_of_dmd_is_the_students_first_step_on_the_pairs(setting):
    """It predicts from the pair's noise at sigma 1, with the pair's text."""
    nets, batch, _ = setting
    pairs = batch.extra("ode_pairs") | {"text": torch.ones(B, 1, 1, dtype=torch.float64)}
    batch = dataclasses.replace(batch, extras={"ode_pairs": lambda _: pairs})

    def student(x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        assert x_t is pairs["noise"]
        assert text is pairs["text"]
        assert sigma.tolist() == [1.0] * B
        return 3 * pairs["x0"]

    loss = DMD(regression_weight=0.4).student_loss(
        dataclasses.replace(nets, student=student), batch
    )
    torch.testing.assert_close(loss.terms["regression"], 0.4 * 2 * pairs["x0"].square().mean())


@pytest.mark.parametrize("keep", [0.97, 0.0, 1.0])
def test_ida_pulls_the_fake_score_to_the_student_and_keeps_the_rest(keep):
    networks = {name: torch.nn.Linear(2, 2) for name in ("student", "fake_score", "modules")}
    before = {
        name: {key: value.clone() for key, value in net.state_dict().items()}
        for name, net in networks.items()
    }
    with torch.no_grad():
        IDA(keep).after_student_update(networks)
    for key, pulled in networks["fake_score"].state_dict().items():
        expected = keep * before["fake_score"][key] + (1 - keep) * before["student"][key]
        torch.testing.assert_close(pulled, expected)
    for name in ("student", "modules"):
        for key, value in networks[name].state_dict().items():
            assert torch.equal(value, before[name][key])


@pytest.mark.parametrize("method", [SGMD(), SGMD("c_t", "x0", "x0"), SGMD("c_t", "x0", "x0", 0.0)])
def test_a_shared_graph_has_the_fake_scores_loss_on_the_students_own_draws(method, setting):
    nets, batch, x0 = setting
    loss = method.student_loss(nets, batch)
    sigma, noise = batch.sigma("renoise/sigma"), batch.noise("renoise/noise")
    error = x0 - nets.fake_score(add_noise(x0, noise, sigma), sigma, batch.text)
    weight = 1 / over(sigma, x0) ** 2 if method.correction == "velocity" else 0.1
    weight = 1.0 if method.residual_weight == 0 else weight
    expected = 0.5 * (weight * error.square()).mean()
    torch.testing.assert_close(loss.fake_score_terms["denoise"], expected)
    assert loss.fake_score_terms.keys() == {"denoise"}


def test_batch_means_are_taken_over_the_ranks(setting):
    """A second rank is simulated, whose mean is twice this one's."""
    nets, batch, x0 = setting
    doubled = dataclasses.replace(nets, mean_over_ranks=lambda mean: 1.5 * mean)
    for method in (SGMD("c_t_batchnorm", "x0", "x0", 0.0), GradientTemplate(normaliser="batch")):
        alone, shared = (
            torch.autograd.grad(method.student_loss(n, batch).total, x0)[0] for n in (nets, doubled)
        )
        torch.testing.assert_close(shared, alone / 1.5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_consistency_matches_the_average_after_the_guided_teachers_step(shift, setting):
    """On real data with its own text; the average predicts the target, the student the rest."""
    nets, batch, _ = setting
    real, steps = batch.draws.noise("real", SHAPE), 5
    text = batch.draws.noise("text", (1, 1))
    batch = dataclasses.replace(
        batch,
        score_shift=shift,
        extras={"real_latents": lambda _: {"x0": real, "text": text}},
    )

    def with_text(net, scale: float):
        return lambda x_t, sigma, text: net(x_t, sigma, text) + scale * text[..., None, None]

    student, teacher, target = (with_text(smooth_net(i), 0.1 * i) for i in (4, 5, 6))
    nets = dataclasses.replace(nets, student=student, teacher=teacher, target=target)
    loss = Consistency(steps=steps).student_loss(nets, batch)
    upper = ((batch.draws.uniform("consistency/sigma") * steps).floor() + 1) / steps
    s, r = (shift * u / (1 + (shift - 1) * u) for u in (upper, upper - 1 / steps))
    high, low = over(s, real), over(r, real)
    x_s = (1 - high) * real + high * batch.noise("consistency/noise")
    x0 = teacher(x_s, s, text)
    x_r = (1 - low) * x0 + low * (x_s - (1 - high) * x0) / high
    error = student(x_s, s, text) - target(x_r, r, text)
    torch.testing.assert_close(loss.total, (0.5 * error.square() / (high - low)).mean())
    torch.testing.assert_close(loss.x0, student(x_s, s, text))
