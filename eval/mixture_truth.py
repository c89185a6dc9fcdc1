"""Students of the mixture teacher against the truth: mode weights, motion, energy, log density."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from distill_bench.domain.latent_clips import undithered
from distill_bench.domain.mixture import (
    Mixture,
    joint_log_density,
    motion,
    motion_distribution,
    total_variation,
    transported,
)
from distill_bench.draws import generator
from distill_bench.evaluator import Clips, Evaluator, Score

PARAMETERS = ("basis", "means", "variances", "weights")
FACTS = (*PARAMETERS, "prompts", "latent_shape")
LOST = 0.1  # a mode is lost if its share is below this part of its weight
EXACT_SAMPLES = 1024  # per prompt, for the energy distance
RESAMPLES = 200  # of the clips of a prompt, for standard errors
GRID = 1000  # values at which distributions of motion are compared
FEW = 100  # clips per prompt


@dataclass(frozen=True)
class MixtureTruth(Evaluator):
    """Modes, motion, energy distance and log density of clips, against the data of their prompts.

    Everything but the energy distance is compared with closed forms of the data, which are also the
    unguided teacher's. Columns ending in `_teacher` compare with the teacher's clips instead, which
    are the target under guidance. Means are over prompts, and intervals over the clips of each: the
    prompts are all that the mixture has. Latents are read off the frames, to within 4e-4. The
    motion of a clip is the norm of its two motion coordinates.

    Székely and Rizzo, 2013, for the energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'|, whose
    estimate is unbiased: its floor is 0, and the row `data` shows the spread. Log density does not
    rank rows: clips at the centres of modes exceed that of the data.
    """

    paper: ClassVar[str] = "closed forms; Székely and Rizzo, 2013, for the energy distance"
    version: ClassVar[int] = 3
    columns: ClassVar[tuple[str, ...]] = (
        "mode_tv",
        "mode_entropy",
        "lost_modes",
        "mixture_motion_ratio",
        "mixture_motion_w1",
        "mixture_motion_spread_ratio",
        "mixture_energy",
        "mixture_motion_energy",
        "mixture_log_density",
        "mode_tv_teacher",
        "mixture_motion_ratio_teacher",
        "mixture_motion_w1_teacher",
        "mixture_motion_spread_ratio_teacher",
        "mixture_energy_teacher",
    )
    needs_facts: ClassVar[tuple[str, ...]] = FACTS

    def reason_to_skip(self, clips: Clips) -> str | None:
        missing = [key for key in FACTS if key not in clips.facts]
        if clips.facts and missing:
            return f"facts.npz beside the clips lacks {', '.join(missing)}"
        if clips.facts and min(map(clips.prompts.count, set(clips.prompts))) < 2:
            return "a prompt has one clip; each needs at least 2"
        return None

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        if not clips.facts:
            return []
        tensors = {name: torch.from_numpy(clips.facts[name]).double() for name in PARAMETERS}
        mixture, names = Mixture(**tensors), clips.facts["prompts"].tolist()
        groups = [Group(mixture, clips, prompt, names) for prompt in sorted(set(clips.prompts))]
        smallest = min(len(group.x) for group in groups)
        few = (f"only {smallest} clips per prompt; modes want {FEW}",) if smallest < FEW else ()

        def score(column: str, values: list[Tensor], title: str, **fields: Any) -> Score:
            """Score of the mean over prompts; values (1 + R,) start with the unresampled one."""
            mean = torch.stack(values).mean(0)
            sd = float(mean[1:].std())
            return Score(column, float(mean[0]), title, sd=sd, warnings=few, **fields)

        lower = {"better": "lower"}
        entropy = float(np.mean([entropies(group.weights) for group in groups]))
        true_mean = np.mean([group.true_motion for group in groups])
        true_variances = [group.true_motion_variance for group in groups]
        exact = [group.exact() for group in groups]
        densities = [
            joint_log_density(mixture, data, group.weights).logsumexp(1).mean()
            for group, data in zip(groups, exact, strict=True)
        ]
        motions = [group.resamples @ group.motion for group in groups]  # means, (1 + R,) each
        scores = [
            score(
                "mode_tv",
                [total_variation(group.shares, group.weights) for group in groups],
                "mode weights, total variation to data",
                headline=True,
                **lower,
            ),
            score(
                "mode_entropy",
                [entropies(group.shares) for group in groups],
                "entropy of mode weights",
                unit="nats",
                note=f"of the data: {entropy:.3f}",
            ),
            score(
                "lost_modes",
                [(group.shares < LOST * group.weights).double().sum(1) for group in groups],
                "lost modes per prompt",
                note=f"with a share below {LOST:g} of their weight; {len(mixture.means)} modes",
                **lower,
            ),
            score(
                "mixture_motion_ratio",
                [mean / true_mean for mean in motions],
                "latent motion / data's",
                better="one",
                headline=True,
            ),
            score(
                "mixture_motion_w1",
                [group.motion_w1() for group in groups],
                "W1 of latent motion to data",
                headline=True,
                **lower,
            ),
            score(
                "mixture_motion_spread_ratio",
                [motion_spread_ratio([group.motion_variance for group in groups], true_variances)],
                "spread of latent motion within prompts / data's",
                better="one",
                headline=True,
            ),
            score(
                "mixture_energy",
                [
                    energy_distance(group.x, data, group.resamples)
                    for group, data in zip(groups, exact, strict=True)
                ],
                "energy distance to data",
                headline=True,
                **lower,
            ),
            score(
                "mixture_motion_energy",
                [
                    energy_distance(group.motions(group.x), group.motions(data), group.resamples)
                    for group, data in zip(groups, exact, strict=True)
                ],
                "energy distance to data, latent motion only",
                **lower,
            ),
            score(
                "mixture_log_density",
                [group.resamples @ group.log_density for group in groups],
                "log density under the data",
                unit="nats",
                note=f"of exact samples: {float(np.mean(densities)):.2f}",
            ),
        ]
        if "teacher" not in references:
            return scores
        teacher = references["teacher"]
        others = [Group(mixture, teacher, group.prompt, names) for group in groups]
        pairs = list(zip(groups, others, strict=True))
        teacher_mean = float(np.mean([float(other.motion.mean()) for other in others]))
        return [
            *scores,
            score(
                "mode_tv_teacher",
                [total_variation(group.shares, other.shares[:1]) for group, other in pairs],
                "mode weights, total variation to teacher",
                **lower,
            ),
            score(
                "mixture_motion_ratio_teacher",
                [mean / teacher_mean for mean in motions],
                "latent motion / teacher's",
                better="one",
            ),
            score(
                "mixture_motion_w1_teacher",
                [group.motion_w1(other) for group, other in pairs],
                "W1 of latent motion to teacher",
                **lower,
            ),
            score(
                "mixture_motion_spread_ratio_teacher",
                [
                    motion_spread_ratio(
                        [group.motion_variance for group in groups],
                        [other.motion_variance[:1] for other in others],
                    )
                ],
                "spread of latent motion within prompts / teacher's",
                better="one",
            ),
            score(
                "mixture_energy_teacher",
                [
                    energy_distance(group.x, other.x, group.resamples, group.twins(other))
                    for group, other in pairs
                ],
                "energy distance to teacher",
                **lower,
            ),
        ]


class Group:
    """The clips of one prompt and the data of the prompt.

    Raises:
        ValueError: for a prompt that the mixture does not have, or clips of another size.
    """

    def __init__(self, mixture: Mixture, clips: Clips, prompt: str, names: list[str]) -> None:
        if prompt not in names:
            raise ValueError(f"the mixture has no prompt {prompt!r}; it has: {', '.join(names)}")
        self.mixture, self.prompt, self.row = mixture, prompt, names.index(prompt)
        members = np.flatnonzero(np.array(clips.prompts) == prompt)
        self.weights = mixture.weights[self.row]
        self.seeds = np.array(clips.seeds)[members]
        shape = tuple(clips.facts["latent_shape"].tolist())
        self.x = undithered(clips.frames[members], shape).flatten(1)
        joint = joint_log_density(mixture, self.x, self.weights)
        self.log_density = joint.logsumexp(1)
        self.motion = motion(mixture, self.x)
        self.resamples = resampling_weights(len(self.x))
        mode = torch.nn.functional.one_hot(joint.argmax(1), len(self.weights)).double()
        self.shares = self.resamples @ mode  # (1 + R, M)

    @property
    def true_motion(self) -> float:
        """Mean motion of the data."""
        grid = self._grid()
        above = 1 - motion_distribution(self.mixture, self.weights, grid)
        return float(torch.trapezoid(above, grid))

    @property
    def motion_variance(self) -> Tensor:
        """Unbiased variance of the motion, (1 + R,)."""
        n, mean = len(self.motion), self.resamples @ self.motion
        variance = self.resamples @ self.motion.square() - mean.square()
        return variance.clamp(min=0) * n / (n - 1)  # rounding may leave less than 0

    @property
    def true_motion_variance(self) -> Tensor:
        """Variance of the motion of the data, (1,)."""
        square = self.mixture.means[:, :2].square().sum(1) + 2 * self.mixture.variances[:, 0]
        return (self.weights @ square - self.true_motion**2)[None]

    def motion_w1(self, other: "Group | None" = None) -> Tensor:
        """W1 distance (1 + R,) of the motion to that of the data, or of another group's clips."""
        grid = self._grid(other)
        if other is None:
            expected = motion_distribution(self.mixture, self.weights, grid)
        else:
            expected = (other.motion[:, None] <= grid).double().mean(0)
        observed = self.resamples @ (self.motion[:, None] <= grid).double()
        return torch.trapezoid((observed - expected).abs(), grid)

    def twins(self, other: "Group") -> Tensor:
        """True for pairs (N, M) of clips of the same noise: those of one seed.

        If no seed is common, or a seed is repeated, clips in the same place are taken for twins.
        """
        same = torch.from_numpy(self.seeds[:, None] == other.seeds)
        if same.any() and same.sum(0).max() == same.sum(1).max() == 1:
            return same
        return torch.eye(*same.shape, dtype=torch.bool)

    def exact(self) -> Tensor:
        """Exact samples (EXACT_SAMPLES, d) of the prompt's data, always the same."""
        draws = generator("mixture/exact", self.row)
        share = torch.rand(EXACT_SAMPLES, generator=draws)
        noise = torch.randn(EXACT_SAMPLES, self.x.shape[1], generator=draws)
        rows = [self.row] * EXACT_SAMPLES
        return transported(self.mixture, rows, share, noise).double()

    def motions(self, x: Tensor) -> Tensor:
        """Motion coordinates (N, 2) of latents (N, d)."""
        return x @ self.mixture.basis[:, :2]

    def _grid(self, other: "Group | None" = None) -> Tensor:
        """Values of motion that cover the data and the clips, (GRID,)."""
        sd = self.mixture.variances[:, 0].sqrt()
        data = float((self.mixture.means[:, :2].norm(dim=1) + 6 * sd).max())
        clips = max(float(group.motion.max()) for group in (self, other) if group is not None)
        return torch.linspace(0, max(data, clips), GRID, dtype=torch.float64)


