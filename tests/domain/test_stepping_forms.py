"""Closed forms of what the stepping of a rollout does to the spread of samples.

A linear student whose clean prediction has the data's distribution at every step of its own rollout
is perfect. Sampled by the other stepping it is not: an ODE step keeps the noise that the prediction
came from, so input and prediction are fully correlated and the input of the next step is wider
(standard deviation a + b) than after re-noising (sqrt(a^2 + b^2)), where a = (1 - sigma) s is the
part of the data's standard deviation s and b = sigma that of the noise.
"""

import pytest
import torch
from torch import Tensor

from distill_bench.domain.gaussian import KNOTS, LinearBlock, step_moments
from distill_bench.networks.pipeline import load_pipeline
from distill_bench.noise import Stepping, student_sigmas


def perfect_student(sd: Tensor, sigmas: Tensor, stepping: Stepping) -> LinearBlock:
    """A diagonal student, perfect under a stepping, for independent data of deviations `sd`."""
    d = len(sd)
    block = LinearBlock(
        torch.zeros(d, dtype=torch.float64),
        torch.zeros(1, d, dtype=torch.float64),
        torch.diag(sd**2),
    )
    for sigma in sigmas:
        knot = round(float(sigma) * (KNOTS - 1))
        assert knot / (KNOTS - 1) == pytest.approx(float(sigma))
        a, b = (1 - sigma) * sd, sigma
        wide = a + b if stepping == "ode" else (a**2 + b**2).sqrt()
        gain = sd / wide  # of the clean prediction x_t - sigma * velocity
        block.weight.data[knot] = torch.diag((1 - gain) / sigma)
    return block


def spread(sd: Tensor, trained: Stepping, sampled: Stepping, nfe: int) -> float:
    """Spread of the samples over the data's, of a student perfect under stepping `trained`."""
    sigmas = student_sigmas(nfe, 1.0).double()
    block = perfect_student(sd, sigmas, trained)
    text = torch.zeros(1, 1, dtype=torch.float64)
    covariance = step_moments(block, sigmas, sampled, text)[-1][1]
    return float((covariance.detach().trace() / (sd**2).sum()).sqrt())


@pytest.mark.parametrize("stepping", ["renoise", "ode"])
@pytest.mark.parametrize("nfe", [1, 2, 4, 8])
def test_a_perfect_student_keeps_the_spread_under_its_own_stepping(stepping, nfe):
    sd = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)
    assert spread(sd, stepping, stepping, nfe) == pytest.approx(1)


@pytest.mark.parametrize("s", [0.25, 1.0, 2.0])
def test_in_two_steps_the_other_stepping_changes_the_spread_by_the_width_of_the_input(s):
    sd = torch.tensor([s], dtype=torch.float64)
    a, b = 0.5 * s, 0.5
    factor = (a + b) / (a**2 + b**2) ** 0.5
    assert spread(sd, "renoise", "ode", 2) == pytest.approx(factor)
    assert spread(sd, "ode", "renoise", 2) == pytest.approx(1 / factor)


def test_every_further_step_of_the_other_stepping_adds_to_the_change():
    sd = torch.tensor([1.0], dtype=torch.float64)
    wider = [spread(sd, "renoise", "ode", nfe) for nfe in (1, 2, 4, 8)]
    narrower = [spread(sd, "ode", "renoise", nfe) for nfe in (1, 2, 4, 8)]
    assert wider == pytest.approx([1, 1.414, 1.662, 1.816], abs=1e-3)
    assert narrower == pytest.approx([1, 0.707, 0.539, 0.431], abs=1e-3)


def test_a_smaller_share_of_new_noise_widens_the_samples_of_a_student_of_renoising_steadily():
    sd = torch.tensor([1.0], dtype=torch.float64)
    spreads = [spread(sd, "renoise", share, 4) for share in ("renoise", 0.75, 0.5, 0.25, "ode")]
    assert spreads == sorted(spreads)
    assert spreads[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("trained", "sampled", "nfe", "expected"),
    [
        ("renoise", "ode", 2, 1.39),
        ("renoise", "ode", 4, 1.65),
        ("ode", "renoise", 2, 0.72),
        ("ode", "renoise", 4, 0.54),
    ],
)
def test_the_spread_that_results_predict_for_the_gaussian_teacher(trained, sampled, nfe, expected):
    """Quoted in results/README.md beside sweeps/stepping_gaussian.yaml."""
    teacher = load_pipeline("gaussian", torch.device("cpu")).transformer.blocks[0]
    factor = teacher.factor.detach().double()
    sd = torch.linalg.eigvalsh(factor @ factor.T).sqrt()
    assert spread(sd, trained, sampled, nfe) == pytest.approx(expected, abs=0.005)
