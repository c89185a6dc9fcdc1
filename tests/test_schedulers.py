"""The schedulers of exported students have the students' own levels and steps."""

import numpy as np
import pytest
import torch

from distill_bench.noise import student_sigmas
from distill_bench.schedulers import CogVideoXStudentScheduler, flow_matching


@pytest.mark.parametrize(
    ("nfe", "shift"),
    [(1, 5.0), (2, 3.0), (3, 5.0), (4, 5.0), (4, 8.0), (4, 1.0), (4, 0.5), (8, 3.0)],
)
def test_diffusers_own_scheduler_has_the_students_levels_to_the_bit(nfe, shift):
    """With nothing but its config, as `num_inference_steps=nfe` asks for them, and after a round trip through that config."""
    scheduler = flow_matching(nfe, shift, "renoise")
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(nfe)
    assert torch.equal(scheduler.sigmas, torch.cat([student_sigmas(nfe, shift), torch.zeros(1)]))
    assert torch.equal(scheduler.timesteps, 1000 * student_sigmas(nfe, shift))
    assert (
        scheduler.config.stochastic_sampling
        and not flow_matching(nfe, shift, "ode").config.stochastic_sampling
    )


@pytest.mark.parametrize(("nfe", "shift"), [(1, 5.0), (4, 5.0), (5, 3.0)])
def test_where_the_pipeline_spaces_the_levels_the_scheduler_warps_them(nfe, shift):
    scheduler = flow_matching(nfe, shift, "ode", spaced=True)
    scheduler.set_timesteps(nfe, sigmas=np.linspace(1.0, 1 / nfe, nfe), mu=1.0)
    torch.testing.assert_close(scheduler.sigmas[:-1], student_sigmas(nfe, shift), rtol=0, atol=6e-8)


def test_the_plain_config_has_other_levels():
    """What is got wrong easily: the student's shift itself, in a scheduler that spaces down to its lowest training level."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    plain = FlowMatchEulerDiscreteScheduler(shift=5.0)
    plain.set_timesteps(4)
    assert (plain.sigmas[:-1] - student_sigmas(4, 5.0)).abs().max() > 0.5


@pytest.mark.parametrize("stepping", ["renoise", "ode"])
def test_a_variance_preserving_student_that_predicts_rightly_ends_in_x0(stepping):
    """Of one clip that is known the v is exact, and every step but the first lies on its noisy path."""
    trained = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 1.0,
        "clip_sample": False,
    }
    scheduler = CogVideoXStudentScheduler(trained, shift=5.0, stepping=stepping)
    scheduler.set_timesteps(4)
    assert float(scheduler.timesteps[0]) == 999 and (scheduler.timesteps.diff() < 0).all()
    x0 = torch.full((1, 3, 2, 2, 2), 2.0)
    z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        scale = ((1 - sigma) ** 2 + sigma**2).sqrt()
        a, b = (1 - sigma) / scale, sigma / scale
        (z,) = scheduler.step(
            a * (z - a * x0) / b - b * x0, timestep, z, generator=torch.Generator().manual_seed(1)
        )
    torch.testing.assert_close(z, x0, rtol=0, atol=1e-4)