def resampling_weights(n: int) -> Tensor:
    """Weights (1 + RESAMPLES, n) of n clips: equal, then those of bootstrap resamples."""
    counts = np.random.default_rng(n).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return torch.from_numpy(np.concatenate([np.ones((1, n)), counts]) / n)


def motion_spread_ratio(variances: list[Tensor], references: list[Tensor]) -> Tensor:
    """Root of the ratio of the mean variances over prompts, (1 + R,)."""
    return (torch.stack(variances).mean(0) / torch.stack(references).mean(0)).sqrt()


def entropies(shares: Tensor) -> Tensor:
    """Entropy in nats of shares (..., M)."""
    return torch.special.entr(shares).sum(-1)


def energy_distance(x: Tensor, y: Tensor, resamples: Tensor, twins: Tensor | None = None) -> Tensor:
    """Unbiased squared energy distance (1 + R,) of x (N, d) to y (M, d), for resamples of x.

    A resample draws clips twice, so its values have a bias; only their spread is meant to be used.

    Args:
        twins: True for pairs (N, M) that are left out, because they are not independent: they came
            from the same noise. Equal x and y are then at distance 0.
    """
    within, across = torch.cdist(x, x), torch.cdist(x, y)
    n, m = len(x), len(y)
    pairs = torch.ones_like(across) if twins is None else (~twins).to(across.dtype)
    between = resamples @ ((across * pairs).sum(1) / pairs.sum(1))
    own = (resamples @ within * resamples).sum(1) * n / (n - 1)
    other = torch.cdist(y, y).sum() / (m * (m - 1))
    return 2 * between - own - other
