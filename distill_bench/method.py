"""The contract of an objective: base class of the methods in `methods/`, their inputs and losses.

A method is a frozen dataclass whose fields are its hyper-parameters. Settings that must be equal
between methods to compare them (noise levels, rollout, guidance, learning rates, cadence) belong to
the run; they reach the method through `Nets` and `Batch`.

A student update has two phases. In the student's phase everything else is frozen: a backward
through the fake score, the teacher or the method's modules reaches their input and computes no
weight gradients. In the fake score's phase only the fake score and the method's modules are
trained.

Axes: B samples, C channels, T latent frames, H and W latent height and width; texts are (B, L, D).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from distill_bench.draws import Draws
from distill_bench.evaluator import Citation as Citation
from distill_bench.fields import Count as Count
from distill_bench.fields import Depth as Depth
from distill_bench.fields import Equals as Equals
from distill_bench.fields import Lowers as Lowers
from distill_bench.fields import NoDirection as NoDirection
from distill_bench.fields import NotNegative as NotNegative
from distill_bench.fields import Positive as Positive
from distill_bench.fields import Raises as Raises
from distill_bench.fields import Scales as Scales
from distill_bench.fields import Share as Share
from distill_bench.fields import added as added
from distill_bench.noise import GuidanceScale, add_noise, over, x0_to_velocity

Space = Literal["velocity", "x0", "noise"]  # of the prediction whose error is a loss

# (x_t (B, C, T, H, W), sigma (B,), text (B, L, D)) -> x0_hat (B, C, T, H, W)
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]


class Role(Protocol):
    """Clean prediction by the network of a role (student, fake score or teacher).

    Arguments of all three: x_t (B, C, T, H, W), sigma (B,) in (0, 1], text (B, L, D).
    """

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Clean prediction x0_hat, (B, C, T, H, W)."""

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Prediction of noise - x0, (B, C, T, H, W), from which the call computes x0_hat."""

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        """Tokens (B, N, width) after the share `depth` of the blocks; later blocks do not run."""


@dataclass(frozen=True)
class Loss:
    """The result of one phase of a method, over one micro-batch."""

    # Scalars by name; their sum is differentiated.
    terms: Mapping[str, Tensor]
    # The student's samples of this phase with their graph, (B, C, T, H, W); None: the phase made
    # none. The fake score may reuse them (`reuse_rollout`), and signals compare the terms at them.
    x0: Tensor | None = None
    # Further detached scalars for train.jsonl.
    logs: Mapping[str, Tensor] = field(default_factory=dict)
    # The fake score's loss on the same samples and draws, from the forward of the student's terms;
    # only for methods with `Method.shares_graph`.
    fake_score_terms: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """Sum of the terms, a scalar."""
        return cast(Tensor, sum(self.terms.values()))


@dataclass(frozen=True)
class Batch:
    """Prompts and keyed draws of one phase, for this rank's share of one micro-batch."""

    text: Tensor  # (B, L, D)
    draws: Draws
    latent_shape: tuple[int, ...]  # (C, T, H, W)
    score_shift: float  # shift of the noise levels at which scores are compared
    sigma_min: float  # lowest and highest of these noise levels
    sigma_max: float
    # Extra data by name: a function that draws it for this batch.
    extras: Mapping[str, Callable[[Draws], dict[str, Tensor]]] = field(default_factory=dict)
    # True: all samples of the global batch share each drawn noise level.
    one_sigma: bool = False

    def noise(self, purpose: str) -> Tensor:
        """Gaussian noise (B, C, T, H, W), independent for each purpose."""
        return self.draws.noise(purpose, self.latent_shape)

    def sigma(self, purpose: str) -> Tensor:
        """Noise levels (B,) for comparing scores, in [sigma_min, sigma_max]."""
        bounds = self.sigma_min, self.sigma_max
        return self.draws.sigma(purpose, self.score_shift, *bounds, self.one_sigma)

    def extra(self, need: str) -> dict[str, Tensor]:
        """Extra data drawn for this batch: `x0` (B, C, T, H, W), its `text`, `noise` of ODE pairs.

        Args:
            need: a name in the method's `needs`.
        """
        return self.extras[need](self.draws)


