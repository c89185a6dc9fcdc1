"""The contract of an objective: what a file in `methods/` implements, and what it is given.

A method is a frozen dataclass: its fields are its hyper-parameters. Everything that must be equal between methods to
compare them (noise levels, rollout, guidance, learning rates, cadence) belongs to the run and reaches the method through
`Nets` and `Batch`.

In the student's phase the fake score, the teacher and the method's modules are frozen: a backward through them reaches their
*input* and computes no weight gradients. In the fake score's phase only the fake score and the method's modules can be trained.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_bench.draws import Draws
from distill_bench.noise import add_noise, x0_to_velocity

# ranges of a method's fields, said by their types: checked where a run is resolved, before anything runs
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Depth = Annotated[float, Field(gt=0, le=1)]  # of a network: a share of its blocks

Denoise = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # (x_t (B,C,T,H,W), sigma (B,), text (B,L,D)) -> x0_hat (B,C,T,H,W)


class Role(Protocol):
    """A role's network as clean prediction, with its hidden states for heads."""

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """x0_hat (B, C, T, H, W)."""

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """noise - x0 (B, C, T, H, W), of which the call makes x0_hat."""

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        """Tokens (B, N, width) after the share `depth` of the blocks; the blocks behind are neither run nor paid for."""


@dataclass(frozen=True)
class Loss:
    """What a phase of a method returns.

    `terms` are scalars by name whose sum is differentiated; `x0` are the student's samples of this phase (B, C, T, H, W) with
    their graph, which the fake score may reuse (`reuse_rollout`) and at which the terms are compared; None where the phase
    made none. `logs` are further detached scalars for train.jsonl. `fake_score_terms` are the fake score's own loss on those
    samples and draws, from the forward that the student's terms needed anyway (see `Method.shares_graph`).
    """

    terms: Mapping[str, Tensor]
    x0: Tensor | None = None
    logs: Mapping[str, Tensor] = field(default_factory=dict)
    fake_score_terms: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        return sum(self.terms.values())


@dataclass(frozen=True)
class Batch:
    """Prompts and keyed draws of one phase on this process; one micro-batch."""

    text: Tensor  # (B, L, D)
    draws: Draws
    latent_shape: tuple[int, ...]  # (C, T, H, W)
    score_shift: float
    sigma_min: float
    sigma_max: float
    extras: Mapping[str, Callable[[Draws], dict[str, Tensor]]] = field(default_factory=dict)

    def noise(self, purpose: str) -> Tensor:
        """Gaussian noise (B, C, T, H, W) of its own for each purpose."""
        return self.draws.noise(purpose, self.latent_shape)

    def sigma(self, purpose: str) -> Tensor:
        """Noise levels (B,) of the run's distribution of score comparisons, in [sigma_min, sigma_max]."""
        return self.draws.sigma(purpose, self.score_shift, self.sigma_min, self.sigma_max)

    def extra(self, need: str) -> dict[str, Tensor]:
        """What the method's `needs` asked for, drawn for this batch: `x0` (B, C, T, H, W), `text`, for ODE pairs `noise`."""
        return self.extras[need](self.draws)


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Nets:
    """The roles as denoisers, the guided teacher, and the rollout of the run."""

    student: Role
    fake_score: Role
    teacher: Denoise  # guided by the run's guidance_scale
    rollout: Callable[
        [Batch], Tensor
    ]  # the student's samples (B, C, T, H, W), differentiable at the exit step
    exit_sigma: Callable[[Batch], Tensor] | None = None  # the noise level (B,) of that step
    target: Denoise | None = (
        None  # the student's moving average (the student itself where the run keeps none)
    )
    unguided_teacher: Role | None = None
    null_text: Tensor | None = None  # (1, L, D)
    guidance_scale: float = 1.0
    decode: Denoise | None = (
        None  # latents (B, C, T, H, W) -> video (B, 3, T', H', W') in [-1, 1], differentiable
    )
    modules: Mapping[str, nn.Module] = field(
        default_factory=dict
    )  # what the method's `modules` built
    mean_over_ranks: Callable[[Tensor], Tensor] = _as_it_is  # of a tensor without a graph


@dataclass(frozen=True)
class Passes:
    """Network passes over one batch; a full backward is of weights and input."""

    forward: float = 0.0
    input_backward: float = 0.0
    full_backward: float = 0.0


@dataclass(frozen=True)
class Cost:
    """The passes of each phase by role, declared by the method and held against the ledger by `distill_bench.testing`.

    Roles are student, fake_score, teacher (one guided prediction: two forwards where the run is guided), unguided_teacher and
    target. `rollout` stands for the student's rollout, which the run prices; the trainer's own rollouts for the fake score
    are not declared.
    """

    student: Mapping[str, Passes]
    fake_score: Mapping[str, Passes]


@dataclass(frozen=True)
class Preset:
    """A published convention: what one could have written in a sweep's base, and where it stands.

    `overrides` are dotted keys of a run: `method.field` for the method's own, else fields of the run such as
    `fake_score_updates`. They are laid under whatever a sweep states itself.
    """

    source: str  # repo@commit, path, or paper
    overrides: Mapping[str, Any]


