"""The contract of an objective: what a file in `methods/` implements, and what it is given.

A method is a frozen dataclass: its fields are its hyper-parameters. Everything that must be equal between methods to
compare them (noise levels, rollout, guidance, learning rates, cadence) belongs to the run and reaches the method through
`Nets` and `Batch`.

In the student's phase the fake score and the teacher are frozen: a backward through them reaches their *input* and computes
no weight gradients. In the fake score's phase only the fake score (and the method's own modules) can be trained.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from distill_bench.draws import Draws
from distill_bench.noise import add_noise, x0_to_velocity

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t (B,C,T,H,W), sigma (B,), text (B,L,D)) -> x0_hat (B,C,T,H,W)


@dataclass(frozen=True)
class Loss:
    """What a phase of a method returns.

    `total` is the scalar to differentiate, `parts` are detached scalars to log, `x0` are the student's samples of this
    phase (B, C, T, H, W), which the fake score may reuse (`reuse_rollout`); None where the phase made none.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    x0: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Prompts and keyed draws of one phase on this process; one micro-batch."""

    text: Tensor  # (B, L, D)
    draws: Draws
    latent_shape: tuple[int, ...]  # (C, T, H, W)
    score_shift: float
    sigma_min: float
    sigma_max: float
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # what the method's `needs` asked for

    def noise(self, purpose: str) -> Tensor:
        """Gaussian noise (B, C, T, H, W) of its own for each purpose."""
        return self.draws.noise(purpose, self.latent_shape)

    def sigma(self, purpose: str) -> Tensor:
        """Noise levels (B,) of the run's distribution of score comparisons, in [sigma_min, sigma_max]."""
        return self.draws.sigma(purpose, self.score_shift, self.sigma_min, self.sigma_max)


@dataclass(frozen=True)
class Nets:
    """The roles as denoisers, the guided teacher, and the rollout of the run."""

    student: Denoise
    fake_score: Denoise
    teacher: Denoise  # guided by the run's guidance_scale
    rollout: Callable[[Batch], Tensor]  # the student's samples (B, C, T, H, W), differentiable at the exit step
    modules: Mapping[str, nn.Module] = field(default_factory=dict)  # what the method's `modules` built


@dataclass(frozen=True)
class Method(ABC):
    """A distillation objective. Subclasses are final: never override a sibling."""

    paper: ClassVar[str]
    version: ClassVar[int] = 1  # part of a run's identity: raise it when the numbers change
    needs: ClassVar[frozenset[str]] = frozenset()  # extra data by name, see `distill_bench.extras`
    has_fake_score: ClassVar[bool] = True  # without one no fake-score update is made or paid for

    @abstractmethod
    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        """The loss of one student update."""

    def fake_score_loss(self, nets: Nets, batch: Batch, x0: Tensor) -> Loss:
        """The loss of one fake-score update on detached student samples x0: denoising, unless the method differs."""
        return velocity_loss(nets.fake_score, batch, x0)

    def modules(self, latent_shape: tuple[int, ...]) -> Mapping[str, nn.Module]:
        """Networks (heads) and buffers of the method's own: trained with the fake score, and checkpointed."""
        return {}

    def after_student_update(self, student: nn.Module, fake_score: nn.Module) -> None:  # noqa: B027 - a hook
        """Called without gradients after each student update, with the roles' networks."""


@dataclass(frozen=True)
class Renoised:
    """The student's samples noised again, and what both scores make of them."""

    x_t: Tensor
    sigma: Tensor  # (B,)
    x0_fake: Tensor
    x0_teacher: Tensor  # always detached from x_t


def mean_per_sample(x: Tensor) -> Tensor:
    """Mean over all axes but the batch, kept for broadcasting: (B, 1, 1, 1, 1)."""
    return x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)


def dmd_normaliser(x0: Tensor, x0_teacher: Tensor) -> Tensor:
    """n = mean |x0 - x0_teacher| per sample (Yin et al., 2023, eq. 8, in the form of the released codes), detached."""
    return mean_per_sample((x0 - x0_teacher).abs()).detach()


def renoise(nets: Nets, batch: Batch, x0: Tensor, through_fake_score: bool) -> Renoised:
    """Noise x0 again at a drawn level and ask the fake score and the teacher for their clean predictions.

    With `through_fake_score` the fake score's prediction keeps its graph to x0, by its input.
    """
    sigma = batch.sigma("renoise/sigma")
    x_t = add_noise(x0, batch.noise("renoise/noise"), sigma)
    with torch.set_grad_enabled(through_fake_score):
        x0_fake = nets.fake_score(x_t, sigma, batch.text)
    with torch.no_grad():
        x0_teacher = nets.teacher(x_t.detach(), sigma, batch.text)
    return Renoised(x_t, sigma, x0_fake, x0_teacher)


def toward(x0: Tensor, gradient: Tensor) -> Tensor:
    """The surrogate whose gradient at x0 is `gradient` over the number of elements: |x0 - sg(x0 - gradient)|^2 / 2."""
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


def velocity_loss(net: Denoise, batch: Batch, x0: Tensor) -> Loss:
    """Flow matching of `net` on detached samples x0 (B, C, T, H, W): mean of |velocity_hat - (noise - x0)|^2 / 2.

    Lipman et al., 2022, conditional flow matching. In clean predictions the velocity error is (x0 - x0_hat) / sigma.
    """
    sigma, noise = batch.sigma("denoise/sigma"), batch.noise("denoise/noise")
    x_t = add_noise(x0, noise, sigma)
    velocity = x0_to_velocity(net(x_t, sigma, batch.text), x_t, sigma)
    return Loss(0.5 * (velocity - (noise - x0)).square().mean())