def _unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Nets:
    """The roles as denoisers, the guided teacher, and the rollout of the run."""

    student: Role
    fake_score: Role
    # Guided by the run's guidance_scale.
    teacher: Denoise
    # The student's samples (B, C, T, H, W), differentiable at the exit step.
    rollout: Callable[[Batch], Tensor]
    # Noise level (B,) of the exit step.
    exit_sigma: Callable[[Batch], Tensor] | None = None
    # The student's moving average; the student itself if the run keeps none.
    target: Denoise | None = None
    unguided_teacher: Role | None = None
    null_text: Tensor | None = None  # (1, L, D), of the empty or the negative prompt
    guidance_scale: GuidanceScale = 1.0  # g of uncond + g (cond - uncond); see noise.guidance_at
    # Latents (B, C, T, H, W) -> video (B, 3, F, Y, X) in [-1, 1], differentiable.
    decode: Callable[[Tensor], Tensor] | None = None
    # The networks that the method's `modules` built.
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    # Mean over the ranks of a tensor without a graph.
    mean_over_ranks: Callable[[Tensor], Tensor] = _unchanged


@dataclass(frozen=True)
class Preset:
    """Settings of a published implementation, with their source.

    A sweep's own keys win over a preset's.
    """

    source: str  # repo@commit, path; or paper
    # Dotted keys of a run: `method.FIELD`, or fields of the run such as `fake_score_updates`.
    overrides: Mapping[str, Any]
    title: str = ""  # display name after the method's; "": the preset's name


@dataclass(frozen=True)
class Method(ABC):
    """A distillation objective. Subclasses are final frozen dataclasses, one per file.

    Must define: `paper` and `student_loss`. May define: fields with defaults (hyper-parameters, and
    axes of a sweep), `fake_score_loss`, `modules` with their `learning_rates`, `needs`,
    `after_student_update`, `packages`, `presets` and the class attributes below. A complete method:

        @dataclass(frozen=True)
        class MyMethod(Method):
            paper: ClassVar[str] = "none"
            scale: Annotated[float, Scales("kl")] = 1.0  # weight of the term "kl"

            def student_loss(self, nets, batch):
                x0 = nets.rollout(batch)
                scores = renoise(nets, batch, x0.detach(), through_fake_score=False)
                gradient = scores.x0_fake - scores.x0_teacher
                return Loss({"kl": self.scale * toward(x0, gradient)}, x0)

    Save it as methods/my_method.py, or write `method: path/to/my_method.py:MyMethod` in the sweep.
    Types of fields are checked when a run is resolved, with ranges as `Count` or `Share`. A
    ValueError of `__post_init__` is reported as one line. Every number states its direction by a
    mark of `distill_bench.fields`, which `distill-bench check` holds against the method.
    """

    paper: ClassVar[Citation | str]  # or another source, or "none: ..."
    title: ClassVar[str] = ""  # display name; "": made from the method's name (sgmd: SGMD)
    version: ClassVar[int] = 1  # part of a run's id: raise it when the numbers change
    presets: ClassVar[Mapping[str, Preset]] = {}
    # False: no fake score is built, updated or counted as cost.
    has_fake_score: ClassVar[bool] = True
    # True: after_student_update averages weights of roles, which low-rank adapters do not allow.
    mixes_weights: ClassVar[bool] = False
    # True: student_loss also gives `fake_score_terms`; a run may set `reuse_rollout: graph`.
    shares_graph: ClassVar[bool] = False
    # Index of the earliest step at which a rollout may exit; only in the student's phase.
    first_exit: ClassVar[int] = 0

    @property
    def packages(self) -> frozenset[str]:
        """Import names of packages that this project does not install; checked before a run."""
        return frozenset()

    @property
    def needs(self) -> frozenset[str]:
        """Extra data by name: `ode_pairs`, `real_latents` (see `distill_bench.train.extras`)."""
        return frozenset()

    @property
    def differentiated_roles(self) -> frozenset[str]:
        """Frozen roles through which the student's loss is differentiated; `testing` checks them.

        Any of `fake_score`, `teacher` and `unguided_teacher`. Predictions of other roles must be
        detached.
        """
        return frozenset()

    @abstractmethod
    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        """Loss of the student's phase; its `x0` are the student's samples."""

    def fake_score_loss(self, nets: Nets, batch: Batch, x0: Tensor) -> Loss:
        """Loss of one fake-score update; by default denoising of the student's samples.

        Args:
            nets: only the fake score and the modules are trained.
            batch: with the prompts of the samples, and draws of this update.
            x0: detached samples of the student, (B, C, T, H, W).
        """
        return Loss({"denoise": velocity_loss(nets.fake_score, batch, x0)})

    def modules(self, feature_width: int) -> Mapping[str, nn.Module]:
        """The method's own networks and buffers, e.g. GAN heads.

        They are trained in the fake score's phase and checkpointed with the run.

        Args:
            feature_width: width of the tokens that `Role.features` returns.
        """
        return {}

    def learning_rates(self) -> Mapping[str, float]:
        """Learning rates of modules with an optimiser of their own.

        The other modules share the fake score's optimiser.
        """
        return {}

    def after_student_update(self, networks: Mapping[str, nn.Module]) -> None:  # noqa: B027
        """Hook after each student update, without gradients; by default it does nothing.

        Args:
            networks: trained networks by role; their parameters may be changed in place.
        """

    def rehearsed(self) -> "Method":
        """The method that is run on tiny stand-in networks to count its passes.

        By default this is the method itself. Override it if the method loads weights of its own, to
        return a method that makes the same passes without these weights.
        """
        return self


