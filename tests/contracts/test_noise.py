"""Noise convention and guidance."""

from fractions import Fraction

import pytest
import torch

from distill_bench import noise
from distill_bench.networks.denoiser import Guided


def test_clean_predictions_convert_to_velocity_and_score_and_back():
    x0, gaussian = torch.randn(2, 3, 2, 2, 2, 4, dtype=torch.float64)
    sigma = torch.tensor([0.02, 0.5, 0.98], dtype=torch.float64)
    x_t = noise.add_noise(x0, gaussian, sigma)
    velocity = gaussian - x0
    score = -gaussian / noise.over(sigma, x0)
    torch.testing.assert_close(noise.x0_to_velocity(x0, x_t, sigma), velocity)
    torch.testing.assert_close(noise.velocity_to_x0(velocity, x_t, sigma), x0)
    torch.testing.assert_close(noise.x0_to_score(x0, x_t, sigma), score)


@pytest.mark.parametrize(
    ("shift", "expected"),
    [(5, [1, 0.9375, 0.83333, 0.625]), (8, [1, 0.96, 0.88889, 0.72727]), (1, [1, 0.75, 0.5, 0.25])],
)
def test_student_levels_are_the_published_ones(shift, expected):
    torch.testing.assert_close(
        noise.student_sigmas(4, shift), torch.tensor(expected), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("shift", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_levels_are_the_formulas_rounded_once(steps, shift):
    """shift s / (1 + (shift - 1) s) in exact arithmetic, as float32, for s evenly spaced."""
    even = [Fraction(steps - i, steps) for i in range(steps + 1)]
    exact = [Fraction(shift) * s / (1 + (Fraction(shift) - 1) * s) for s in even]
    expected = torch.tensor([float(level) for level in exact], dtype=torch.float64).float()
    teacher = noise.teacher_sigmas(steps, shift)
    torch.testing.assert_close(teacher, expected, rtol=1e-7, atol=0)
    assert torch.equal(noise.student_sigmas(steps, shift), expected[:-1])
    assert teacher[0] == 1 and teacher[-1] == 0 and (teacher.diff() < 0).all()


def test_a_level_takes_the_shape_and_precision_of_the_latents():
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    level = noise.over(torch.tensor([0.25, 0.5]), x)
    assert level.shape == (2, 1, 1, 1, 1) and level.dtype == torch.float64
    assert noise.add_noise(x, x, torch.tensor([0.25, 0.5])).dtype == torch.float64
    torch.testing.assert_close((level * x)[0], 0.25 * x[0])


def test_a_guidance_scale_by_level_is_that_of_each_samples_expert():
    """The boundary belongs to the high-noise expert."""
    scale = noise.GuidanceByLevel(high_noise=4.0, low_noise=3.0, boundary=0.875)
    sigma = torch.tensor([1.0, 0.8755, 0.875, 0.8745, 0.0])
    assert noise.is_high_noise(sigma, 0.875).tolist() == [True, True, True, False, False]
    x = torch.randn(5, 2, 1, 3, 3, dtype=torch.float64)
    by_sample = noise.guidance_at(scale, sigma, x)
    assert by_sample.shape == (5, 1, 1, 1, 1) and by_sample.dtype == x.dtype
    assert by_sample.flatten().tolist() == [4.0, 4.0, 4.0, 3.0, 3.0]
    assert noise.guidance_at(5.0, sigma, x) == 5.0


def test_guidance_scale_one_is_no_guidance_and_two_extrapolates():
    def net(x_t, sigma, text):
        return x_t * text[:, 0, 0].reshape(-1, 1, 1, 1, 1)

    x_t, sigma = torch.randn(2, 3, 1, 1, 1), torch.ones(2)
    text, null_text = torch.full((2, 1, 1), 3.0), torch.ones(1, 1, 1)
    unguided = net(x_t, sigma, text)
    extrapolated = (1 + 2 * (3 - 1)) * x_t
    torch.testing.assert_close(Guided(net, null_text, 1.0)(x_t, sigma, text), unguided)
    torch.testing.assert_close(Guided(net, null_text, 2.0)(x_t, sigma, text), extrapolated)


@pytest.fixture
def vp_table() -> torch.Tensor:
    """Noise levels of a variance-preserving network with CogVideoX's scaled-linear schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return noise.vp_sigmas(torch.cumprod(1 - betas, 0))


def test_levels_of_a_variance_preserving_network_compare_noise_with_signal():
    """b / (a + b) with a^2 the cumulative product and b^2 the rest; rounding beyond 0 and 1 too."""
    products = torch.tensor([1.0 + 1e-9, 0.64, 0.5, 0.36, 0.0, -1e-9], dtype=torch.float64)
    sigmas = noise.vp_sigmas(products)
    expected = torch.tensor([0, 0.6 / 1.4, 0.5, 0.8 / 1.4, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(sigmas, expected, rtol=0, atol=1e-12)
    assert noise.vp_sigmas(products.float()).dtype == torch.float64
    a, b = 1 - sigmas, sigmas  # up to a factor, which vp_scale removes
    scale = noise.vp_scale(sigmas)
    torch.testing.assert_close((a / scale) ** 2 + (b / scale) ** 2, torch.ones_like(scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_timestep_outside_the_table_is_its_first_or_last(dtype):
    table = torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64)
    sigma = torch.tensor([0.0, 0.1, 0.15, 0.2, 0.4, 0.6, 1.0], dtype=dtype)
    timesteps = noise.vp_timestep(sigma, table)
    expected = torch.tensor([0, 0, 0.5, 1, 1.5, 2, 2], dtype=dtype)
    torch.testing.assert_close(timesteps, expected, rtol=0, atol=1e-6)
    assert noise.vp_timestep(sigma, table).dtype == dtype


def test_a_table_on_the_cpu_serves_latents_on_any_device():
    table = torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64)
    x_t, sigma = torch.zeros(2, 1, 1, 1, 1, device="meta"), torch.ones(2, device="meta")
    assert noise.vp_timestep(sigma, table).device.type == "meta"
    velocity = noise.vp_velocity(x_t, x_t, sigma, table, "epsilon")
    assert (velocity.device.type, velocity.dtype) == ("meta", torch.float32)


def test_above_the_table_an_output_counts_as_one_at_the_last_level():
    table = torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64)
    x_t, output = torch.randn(2, 2, 1, 1, 1, 3, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.9, 0.9])
    z = x_t / noise.vp_scale(sigma).reshape(-1, 1, 1, 1, 1)
    last = torch.tensor(0.6)
    a, b = (1 - last) / noise.vp_scale(last), last / noise.vp_scale(last)
    for kind, x0 in (("v_prediction", a * z - b * output), ("epsilon", (z - b * output) / a)):
        velocity = noise.vp_velocity(output, x_t, sigma, table, kind)
        assert velocity.dtype == torch.float32
        torch.testing.assert_close(velocity, (x_t - x0) / 0.9)


def test_timesteps_of_a_variance_preserving_network_are_found_and_interpolated(vp_table):
    assert (vp_table.diff() > 0).all()
    for timestep in (0, 1, 500, 998, 999):
        sigma = vp_table[timestep : timestep + 1].float()
        assert float(noise.vp_timestep(sigma, vp_table)) == pytest.approx(timestep, abs=0.01)
    between = (vp_table[300:301] + vp_table[301:302]) / 2
    assert float(noise.vp_timestep(between, vp_table)) == pytest.approx(300.5)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_a_variance_preserving_output_converts_to_the_velocity_of_flow_matching(kind, vp_table):
    """From known x0 and noise, at one of the network's own levels and between them."""
    draws = torch.Generator().manual_seed(0)
    x0, gaussian = torch.randn(2, 3, 1, 2, 2, 2, generator=draws, dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, float(vp_table[-1])], dtype=torch.float64)
    a = noise.over((1 - sigma) / noise.vp_scale(sigma), x0)
    b = noise.over(sigma / noise.vp_scale(sigma), x0)
    output = a * gaussian - b * x0 if kind == "v_prediction" else gaussian
    x_t = noise.add_noise(x0, gaussian, sigma)
    velocity = noise.vp_velocity(output, x_t, sigma, vp_table, kind)
    torch.testing.assert_close(velocity, gaussian - x0, rtol=0, atol=1e-9)
