"""Exact divergences of samples from their target if both are Gaussian; reads no frames."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.linalg import sqrtm

from distill_bench.evaluator import Clips, Evaluator, Score

FACTS = ("mean", "covariance", "target_mean", "target_covariance")


@dataclass(frozen=True)
class ExactDivergence(Evaluator):
    """KL, Fisher divergence, 2-Wasserstein distance and spread of samples, mean over prompts.

    For the Gaussian teacher and its students. The target is the teacher at the protocol's guidance;
    at 1 it is the data distribution. Rows of no network (noise) get no score, and rows without
    spread in some direction (the teacher in one step) no KL and no Fisher divergence.
    """

    paper: ClassVar[str] = "closed forms; Dowson and Landau, 1982, for the Wasserstein distance"
    version: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = (
        "exact_kl",
        "exact_fisher",
        "exact_w2",
        "exact_spread",
    )
    needs_facts: ClassVar[tuple[str, ...]] = FACTS

    def reason_to_skip(self, clips: Clips) -> str | None:
        missing = [key for key in FACTS if key not in clips.facts]
        if not clips.facts or not missing:
            return None
        return f"facts.npz beside the clips lacks {', '.join(missing)}"

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        if not clips.facts:
            return []
        means, covariance, target_means, target_covariance = (clips.facts[key] for key in FACTS)
        pairs = list(zip(means, target_means, strict=True))

        def score(column: str, divergence, title: str, unit: str = "") -> Score:
            values = [divergence(p, covariance, q, target_covariance) for p, q in pairs]
            return Score(column, float(np.mean(values)), title, unit, "lower", headline=True)

        scores = [
            score("exact_w2", wasserstein, "exact W2"),
            Score(
                "exact_spread",
                spread(covariance, target_covariance),
                "spread / target's",
                better="one",
                headline=True,
            ),
        ]
        if np.linalg.matrix_rank(covariance) < len(covariance):
            return scores  # the others are infinite
        return [
            score("exact_kl", kl, "exact KL", "nats"),
            score("exact_fisher", fisher, "exact Fisher divergence"),
            *scores,
        ]


def kl(mean: np.ndarray, covariance: np.ndarray, mean_q: np.ndarray, cov_q: np.ndarray) -> float:
    """KL(p | q) in nats of p = N(mean, covariance) from q = N(mean_q, cov_q)."""
    away = mean_q - mean
    log_ratio = np.linalg.slogdet(cov_q)[1] - np.linalg.slogdet(covariance)[1]
    trace = np.trace(np.linalg.solve(cov_q, covariance))
    return 0.5 * (trace - len(mean) + away @ np.linalg.solve(cov_q, away) + log_ratio)


def fisher(
    mean: np.ndarray, covariance: np.ndarray, mean_q: np.ndarray, cov_q: np.ndarray
) -> float:
    """Fisher divergence E_p |grad log p - grad log q|^2."""
    slope = np.linalg.inv(cov_q) - np.linalg.inv(covariance)
    offset = np.linalg.solve(cov_q, mean - mean_q)
    return np.trace(slope @ covariance @ slope.T) + offset @ offset


def wasserstein(
    mean: np.ndarray, covariance: np.ndarray, mean_q: np.ndarray, cov_q: np.ndarray
) -> float:
    """2-Wasserstein distance of p and q."""
    root = sqrtm(cov_q).real
    cross = sqrtm(root @ covariance @ root).real
    squared = np.sum((mean - mean_q) ** 2) + np.trace(covariance + cov_q - 2 * cross)
    return max(squared, 0.0) ** 0.5


def spread(covariance: np.ndarray, target: np.ndarray) -> float:
    """Root mean square distance of samples from their mean, over the target's."""
    return (np.trace(covariance) / np.trace(target)) ** 0.5
