"""The noise convention, guidance and draws."""

import pytest
import torch

from distill_bench import noise
from distill_bench.draws import Draws
from distill_bench.networks.denoiser import Guided


def test_predictions_survive_a_round_trip():
    x0, e = torch.randn(2, 3, 2, 4, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.02, 0.5, 0.98], dtype=torch.float64)[:3]
    x0, e = (
        x0.reshape(2, -1)[:, :48].reshape(3, 2, 2, 2, 4),
        e.reshape(2, -1)[:, :48].reshape(3, 2, 2, 2, 4),
    )
    x_t = noise.add_noise(x0, e, sigma)
    torch.testing.assert_close(noise.x0_to_velocity(x0, x_t, sigma), e - x0)
    torch.testing.assert_close(noise.velocity_to_x0(e - x0, x_t, sigma), x0)
    torch.testing.assert_close(noise.x0_to_score(x0, x_t, sigma), -e / sigma.reshape(3, 1, 1, 1, 1))


@pytest.mark.parametrize(
    ("shift", "expected"),
    [(5, [1, 0.9375, 0.83333, 0.625]), (8, [1, 0.96, 0.88889, 0.72727]), (1, [1, 0.75, 0.5, 0.25])],
)
def test_student_levels_are_the_published_ones(shift, expected):
    torch.testing.assert_close(
        noise.student_sigmas(4, shift), torch.tensor(expected), rtol=1e-4, atol=0
    )


def test_teacher_levels_run_from_noise_to_clean():
    sigmas = noise.teacher_sigmas(8, 2.0)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_guidance_one_is_none_and_two_extrapolates():
    def net(x_t, sigma, text):
        return x_t * text[:, 0, 0].reshape(-1, 1, 1, 1, 1)

    x, sigma, text, null = (
        torch.randn(2, 3, 1, 1, 1),
        torch.ones(2),
        torch.full((2, 1, 1), 3.0),
        torch.ones(1, 1, 1),
    )
    torch.testing.assert_close(Guided(net, null, 1.0)(x, sigma, text), net(x, sigma, text))
    torch.testing.assert_close(Guided(net, null, 2.0)(x, sigma, text), (1 + 2 * (3 - 1)) * x)


def test_draws_depend_on_their_key_and_on_nothing_else():
    whole = Draws(0, 5, "student", range(4), torch.device("cpu"))
    part = Draws(0, 5, "student", [2], torch.device("cpu"))
    assert torch.equal(whole.noise("a", (3,))[2], part.noise("a", (3,))[0])
    assert not torch.equal(whole.noise("a", (3,)), whole.noise("b", (3,)))
    other = Draws(0, 6, "student", range(4), torch.device("cpu"))
    assert not torch.equal(whole.noise("a", (3,)), other.noise("a", (3,)))
    assert whole.shared_integer("exit", 1000) == part.shared_integer("exit", 1000)


def test_score_levels_stay_in_their_range_and_follow_the_shift():
    draws = Draws(0, 0, "student", range(4000), torch.device("cpu"))
    sigma = draws.sigma("s", 5.0, 0.02, 0.98)
    assert sigma.min() >= 0.02 and sigma.max() <= 0.98
    assert abs(sigma.median() - 5 * 0.5 / (1 + 4 * 0.5)) < 0.02  # methods.md 1.0: median .833
