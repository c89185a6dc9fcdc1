"""Closed forms of the Gaussian teacher and its divergences against independent formulas."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from distill_bench.domain.closed_form import FlatNetwork
from distill_bench.domain.gaussian import (
    KNOTS,
    SPREAD,
    DataSamples,
    ExactFakeScore,
    GaussianBlock,
    LinearBlock,
    RolloutSamples,
    gaussian_velocity,
    log_density,
    step_moments,
)
from distill_bench.domain.gaussian_teacher import main, write_gaussian_teacher
from distill_bench.draws import generator
from distill_bench.eval.exact_divergence import ExactDivergence, fisher, kl, wasserstein
from distill_bench.networks.denoiser import Denoiser, Guided
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.pipeline import load_pipeline
from distill_bench.noise import student_sigmas
from distill_bench.rollout import rollout
from distill_bench.teachers.folder import TeacherError
from distill_bench.teachers.kinds import read_teacher

D, E = 3, 2


@pytest.fixture(scope="module")
def moments() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(D, D, generator=draw, dtype=torch.float64)
    return {
        "mean": torch.randn(D, generator=draw, dtype=torch.float64),
        "shifts": torch.randn(E, D, generator=draw, dtype=torch.float64),
        "covariance": root @ root.T + 0.3 * torch.eye(D, dtype=torch.float64),
    }


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, Tensor, Tensor]:
    """x_t (4, d), sigma (4,) and text (4, E), all different."""
    draw = torch.Generator().manual_seed(1)
    x_t = torch.randn(4, D, generator=draw, dtype=torch.float64)
    sigma = torch.tensor([0.05, 0.3, 0.7, 1.0], dtype=torch.float64)
    return x_t, sigma, torch.randn(4, E, generator=draw, dtype=torch.float64)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("gaussian", torch.device("cpu"))


def noisy(mean: Tensor, covariance: Tensor, s: float) -> MultivariateNormal:
    eye = torch.eye(D, dtype=torch.float64)
    return MultivariateNormal((1 - s) * mean, (1 - s) ** 2 * covariance + s**2 * eye)


def test_the_velocity_follows_from_the_score_by_tweedies_formula(moments, rows):
    """x0 = (x_t + s^2 grad log p) / (1 - s), noise = -s grad log p, velocity = noise - x0."""
    x_t, sigma, text = (x[:3] for x in rows)
    means = moments["mean"] + text @ moments["shifts"]
    velocity = gaussian_velocity(x_t, sigma, means, moments["covariance"])
    block = GaussianBlock(**moments)
    torch.testing.assert_close(block(x_t, sigma, text)[:, 0], velocity)
    for i, s in enumerate(sigma.tolist()):
        x = x_t[i].clone().requires_grad_()
        density = noisy(means[i], moments["covariance"], s).log_prob(x)
        (score,) = torch.autograd.grad(density, x)
        expected = -s * score - (x_t[i] + s**2 * score) / (1 - s)
        torch.testing.assert_close(velocity[i], expected)


def test_log_densities_are_torchs_up_to_one_constant(moments, rows):
    x_t, sigma, text = rows
    means = moments["mean"] + text @ moments["shifts"]
    values = log_density(x_t, sigma, means, moments["covariance"])
    expected = torch.stack(
        [
            noisy(m, moments["covariance"], s).log_prob(x)
            for x, s, m in zip(x_t, sigma, means, strict=True)
        ]
    )
    torch.testing.assert_close(values, expected + 0.5 * D * np.log(2 * np.pi))


def test_a_new_student_has_the_teachers_velocity_at_its_knots_minus_the_spread(moments, rows):
    """The spread acts on deviations from the mean, so the student's mean is the teacher's."""
    x_t, _, text = rows
    means = moments["mean"] + text @ moments["shifts"]
    student, teacher = LinearBlock(**moments), GaussianBlock(**moments)
    for knot in range(KNOTS):
        s = torch.full((4,), knot / (KNOTS - 1), dtype=torch.float64)
        difference = teacher(x_t, s, text) - student(x_t, s, text)
        centred = x_t - (1 - s[:, None]) * means
        torch.testing.assert_close(difference[:, 0], SPREAD * s[:, None] ** 2 * centred)


def test_between_its_knots_a_student_is_linear_in_sigma(moments, rows):
    x_t, _, text = rows
    student = LinearBlock(**moments)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            )
    low, high = 3 / (KNOTS - 1), 4 / (KNOTS - 1)

    def at(s: float) -> Tensor:
        return student(x_t, torch.full((4,), s, dtype=torch.float64), text)

    mixed = 0.75 * at(low) + 0.25 * at(high)
    torch.testing.assert_close(at(0.75 * low + 0.25 * high), mixed)


@pytest.mark.parametrize("stepping", ["renoise", "ode", 0.6])
def test_moments_of_each_step_are_those_of_the_rollouts_linear_map(stepping, moments):
    """A sample is c + sum of A_i noise_i: its mean is c, its covariance the sum of A_i A_i^T."""
    net, steps = FlatNetwork(LinearBlock(**moments)), 3
    student, sigmas = Denoiser(net, "student", Ledger(1)), student_sigmas(steps, 3.0).double()
    text = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
    by_step = step_moments(net.blocks[0], sigmas, stepping, text)
    assert len(by_step) == steps
    for step, (mean, covariance) in enumerate(by_step):
        used, rows = step + 1, 1 + (step + 1) * D
        units = torch.cat([torch.zeros(1, used * D), torch.eye(used * D)]).double()
        noises = list(units.reshape(rows, used, D, 1, 1, 1).unbind(1))
        texts = text[:, None].expand(rows, 1, E)
        x0 = rollout(student, noises, sigmas, texts, stepping).flatten(1)
        torch.testing.assert_close(mean[0], x0[0].detach())
        columns = x0[1:] - x0[0]
        torch.testing.assert_close(covariance, columns.T @ columns)


def test_facts_are_the_moments_of_the_last_step(pipeline):
    net, sigmas = pipeline.student().double(), student_sigmas(3, 2.0).double()
    facts = pipeline.facts(net, sigmas, "ode", 1.0)
    text = pipeline.encode_text(pipeline.prompts())[:, 0].double()
    mean, covariance = step_moments(net.blocks[0], sigmas, "ode", text)[-1]
    np.testing.assert_allclose(facts["mean"], mean.detach(), atol=1e-12)
    np.testing.assert_allclose(facts["covariance"], covariance.detach(), atol=1e-12)


def test_rows_of_a_batch_do_not_mix(moments, rows):
    """Networks and the exact fake score: each row has its own sigma and text."""
    x_t, sigma, text = rows
    x_t, text = x_t.reshape(4, D, 1, 1, 1), text[:, None]
    student = FlatNetwork(LinearBlock(**moments))
    samples = RolloutSamples(student_sigmas(2, 3.0).double(), "renoise", [0, 1])
    exact = ExactFakeScore(student, samples)

    def velocity(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return student(x, 1000 * s, t)[0]

    for call in (velocity, exact):
        batched = call(x_t, sigma, text)
        for i in range(4):
            row = slice(i, i + 1)
            torch.testing.assert_close(batched[row], call(x_t[row], sigma[row], text[row]))
    tokens = exact.features(x_t, sigma, text, 1.0)
    assert tokens.shape == (4, 1, D)
    clean = x_t.flatten(1) - sigma[:, None] * tokens[:, 0]
    torch.testing.assert_close(clean, exact(x_t, sigma, text).flatten(1))


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 3.5])
def test_the_target_is_the_distribution_that_the_guided_teacher_samples(guidance_scale, pipeline):
    """At sigma 1 a denoiser predicts the mean of its distribution."""
    sigmas = student_sigmas(2, 2.0)
    facts = pipeline.facts(pipeline.student(), sigmas, "renoise", guidance_scale)
    text = pipeline.encode_text(pipeline.prompts())
    teacher = Guided(
        Denoiser(pipeline.transformer, "teacher", Ledger(1)),
        pipeline.encode_text([""]),
        guidance_scale,
    )
    noise = torch.randn(len(text), *pipeline.shape, generator=torch.Generator().manual_seed(0))
    predicted = teacher(noise, torch.ones(len(text)), text).flatten(1).numpy()
    np.testing.assert_allclose(predicted, facts["target_mean"], atol=1e-5)
    np.testing.assert_array_equal(facts["target_covariance"], pipeline.covariance.numpy())


def test_data_have_the_teachers_moments_and_depend_on_their_key_alone(pipeline):
    prompt = pipeline.prompts()[1]
    x0 = pipeline.data([prompt] * 4000, range(4000)).flatten(1).double()
    mean = pipeline.mean + pipeline.shifts[1]
    deviation = (x0.mean(0) - mean).abs() / pipeline.covariance.diag().sqrt()
    assert deviation.max() < 5 / 4000**0.5
    covariance = torch.cov(x0.T)
    scale = pipeline.covariance.diag()
    error = (covariance - pipeline.covariance).abs() / torch.outer(scale, scale).sqrt()
    assert error.max() < 6 / 4000**0.5
    torch.testing.assert_close(pipeline.data([prompt], [7]).flatten(1).double(), x0[7:8])
    factor = torch.linalg.cholesky(pipeline.covariance)
    noise = torch.linalg.solve_triangular(factor, (x0[7] - mean)[:, None], upper=False)
    stream = torch.randn(len(mean), generator=generator("gaussian", 7))  # shared with no other draw
    torch.testing.assert_close(noise[:, 0].float(), stream, rtol=1e-4, atol=1e-4)
    other = pipeline.data([pipeline.prompts()[2]], [7]).flatten(1).double() - x0[7:8]
    torch.testing.assert_close(other[0], pipeline.shifts[2] - pipeline.shifts[1], atol=1e-5, rtol=0)


def test_prompts_are_one_hot_the_empty_one_is_zero_and_others_are_refused(pipeline):
    prompts = pipeline.prompts()
    text = pipeline.encode_text([*prompts, ""])[:, 0]
    expected = torch.cat([torch.eye(len(prompts)), torch.zeros(1, len(prompts))])
    assert torch.equal(text, expected)
    with pytest.raises(ValueError, match="no prompt 'component 99'"):
        pipeline.encode_text(["component 99"])


def test_a_written_teacher_has_the_asked_shape_and_spectrum(tmp_path):
    for seed in (0, 1):
        write_gaussian_teacher(tmp_path / str(seed), (2, 3, 1, 1), 5, 30.0, seed)
    first, second = (
        read_teacher(tmp_path / str(seed)).load(torch.device("cpu")) for seed in (0, 1)
    )
    assert first.shape == (2, 3, 1, 1)
    assert len(first.prompts()) == 5
    assert first.shifts.shape == (5, 6)
    values = torch.linalg.eigvalsh(first.covariance)
    assert values.mean() == pytest.approx(1)
    assert values[-1] / values[0] == pytest.approx(30)
    ratios = values[1:] / values[:-1]
    torch.testing.assert_close(ratios, ratios[0].expand(5), rtol=1e-6, atol=0)
    for name in ("mean", "shifts", "covariance"):
        assert not torch.allclose(getattr(first, name), getattr(second, name))
    assert json.loads((tmp_path / "0" / "gaussian.json").read_text())["condition"] == 30.0


def test_the_command_writes_the_teacher_of_its_options(tmp_path, capsys):
    """Same bytes; without options, those of four frames of 2x2, four prompts, condition 20."""
    given = ["--frames", "3", "--size", "1", "--prompts", "2", "--condition", "5.5", "--seed", "7"]
    for name, options, plain in (
        ("given", given, ((1, 3, 1, 1), 2, 5.5, 7)),
        ("default", [], ((1, 4, 2, 2), 4, 20.0, 0)),
    ):
        assert main(["--out", str(tmp_path / name), *options]) == 0
        write_gaussian_teacher(tmp_path / f"{name}-by-hand", *plain)
        for path in (tmp_path / name).iterdir():
            assert path.read_bytes() == (tmp_path / f"{name}-by-hand" / path.name).read_bytes()
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for part in (
        "usage: distill-bench gaussian ",
        "\nwrite a Gaussian teacher with random moments\n",
        " the new folder\n",
        " T of the latents\n",
        " H and W of the latents\n",
        " largest over smallest variance\n",
    ):
        assert part in text
    with pytest.raises(SystemExit):
        main([])


def test_a_teacher_shows_its_latents_as_grey_squares(pipeline):
    """Two frames of 16x16 pixels per latent, a third of the mean over channels."""
    latents = torch.randn(2, 3, 2, 2, 1, generator=torch.Generator().manual_seed(0))
    video = pipeline.decode_video(latents)
    assert video.shape == (2, 3, 4, 32, 16)
    grey = latents.mean(1) / 3
    for channel, frame, y, x in ((0, 0, 0, 0), (1, 1, 15, 15), (2, 2, 16, 3), (0, 3, 31, 9)):
        torch.testing.assert_close(video[:, channel, frame, y, x], grey[:, frame // 2, y // 16, 0])
    frames = pipeline.decode(latents)
    assert frames.dtype == torch.uint8
    assert frames.shape == (2, 4, 3, 32, 16)
    expected = (grey[:, 1, 1, 0] * 127.5 + 127.5).clamp(0, 255)
    assert (frames[:, 3, 1, 20, 5] - expected).abs().max() <= 1
    assert pipeline.has_clips(pipeline.prompts()) is False
    with pytest.raises(TeacherError, match="a gaussian teacher cannot encode clips"):
        pipeline.encode(frames.numpy())
    assert pipeline.facts(None, student_sigmas(1, 2.0), "ode", 1.0) == {}


@pytest.mark.parametrize("stepping", ["renoise", "ode", 0.6])
def test_levels_and_texts_of_single_precision_give_moments_in_that_of_the_student(
    stepping, moments
):
    block, sigmas = LinearBlock(**moments), student_sigmas(5, 0.5)
    text = torch.tensor([[0.3, -0.7], [1.0, 0.0]])
    single = step_moments(block, sigmas, stepping, text)
    double = step_moments(block, sigmas.double(), stepping, text.double())
    for parts in zip(single, double, strict=True):
        for value, expected in zip(*parts, strict=True):
            assert value.dtype == torch.float64
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert [len(mean) for mean, _ in single] == [2] * 5


def test_real_latents_of_single_precision_give_densities_in_that_of_the_student(moments):
    block, sigmas, text = LinearBlock(**moments), student_sigmas(3, 3.0), torch.eye(E)
    rows, x0 = text[[0, 1, 1, 0, 1]], torch.randn(5, D, generator=torch.Generator().manual_seed(3))
    single = DataSamples(sigmas, [0, 2], x0, rows).density(block, text)
    double = DataSamples(sigmas.double(), [0, 2], x0.double(), rows.double())
    for part, expected in zip(single, double.density(block, text.double()), strict=True):
        assert part.mean.dtype == part.covariance.dtype == torch.float64
        torch.testing.assert_close(part.mean, expected.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part.covariance, expected.covariance, rtol=1e-12, atol=1e-12)
        assert part.log_weight.exp().tolist() == rows.tolist(), "rows of another text do not count"


def test_predictions_stay_on_the_device_and_in_the_precision_of_their_inputs(moments):
    """The meta device stands for a GPU: it refuses tensors of the processor."""
    net = FlatNetwork(LinearBlock(**moments)).to("meta")
    text, x_t = torch.eye(E, device="meta"), torch.zeros(E, D, 1, 1, 1, device="meta")
    sigmas = student_sigmas(3, 3.0).to("meta")
    teacher = GaussianBlock(**moments).to("meta")
    assert step_moments(teacher, sigmas, "ode", text)[-1][1].device == x_t.device
    samples = [RolloutSamples(sigmas, stepping, [0, 2]) for stepping in ("renoise", "ode", 0.6)]
    for density in (*samples, DataSamples(sigmas, [0, 2], x_t.flatten(1), text)):
        x0_fake = ExactFakeScore(net, density)(x_t, sigmas[:E], text[:, None])
        assert (x0_fake.device, x0_fake.dtype) == (x_t.device, torch.float32)


# ---- divergences


def gaussians(seed: int = 0) -> list[np.ndarray]:
    """Mean and covariance of p, then of q, with axes that do not commute."""
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(2, D, D))
    covariances = [root @ root.T + 0.2 * np.eye(D) for root in roots]
    return [rng.normal(size=D), covariances[0], rng.normal(size=D), covariances[1]]


def test_the_wasserstein_distance_of_unequal_covariances():
    """tr (C_p^1/2 C_q C_p^1/2)^1/2 is the sum of the roots of the eigenvalues of C_p C_q."""
    p, c_p, q, c_q = gaussians()
    cross = np.sqrt(np.linalg.eigvals(c_p @ c_q).real).sum()
    squared = ((p - q) ** 2).sum() + np.trace(c_p) + np.trace(c_q) - 2 * cross
    assert wasserstein(p, c_p, q, c_q) == pytest.approx(squared**0.5, rel=1e-9)
    assert wasserstein(q, c_q, p, c_p) == pytest.approx(squared**0.5, rel=1e-9)
    a, b = np.array([1.0, 4, 9]), np.array([4.0, 4, 1])  # standard deviations differ by 1, 0, 2
    assert wasserstein(p, np.diag(a), p, np.diag(b)) == pytest.approx(5**0.5)


def test_the_fisher_divergence_is_the_mean_square_of_the_scores_difference():
    """Exact: the average over a cubature of degree two."""
    p, c_p, q, c_q = gaussians()
    axes = D**0.5 * np.linalg.cholesky(c_p).T
    x = np.concatenate([p + axes, p - axes])
    gap = np.linalg.solve(c_q, (x - q).T) - np.linalg.solve(c_p, (x - p).T)
    assert fisher(p, c_p, q, c_q) == pytest.approx((gap**2).sum(0).mean(), rel=1e-9)


def test_the_kl_divergence_is_the_mean_log_ratio():
    p, c_p, q, c_q = gaussians()
    axes = D**0.5 * np.linalg.cholesky(c_p).T
    x = torch.from_numpy(np.concatenate([p + axes, p - axes]))
    density_p, density_q = (
        MultivariateNormal(torch.from_numpy(m), torch.from_numpy(c))
        for m, c in ((p, c_p), (q, c_q))
    )
    expected = (density_p.log_prob(x) - density_q.log_prob(x)).mean()
    assert kl(p, c_p, q, c_q) == pytest.approx(float(expected), rel=1e-9)


def test_scores_are_means_over_prompts_from_student_to_target():
    p, c_p, q, c_q = gaussians()
    facts = {
        "mean": np.stack([p, 2 * p]),
        "covariance": c_p,
        "target_mean": np.stack([q, q + 1]),
        "target_covariance": c_q,
    }

    class Clips:
        pass

    clips = Clips()
    clips.facts = facts
    scores = {score.column: score.value for score in ExactDivergence().scores(clips, {})}
    for column, divergence in (
        ("exact_kl", kl),
        ("exact_fisher", fisher),
        ("exact_w2", wasserstein),
    ):
        pair = [divergence(p, c_p, q, c_q), divergence(2 * p, c_p, q + 1, c_q)]
        assert scores[column] == pytest.approx(np.mean(pair))
    assert scores["exact_spread"] == pytest.approx((np.trace(c_p) / np.trace(c_q)) ** 0.5)
    clips.facts = facts | {"covariance": np.zeros_like(c_p)}  # one point per prompt
    scores = {score.column: score.value for score in ExactDivergence().scores(clips, {})}
    away = [((p - q) ** 2).sum(), ((2 * p - q - 1) ** 2).sum()]
    expected = np.sqrt(np.add(away, np.trace(c_q))).mean()
    assert scores == pytest.approx({"exact_w2": expected, "exact_spread": 0})
    spreads, directions = np.linalg.eigh(c_p)
    spreads[0] = 0  # no spread in one direction alone
    clips.facts = facts | {"covariance": (directions * spreads) @ directions.T}
    assert len(ExactDivergence().scores(clips, {})) == 2  # W2 and spread
