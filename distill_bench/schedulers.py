"""Schedulers that make diffusers' pipelines take the steps of an exported student.

A student's levels are warp(1 - i / nfe, shift), then 0 (`distill_bench.noise.student_sigmas`). For
a network that predicts velocity, diffusers' own scheduler can be configured to give these levels.
Only a variance-preserving network (CogVideoX) needs a class of its own.
"""

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    ConfigMixin,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from distill_bench.noise import (
    add_noise,
    over,
    student_sigmas,
    velocity_to_x0,
    vp_scale,
    vp_sigmas,
    vp_timestep,
    vp_velocity,
    warp,
)


def flow_matching(
    nfe: int, shift: float, stepping: str, spaced: bool = False
) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' scheduler with the student's levels, valid for `nfe` steps only.

    diffusers spaces its steps evenly between 1 and its lowest training level, warps them by its
    shift and stretches the last one to `shift_terminal`. The result is a ratio of two linear
    functions of the step, like the student's levels, so for every nfe one shift gives those levels.
    `stochastic_sampling` adds fresh noise after each step; the final level 0 returns x0.

    Args:
        nfe: number of steps.
        shift: of the student's levels, as for `student_sigmas`.
        stepping: `renoise` or `ode`.
        spaced: True if the pipeline itself passes the levels 1 - i / nfe for the scheduler to warp.

    Raises:
        ValueError: if the levels differ from the student's by more than rounding (1e-6).
    """
    levels = torch.cat([student_sigmas(nfe, shift), torch.zeros(1)])
    options = {"stochastic_sampling": stepping == "renoise"}
    given = {"sigmas": [1 - i / nfe for i in range(nfe)]} if spaced else {}
    own_shift = shift
    if not spaced and nfe > 1:
        options["shift_terminal"] = float(warp(torch.tensor(1 / nfe, dtype=torch.float64), shift))
        for _ in range(50):  # a fixed point: the lowest training level depends on the shift
            lowest = FlowMatchEulerDiscreteScheduler(shift=own_shift).sigma_min
            width = nfe * shift * (1 - lowest) / (nfe - 1)
            own_shift = width / (width - shift + 1)

    def error(candidate: float) -> float:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=candidate, **options)
        scheduler.set_timesteps(nfe, **given)
        return float((scheduler.sigmas - levels).abs().max())

    # This shift is exact, but diffusers rounds in another order: for about one pair of (nfe, shift)
    # in twenty, e.g. (4, 8), a level is off by one float32 step (6e-8), and an exported student
    # would no longer reproduce the samples of its run bit for bit. A neighbouring shift does.
    neighbours = (own_shift * (1 + k * 2**-30) for k in sorted(range(-200, 201), key=abs))
    exact = next((candidate for candidate in neighbours if error(candidate) == 0), own_shift)
    if error(exact) > 1e-6:
        raise ValueError(
            f"no shift of diffusers' scheduler gives the student's levels {levels.tolist()} "
            f"(nfe {nfe}, shift {shift}): the installed diffusers spaces its steps differently"
        )
    return FlowMatchEulerDiscreteScheduler(shift=exact, **options)


class CogVideoXStudentScheduler(SchedulerMixin, ConfigMixin):
    """The student's steps for CogVideoXPipeline, whose latents are z = x_t / vp_scale(sigma).

    diffusers' own scheduler takes whole, evenly spaced timesteps; the student's levels lie between
    them. Fresh noise comes from the generator that is passed to the pipeline.

    Args:
        trained: config of the scheduler that the network was trained with.
        shift: of the student's levels.
        stepping: `renoise` or `ode`.
    """

    order = 1
    init_noise_sigma = 1.0  # at the first level, 1, z is x_t

    @register_to_config
    def __init__(self, trained: dict, shift: float = 1.0, stepping: str = "renoise") -> None:
        self.table = vp_sigmas(CogVideoXDDIMScheduler.from_config(trained).alphas_cumprod)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Set the student's levels for a number of steps, and the network's timesteps at them."""
        levels = student_sigmas(num_inference_steps, self.config.shift)
        self.sigmas = torch.cat([levels, torch.zeros(1)]).to(device)
        self.timesteps = vp_timestep(levels, self.table).to(device)
        self.steps_taken = 0
        self.x_t: Tensor | None = None  # kept between steps: z is rounded to the pipeline's dtype

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """`sample` unchanged: the network takes z."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """One step: z (B, T, C, H, W) at the next level; after the last one, x0.

        Args:
            model_output: of the network at z, (B, T, C, H, W).
            timestep: ignored; steps are counted.
            sample: z (B, T, C, H, W); at the first level, 1, it is x_t.
            generator: draws the fresh noise of `renoise`.
            return_dict: ignored; a tuple is returned.
        """
        sigma = self.sigmas[self.steps_taken].expand(len(sample))
        lower = self.sigmas[self.steps_taken + 1].expand(len(sample))
        x_t = sample if self.x_t is None else self.x_t
        kind = self.config.trained.get("prediction_type", "epsilon")
        velocity = vp_velocity(model_output, x_t, sigma, self.table, kind)
        x0 = velocity_to_x0(velocity, x_t, sigma)
        self.steps_taken += 1
        if self.steps_taken == len(self.timesteps):
            return (x0,)
        if self.config.stepping == "renoise":
            noise = randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
            )
            self.x_t = add_noise(x0, noise, lower)
        else:
            self.x_t = x_t + over(lower - sigma, x_t) * velocity
        return (self.x_t / over(vp_scale(lower), x_t),)
