"""Exact divergences of a student from its target, where both are Gaussian: no clip is looked at."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.linalg import sqrtm

from distill_bench.evaluator import Clips, Evaluator, Score

FACTS = ("mean", "covariance", "target_mean", "target_covariance")


@dataclass(frozen=True)
class ExactDivergence(Evaluator):
    """KL(student | target), Fisher divergence and 2-Wasserstein distance of the gaussian teacher's students, mean over prompts.

    The target is the teacher at the protocol's guidance: at 1 the data themselves. Rows whose moments are not known (a teacher in
    many steps, noise) have no such score.
    """

    paper: ClassVar[str] = (
        "closed forms between Gaussians; Dowson and Landau, 1982, for the Wasserstein distance"
    )
    version: ClassVar[int] = 1

    def reason_to_skip(self, clips: Clips) -> str | None:
        known = not clips.facts or all(key in clips.facts for key in FACTS)
        return (
            None
            if known
            else f"facts.npz beside the clips lacks {', '.join(key for key in FACTS if key not in clips.facts)}"
        )

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        if not clips.facts:
            return []
        means, covariance, targets, target = (clips.facts[key] for key in FACTS)
        pairs = [
            (mean, covariance, goal, target) for mean, goal in zip(means, targets, strict=True)
        ]
        return [
            Score(
                column,
                float(np.mean([function(*pair) for pair in pairs])),
                title,
                unit,
                "lower",
                headline,
            )
            for column, function, title, unit, headline in (
                ("exact_kl", kl, "exact KL", "nats", True),
                ("exact_fisher", fisher, "exact Fisher divergence", "", True),
                ("exact_w2", wasserstein, "exact W2", "", True),
            )
        ]


def kl(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other: np.ndarray
) -> float:
    """KL(N(mean, covariance) | N(other_mean, other)) in nats."""
    away = other_mean - mean
    log_ratio = np.linalg.slogdet(other)[1] - np.linalg.slogdet(covariance)[1]
    return 0.5 * (
        np.trace(np.linalg.solve(other, covariance))
        - len(mean)
        + away @ np.linalg.solve(other, away)
        + log_ratio
    )


def fisher(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other: np.ndarray
) -> float:
    """E |grad log p - grad log q|^2 over p = N(mean, covariance), q = N(other_mean, other)."""
    slope = np.linalg.inv(other) - np.linalg.inv(covariance)
    offset = np.linalg.solve(other, mean - other_mean)
    return np.trace(slope @ covariance @ slope.T) + offset @ offset


def wasserstein(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other: np.ndarray
) -> float:
    """The 2-Wasserstein distance of N(mean, covariance) and N(other_mean, other)."""
    root = sqrtm(other).real
    squared = np.sum((mean - other_mean) ** 2) + np.trace(
        covariance + other - 2 * sqrtm(root @ covariance @ root).real
    )
    return max(squared, 0.0) ** 0.5
