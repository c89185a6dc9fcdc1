"""Schedulers of exported students: the student's own noise levels and steps."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from distill_bench.noise import student_sigmas
from distill_bench.schedulers import CogVideoXStudentScheduler, flow_matching


@pytest.mark.parametrize(
    ("nfe", "shift"),
    [(1, 5.0), (2, 3.0), (3, 5.0), (4, 5.0), (4, 8.0), (4, 1.0), (4, 0.5), (8, 3.0)],
)
def test_diffusers_own_scheduler_has_the_students_levels_to_the_bit(nfe, shift):
    """The config alone is enough: a pipeline builds the scheduler from it and sets `nfe` steps."""
    saved = flow_matching(nfe, shift, "renoise")
    scheduler = type(saved).from_config(saved.config)
    scheduler.set_timesteps(nfe)
    sigmas = student_sigmas(nfe, shift)
    assert torch.equal(scheduler.sigmas, torch.cat([sigmas, torch.zeros(1)]))
    assert torch.equal(scheduler.timesteps, 1000 * sigmas)


def test_only_a_student_that_renoises_samples_stochastically():
    assert flow_matching(4, 5.0, "renoise").config.stochastic_sampling
    assert not flow_matching(4, 5.0, "ode").config.stochastic_sampling


@pytest.mark.parametrize(("nfe", "shift"), [(1, 5.0), (4, 5.0), (5, 3.0)])
def test_levels_that_the_pipeline_spaces_are_shifted_by_the_scheduler(nfe, shift):
    """LTX's pipeline passes evenly spaced sigmas."""
    scheduler = flow_matching(nfe, shift, "ode", spaced=True)
    scheduler.set_timesteps(nfe, sigmas=np.linspace(1.0, 1 / nfe, nfe), mu=1.0)
    torch.testing.assert_close(scheduler.sigmas[:-1], student_sigmas(nfe, shift), rtol=0, atol=6e-8)


def test_the_students_shift_in_a_plain_scheduler_gives_other_levels():
    """An easy mistake: the plain scheduler spaces levels down to its lowest training level."""
    plain = FlowMatchEulerDiscreteScheduler(shift=5.0)
    plain.set_timesteps(4)
    assert (plain.sigmas[:-1] - student_sigmas(4, 5.0)).abs().max() > 0.5


@pytest.mark.parametrize("stepping", ["renoise", "ode"])
def test_a_variance_preserving_student_with_exact_predictions_ends_in_x0(stepping):
    """The data are one known clip, so the exact v-prediction is known at every step."""
    trained = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 1.0,
        "clip_sample": False,
    }
    scheduler = CogVideoXStudentScheduler(trained, shift=5.0, stepping=stepping)
    scheduler.set_timesteps(4)
    assert float(scheduler.timesteps[0]) == 999
    assert (scheduler.timesteps.diff() < 0).all()
    x0 = torch.full((1, 3, 2, 2, 2), 2.0)
    x_t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        norm = ((1 - sigma) ** 2 + sigma**2).sqrt()
        alpha, beta = (1 - sigma) / norm, sigma / norm
        v = alpha * (x_t - alpha * x0) / beta - beta * x0
        generator = torch.Generator().manual_seed(1)
        (x_t,) = scheduler.step(v, timestep, x_t, generator=generator)
    torch.testing.assert_close(x_t, x0, rtol=0, atol=1e-4)