# --- pieces that objectives share ---


@dataclass(frozen=True)
class Renoised:
    """The student's samples, noised again, with the clean predictions of both scores."""

    x_t: Tensor  # (B, C, T, H, W)
    sigma: Tensor  # (B,)
    x0_fake: Tensor  # (B, C, T, H, W), by the fake score
    x0_teacher: Tensor  # (B, C, T, H, W), by the guided teacher


def mean_per_sample(x: Tensor) -> Tensor:
    """Mean over all axes but the first, kept for broadcasting: (B, ...) -> (B, 1, ...)."""
    return x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)


def dmd_normaliser(x0: Tensor, x0_teacher: Tensor) -> Tensor:
    """Mean |x0 - x0_teacher| per sample, detached, (B, 1, 1, 1, 1).

    Yin et al., 2023, eq. 8, in the form of the released code.
    """
    return mean_per_sample((x0 - x0_teacher).abs()).detach()


def renoise(
    nets: Nets, batch: Batch, x0: Tensor, through_fake_score: bool, through_teacher: bool = False
) -> Renoised:
    """Noise x0 again at a drawn level, and predict it by the fake score and the teacher.

    Args:
        nets: the roles.
        batch: draws the level and the noise, by the purposes `renoise/sigma` and `renoise/noise`.
        x0: samples, (B, C, T, H, W).
        through_fake_score: keep the graph from the fake score's prediction to x0. Without it the
            prediction is detached and costs no backward.
        through_teacher: keep the graph from the teacher's prediction to x0.
    """
    sigma = batch.sigma("renoise/sigma")
    x_t = add_noise(x0, batch.noise("renoise/noise"), sigma)
    with torch.set_grad_enabled(through_fake_score):
        x0_fake = nets.fake_score(x_t if through_fake_score else x_t.detach(), sigma, batch.text)
    with torch.set_grad_enabled(through_teacher):
        x0_teacher = nets.teacher(x_t if through_teacher else x_t.detach(), sigma, batch.text)
    return Renoised(x_t, sigma, x0_fake, x0_teacher)


