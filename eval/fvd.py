"""Fréchet video distance: how far the features of clips are from those of the teacher's clips, and of rendered data."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from distill_bench import shapes
from distill_bench.draws import generator
from distill_bench.evaluator import Clips, Evaluator, Score
from distill_bench.features import Extractor, load_classifier, load_i3d

WEIGHTS = "DISTILL_BENCH_I3D"


@dataclass(frozen=True)
class FVD(Evaluator):
    """Fréchet and kernel distances of clips to the teacher's clips of the same prompts, and to data where there is any.

    Comparable only at one number of clips, of frames and one extractor: the shipped in-domain classifier for clips of 8 frames
    of 32x32, or I3D in TorchScript by path. Values of the in-domain classifier have nothing to do with the literature's.
    """

    paper: ClassVar[str] = "arXiv:1812.01717"
    version: ClassVar[int] = 1

    weights: str | None = field(default_factory=lambda: os.environ.get(WEIGHTS))  # i3d_torchscript.pt; None: the in-domain one
    resamples: int = 100  # bootstrap resamples for the standard deviation

    def reason_to_skip(self, clips: Clips) -> str | None:
        t, _, h, w = clips.frames.shape[1:]
        if self.weights is None and (t, h, w) != (shapes.FRAMES, shapes.SIZE, shapes.SIZE):
            return f"no shipped network knows clips of {t} frames of {h}x{w}: set {WEIGHTS} to an I3D TorchScript file"
        if self.weights is not None and t < 10:
            return f"I3D needs 10 frames or more; the clips have {t}"
        return None

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        extractor = load_classifier() if self.weights is None else load_i3d(Path(self.weights))
        drawn = list(zip(clips.prompts, clips.seeds, strict=True))
        if len(set(drawn)) < len(drawn):
            raise ValueError(
                f"{len(drawn) - len(set(drawn))} of {len(drawn)} clips repeat a prompt and seed: copies fake the count"
            )
        x = extractor(clips.frames)
        result = []
        for key, suffix, whose in (("teacher", "", "the teacher's clips"), ("data", "_data", "data")):
            if key in references:
                y = _reference_features(extractor, references[key], clips, key)
                for name, title, distance in (("fvd", "FVD", frechet_distance), ("kvd", "KVD", kernel_distance)):
                    sd = bootstrap_sd(distance, x, y, self.resamples)
                    title = f"{title} to {whose}"
                    main = name + suffix == "fvd"
                    score = Score(
                        name + suffix, distance(x, y), title, better="lower", headline=main, sd=sd, extractor=extractor.id
                    )
                    result.append(score)
        return result


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared Wasserstein-2 distance of the Gaussians fitted to features (N, d) and (M, d), covariances over N - 1.

    tr (S_x S_y)^(1/2) is the nuclear norm of the product of the centred features: without a covariance or a matrix square
    root the condition number is never squared, nothing turns complex, and N < d is exact.
    """
    x, y = _checked(x, y)
    mean_x, mean_y = x.mean(0), y.mean(0)
    a, b = (x - mean_x) / math.sqrt(len(x) - 1), (y - mean_y) / math.sqrt(len(y) - 1)
    spread = a.square().sum() + b.square().sum()
    root_a = torch.linalg.qr(a, mode="r")[1] if len(a) > a.shape[1] else a
    root_b = torch.linalg.qr(b, mode="r")[1] if len(b) > b.shape[1] else b
    return ((mean_x - mean_y).square().sum() + spread - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()).item()


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 (Bińkowski et al., 2018), of features (N, d) and (M, d)."""
    x, y = _checked(x, y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return (within(x) + within(y) - 2 * kernel(x, y).mean()).item()


def bootstrap_sd(distance, x: Tensor, y: Tensor, resamples: int) -> float:
    """Standard deviation of a distance under resampling of both sets.

    Resampling repeats clips, which shifts every distance up: the spread is right, percentiles of it are no interval.
    """
    draw = generator("bootstrap", len(x), len(y))
    values = []
    for _ in range(resamples):
        i, j = (torch.randint(len(each), (len(each),), generator=draw) for each in (x, y))
        values.append(distance(x[i], y[j]))
    return float(np.std(values, ddof=1))


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features must be (N, d) and (M, d) with N, M >= 2; found {tuple(x.shape)} and {tuple(y.shape)}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("features are not finite")
    return x.double(), y.double()


def _reference_features(extractor: Extractor, reference: Clips, clips: Clips, key: str) -> Tensor:
    if reference.frames.shape != clips.frames.shape:
        raise ValueError(
            f"the {key} reference is {reference.frames.shape}, the clips are {clips.frames.shape}: they must be alike"
        )
    unique = len({frames.tobytes() for frames in reference.frames})
    if unique < len(reference.frames):
        raise ValueError(f"the {key} reference repeats clips: {unique} of {len(reference.frames)} are unique")
    return extractor(reference.frames)
