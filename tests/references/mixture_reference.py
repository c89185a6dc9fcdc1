"""Scores of a few clips of the mixture by definitions of scipy and torch."""

from types import SimpleNamespace

import numpy as np
import torch
from scipy import stats
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from distill_bench.domain.closed_form import FlatNetwork
from distill_bench.domain.latent_clips import dithered, undithered
from distill_bench.domain.mixture import PROMPTS, SHAPE, MixtureBlock, motion_mixture, transported
from distill_bench.domain.mixture_teacher import MixturePipeline

MIXTURE = motion_mixture()
PER_PROMPT = 200
NAMES = [name for name in PROMPTS for _ in range(PER_PROMPT)]
SOME = ["mostly fast", "any motion", "mostly fast", "any motion", "any motion", "mostly fast"] * 3


def bundled_facts() -> dict[str, np.ndarray]:
    """Facts beside clips of the bundled mixture."""
    net = FlatNetwork(MixtureBlock(MIXTURE))
    pipeline = MixturePipeline(SimpleNamespace(), torch.device("cpu"), SHAPE, net, MIXTURE)
    object.__setattr__(pipeline, "prompts", lambda: list(PROMPTS))
    return pipeline.facts(None, torch.ones(1), "ode", 1.0)


def latents(seed: int = 0, mixture=MIXTURE) -> torch.Tensor:
    """Exact samples (N, d) of NAMES."""
    draws = torch.Generator().manual_seed(seed)
    share = torch.rand(len(NAMES), generator=draws)
    noise = torch.randn(len(NAMES), 16, generator=draws)
    return transported(mixture, [list(PROMPTS).index(name) for name in NAMES], share, noise)


def slowed(x: torch.Tensor) -> torch.Tensor:
    """Samples (N, d) that move by 0.7 of what they did."""
    z = x.double() @ MIXTURE.basis
    z[:, :2] *= 0.7
    return z @ MIXTURE.basis.T


class ByHand:
    """Scores of the clips `SOME`; values are read off the frames."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = undithered(dithered(x.reshape(-1, *SHAPE)).numpy(), SHAPE).flatten(1)
        self.rows = [list(PROMPTS).index(name) for name in SOME]
        self.motion = (self.x @ MIXTURE.basis[:, :2]).square().sum(1).sqrt()

    def members(self, prompt: str) -> list[int]:
        return [i for i, name in enumerate(SOME) if name == prompt]

    def weights(self, prompt: str) -> torch.Tensor:
        return MIXTURE.weights[list(PROMPTS).index(prompt)]

    def density(self, prompt: str) -> MixtureSameFamily:
        covariance = MIXTURE.basis @ torch.diag_embed(MIXTURE.variances) @ MIXTURE.basis.T
        modes = MultivariateNormal(MIXTURE.means @ MIXTURE.basis.T, covariance)
        return MixtureSameFamily(Categorical(self.weights(prompt)), modes)

    def log_density(self) -> list[float]:
        pairs = zip(SOME, self.x, strict=True)
        return [float(self.density(name).log_prob(x)) for name, x in pairs]

    def modes(self, prompt: str) -> torch.Tensor:
        """Most likely mode of each clip, one-hot (clips, 17)."""
        components = self.density(prompt).component_distribution
        joint = components.log_prob(self.x[self.members(prompt)][:, None])
        likeliest = (joint + self.weights(prompt).log()).argmax(1)
        return torch.nn.functional.one_hot(likeliest, 17).double()

    def shares(self, prompt: str) -> torch.Tensor:
        return self.modes(prompt).mean(0)

    def rice(self, prompt: str) -> list[tuple[float, stats.rv_continuous]]:
        """Weight and distribution of motion of each mode of a prompt."""
        sd = MIXTURE.variances[:, 0].sqrt()
        offset = MIXTURE.means[:, :2].norm(dim=1)
        parts = zip(self.weights(prompt).tolist(), offset.tolist(), sd.tolist(), strict=True)
        return [(w, stats.rice(m / s, scale=s)) for w, m, s in parts]

    def true_motion(self, prompt: str) -> float:
        return sum(w * mode.mean() for w, mode in self.rice(prompt))

    def true_variance(self, prompt: str) -> float:
        square = sum(w * (mode.var() + mode.mean() ** 2) for w, mode in self.rice(prompt))
        return square - self.true_motion(prompt) ** 2

    def variance(self, prompt: str) -> float:
        return float(self.motion[self.members(prompt)].var(correction=1))

    def motion_w1(self, prompt: str) -> float:
        grid = np.linspace(0, 6, 4001)
        data = sum(w * mode.cdf(grid) for w, mode in self.rice(prompt))
        own = self.motion[self.members(prompt)].numpy()
        return float(np.trapezoid(abs((own[:, None] <= grid).mean(0) - data), grid))


def energy(x: torch.Tensor, y: torch.Tensor, paired: bool = False) -> float:
    """Energy distance; `paired`: without the pairs of equal index."""

    def mean(a: torch.Tensor, b: torch.Tensor, others: bool) -> float:
        distances = (a[:, None] - b[None]).square().sum(-1).sqrt()
        if others:
            distances = distances[~torch.eye(len(a), dtype=torch.bool)]
        return float(distances.mean())

    return 2 * mean(x, y, paired) - mean(x, x, True) - mean(y, y, True)


def mean_of(values) -> float:
    return float(np.mean([float(value) for value in values]))