def toward(x0: Tensor, gradient: Tensor) -> Tensor:
    """Scalar loss whose gradient at x0 is `gradient` divided by the number of elements.

    It is the mean of |x0 - sg(x0 - gradient)|^2 / 2, where sg stops gradients.

    Args:
        x0: samples with their graph, (B, C, T, H, W).
        gradient: (B, C, T, H, W).
    """
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


def reverse_kl(
    x0: Tensor, scores: Renoised, weight: Tensor | float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reverse-KL term of distribution matching: gradient weight * (x0_fake - x0_teacher) / n at x0.

    grad KL = E[w_t a_t (s_fake - s_teacher) dx0/dtheta] (Yin et al., 2023, eq. 7-8). In clean
    predictions the score difference is (1 - sigma) / sigma^2 (x0_fake - x0_teacher); the released
    code weights it so that only 1 / n is left, with n the `dmd_normaliser`.

    Args:
        x0: samples with their graph, (B, C, T, H, W).
        scores: predictions on the renoised x0.
        weight: scalar, or per sample (B, 1, 1, 1, 1).

    Returns:
        The scalar term, and `score_gap` (mean absolute gradient) for the log.
    """
    gap = weight * (scores.x0_fake - scores.x0_teacher).detach()
    gradient = gap / dmd_normaliser(x0, scores.x0_teacher)
    return toward(x0, gradient), {"score_gap": gradient.abs().mean()}


def velocity_loss(
    net: Denoise, batch: Batch, x0: Tensor, text: Tensor | None = None, purpose: str = "denoise"
) -> Tensor:
    """Flow matching of `net` on samples: mean of |velocity_hat - (noise - x0)|^2 / 2, a scalar.

    Lipman et al., 2022, conditional flow matching. In clean predictions the velocity error is
    (x0 - x0_hat) / sigma.

    Args:
        net: the network that is trained.
        batch: draws the noise and its level.
        x0: detached samples, (B, C, T, H, W).
        text: of the samples, (B, L, D); None: the batch's.
        purpose: key of the draws, `{purpose}/sigma` and `{purpose}/noise`.
    """
    error, _ = _velocity_error(net, batch, x0, batch.text if text is None else text, purpose)
    return 0.5 * error.square().mean()


def denoising_loss(net: Denoise, batch: Batch, x0: Tensor, space: Space) -> Tensor:
    """Denoising of `net` on samples: mean of |error|^2 / 2 of the prediction in `space`, a scalar.

    At one x_t the error of x0 is sigma times the error of the velocity, and the error of the noise
    is 1 - sigma times. The draws are those of `velocity_loss`.

    Args:
        net: the network that is trained.
        batch: draws the noise and its level.
        x0: detached samples, (B, C, T, H, W).
        space: `velocity`, `x0` or `noise`.
    """
    error, sigma = _velocity_error(net, batch, x0, batch.text, "denoise")
    weights = {"velocity": torch.ones_like(sigma), "x0": sigma, "noise": 1 - sigma}
    return 0.5 * (weights[space] * error).square().mean()


def _velocity_error(
    net: Denoise, batch: Batch, x0: Tensor, text: Tensor, purpose: str
) -> tuple[Tensor, Tensor]:
    """Error of the velocity (B, C, T, H, W) on noised samples, and their level (B, 1, 1, 1, 1)."""
    sigma = batch.sigma(f"{purpose}/sigma")
    noise = batch.noise(f"{purpose}/noise")
    x_t = add_noise(x0, noise, sigma)
    velocity = x0_to_velocity(net(x_t, sigma, text), x_t, sigma)
    return velocity - (noise - x0), over(sigma, x0)
