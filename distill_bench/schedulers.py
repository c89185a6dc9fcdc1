"""Schedulers of exported students: diffusers' pipelines take the student's own steps with them.

A student's levels are warp(1 - i / nfe, shift) and a last 0 (`distill_bench.noise.student_sigmas`). Where the network predicts
velocity, a config of diffusers' own class says that; only a variance-preserving network needs the class here.
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
    """diffusers' scheduler whose `nfe` steps are the student's; in other numbers of steps it takes other levels.

    It spaces its steps evenly between 1 and its lowest training level, warps them by its shift and stretches the last one to
    `shift_terminal`. Both are linear over linear in i, as the student's levels are: for each nfe one shift makes them.
    `stochastic_sampling` noises again at each, and the last 0 leaves x0.

    Args:
        spaced: for a pipeline that gives the scheduler the levels 1 - i / nfe itself: nothing is left but to warp them.

    Raises:
        ValueError: if the levels are not the student's to rounding.
    """
    wanted = torch.cat([student_sigmas(nfe, shift), torch.zeros(1)])
    fixed = {"stochastic_sampling": stepping == "renoise"}
    given, own = {"sigmas": [1 - i / nfe for i in range(nfe)]} if spaced else {}, shift
    if not spaced and nfe > 1:
        fixed["shift_terminal"] = float(warp(torch.tensor(1 / nfe, dtype=torch.float64), shift))
        for _ in range(50):  # the lowest training level is itself warped by the shift
            width = (
                nfe * shift * (1 - FlowMatchEulerDiscreteScheduler(shift=own).sigma_min) / (nfe - 1)
            )
            own = width / (width - shift + 1)
    # it computes in another order: among shifts that are equal for any other purpose one gives the very bits
    near = [own * (1 + k * 2**-30) for k in sorted(range(-200, 201), key=abs)]
    made = {
        each: _levels(FlowMatchEulerDiscreteScheduler(shift=each, **fixed), nfe, given)
        for each in near
    }
    best = min(near, key=lambda each: float((made[each] - wanted).abs().max()))
    if float((made[best] - wanted).abs().max()) > 1e-6:
        raise ValueError(
            f"diffusers' scheduler makes {made[best].tolist()}, the student's levels are {wanted.tolist()}"
        )
    return FlowMatchEulerDiscreteScheduler(shift=best, **fixed)


def _levels(scheduler: FlowMatchEulerDiscreteScheduler, nfe: int, given: dict) -> Tensor:
    scheduler.set_timesteps(nfe, **given)
    return scheduler.sigmas


class CogVideoXStudentScheduler(SchedulerMixin, ConfigMixin):
    """The student's steps for CogVideoXPipeline, whose latents are variance-preserving: z, x_t over a scale.

    diffusers' own takes whole timesteps at even distances; the student's levels lie between. The draws that noise again are made
    by the generator that the pipeline passes on.
    """

    order = 1
    init_noise_sigma = 1.0  # at the first level, 1, z is x_t

    @register_to_config
    def __init__(self, trained: dict, shift: float = 1.0, stepping: str = "renoise") -> None:
        self.table = vp_sigmas(CogVideoXDDIMScheduler.from_config(trained).alphas_cumprod)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """The student's levels, and the network's timesteps at them."""
        levels = student_sigmas(num_inference_steps, self.config.shift)
        self.sigmas = torch.cat([levels, torch.zeros(1)]).to(device)
        self.timesteps, self.x_t, self.taken = vp_timestep(levels, self.table).to(device), None, 0

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """The network takes z as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """z (B, T, C, H, W) at the next level, by the network's output at z."""
        sigma, lower = (self.sigmas[self.taken + i].expand(len(sample)) for i in (0, 1))
        x_t = sample if self.x_t is None else self.x_t  # kept, for z has been rounded
        kind = self.config.trained.get("prediction_type", "epsilon")
        velocity = vp_velocity(model_output, x_t, sigma, self.table, kind)
        x0 = velocity_to_x0(velocity, x_t, sigma)
        self.taken += 1
        if self.taken == len(self.timesteps):
            return (x0,)
        if self.config.stepping == "renoise":
            noise = randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
            )
            self.x_t = add_noise(x0, noise, lower)
        else:
            self.x_t = x_t + over(lower - sigma, x_t) * velocity
        return (self.x_t / over(vp_scale(lower), x_t),)