@dataclass(frozen=True)
class Method(ABC):
    """A distillation objective. Subclasses are final: never override a sibling.

    Fields are hyper-parameters: their types are checked as those of a run are (`Count`, `Share` and any other of pydantic's say
    ranges), and a ValueError of `__post_init__` is one line for the reader of the sweep.
    """

    paper: ClassVar[str]
    version: ClassVar[int] = 1  # part of a run's identity: raise it when the numbers change
    presets: ClassVar[Mapping[str, Preset]] = {}
    has_fake_score: ClassVar[bool] = True  # without one no fake score is built, updated or paid for
    mixes_weights: ClassVar[bool] = (
        False  # after_student_update averages weights of roles: not with low-rank adapters
    )
    shares_graph: ClassVar[bool] = (
        False  # student_loss gives `fake_score_terms` too: a run may say `reuse_rollout: graph`
    )

    @property
    def packages(self) -> frozenset[str]:
        """Packages by import name that this project does not install; checked before anything runs."""
        return frozenset()

    @property
    def needs(self) -> frozenset[str]:
        """Extra data by name: `ode_pairs`, `real_latents` (see `distill_bench.train.extras`)."""
        return frozenset()

    @abstractmethod
    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        """The loss of one student update."""

    def fake_score_loss(self, nets: Nets, batch: Batch, x0: Tensor) -> Loss:
        """The loss of one fake-score update on detached student samples x0: denoising, unless the method differs."""
        return Loss({"denoise": velocity_loss(nets.fake_score, batch, x0)})

    def modules(self, feature_width: int) -> Mapping[str, nn.Module]:
        """Networks (heads) and buffers of the method's own: trained in the fake score's phase, and checkpointed."""
        return {}

    def learning_rates(self) -> Mapping[str, float]:
        """Modules with an optimiser of their own and its learning rate; the others share the fake score's."""
        return {}

    def after_student_update(self, networks: Mapping[str, nn.Module]) -> None:  # noqa: B027 - a hook
        """Called without gradients after each student update, with the networks by role."""

    def cost(self) -> Cost:
        """The passes of each phase, by default those of a detached score difference and of denoising."""
        student = {
            "rollout": Passes(1, full_backward=1),
            "fake_score": Passes(1),
            "teacher": Passes(1),
        }
        return Cost(student, {"fake_score": Passes(1, full_backward=1)})


# --- what objectives are made of ---


@dataclass(frozen=True)
class Renoised:
    """The student's samples noised again, and what both scores make of them."""

    x_t: Tensor
    sigma: Tensor  # (B,)
    x0_fake: Tensor
    x0_teacher: Tensor


def mean_per_sample(x: Tensor) -> Tensor:
    """Mean over all axes but the batch, kept for broadcasting: (B, 1, 1, 1, 1)."""
    return x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)


def dmd_normaliser(x0: Tensor, x0_teacher: Tensor) -> Tensor:
    """n = mean |x0 - x0_teacher| per sample (Yin et al., 2023, eq. 8, in the form of the released codes), detached."""
    return mean_per_sample((x0 - x0_teacher).abs()).detach()


def renoise(
    nets: Nets, batch: Batch, x0: Tensor, through_fake_score: bool, through_teacher: bool = False
) -> Renoised:
    """Noise x0 again at a drawn level and ask the fake score and the teacher for their clean predictions.

    Where a prediction is not asked to keep its graph to x0, by the network's input, it is detached and costs no backward.
    """
    sigma = batch.sigma("renoise/sigma")
    x_t = add_noise(x0, batch.noise("renoise/noise"), sigma)
    with torch.set_grad_enabled(through_fake_score):
        x0_fake = nets.fake_score(x_t if through_fake_score else x_t.detach(), sigma, batch.text)
    with torch.set_grad_enabled(through_teacher):
        x0_teacher = nets.teacher(x_t if through_teacher else x_t.detach(), sigma, batch.text)
    return Renoised(x_t, sigma, x0_fake, x0_teacher)


def toward(x0: Tensor, gradient: Tensor) -> Tensor:
    """The surrogate whose gradient at x0 is `gradient` over the number of elements: |x0 - sg(x0 - gradient)|^2 / 2."""
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


def reverse_kl(
    x0: Tensor, scores: Renoised, weight: Tensor | float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The reverse-KL term, weight * (x0_fake - x0_teacher) / n at x0, and its log.

    grad KL = E[w_t a_t (s_fake - s_teacher) dx0/dtheta] (Yin et al., 2023, eq. 7-8); in clean predictions the score difference
    is (1 - sigma) / sigma^2 (x0_fake - x0_teacher), and the released codes weight it so that only 1/n is left.
    """
    gradient = (
        weight
        * (scores.x0_fake - scores.x0_teacher).detach()
        / dmd_normaliser(x0, scores.x0_teacher)
    )
    return toward(x0, gradient), {"score_gap": gradient.abs().mean()}


def velocity_loss(
    net: Denoise, batch: Batch, x0: Tensor, text: Tensor | None = None, purpose: str = "denoise"
) -> Tensor:
    """Flow matching of `net` on detached samples x0 (B, C, T, H, W): mean of |velocity_hat - (noise - x0)|^2 / 2.

    Lipman et al., 2022, conditional flow matching. In clean predictions the velocity error is (x0 - x0_hat) / sigma.
    """
    sigma, noise = batch.sigma(f"{purpose}/sigma"), batch.noise(f"{purpose}/noise")
    x_t = add_noise(x0, noise, sigma)
    velocity = x0_to_velocity(net(x_t, sigma, batch.text if text is None else text), x_t, sigma)
    return 0.5 * (velocity - (noise - x0)).square().mean()
