"""Fréchet video distance: how far the features of clips are from those of the teacher's clips, and of data.

    python -m distill_bench.eval.fvd

runs the self-test of the shipped extractors on clips of known corruption and writes fvd.json beside this file.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from scipy.linalg import LinAlgError, cholesky, eigh, svdvals
from scipy.linalg.blas import dsyrk
from torch import Tensor

from distill_bench.domain import controls
from distill_bench.draws import generator
from distill_bench.evaluate.extractors import Extractor, load_extractor
from distill_bench.evaluator import FEW, Clips, Evaluator, Score, in_order_of, same_frames
from distill_bench.store.files import write_json

EXTRACTOR = "DISTILL_BENCH_EXTRACTOR"
DEFAULT, SECOND = "indomain-r2p1-cls", "random-r2p1"
PUBLISHED = "i3d-k400-logits-400"  # the only one whose distance is called FVD
EPS, ROUNDING = float(np.finfo(float).eps), 1e-11  # an ulp; the share of a sum that rounding may be
FLOOR = 1e-9  # share of the features' variance below which the distance of a floor is rounding
Features = Tensor | np.ndarray | Sequence[Sequence[float]]
SELF_TEST = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class FVD(Evaluator):
    """Fréchet and kernel distances of clips to the teacher's clips of the same prompts, and to data where there is any.

    Comparable only at one number of clips, of frames and one extractor. Only the logits of I3D make the literature's FVD; the
    distance of any other extractor is FD with its name, in units of its own. KVD is unbiased; FVD infinity takes the bias of
    few clips out, at a larger spread.
    """

    paper: ClassVar[str] = "arXiv:1812.01717"
    version: ClassVar[int] = 1

    extractor: str = field(
        default_factory=lambda: os.environ.get(EXTRACTOR, DEFAULT)
    )  # see distill_bench.evaluate.extractors
    resamples: Annotated[int, Field(ge=2)] = 100  # bootstrap resamples for the standard deviation

    def reason_to_skip(self, clips: Clips) -> str | None:
        reason = load_extractor(self.extractor).reason_to_refuse(clips)
        return (
            reason
            and f"{reason}; set {EXTRACTOR}, for instance to {PUBLISHED}:/path/i3d_torchscript.pt or {SECOND}"
        )

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        present = [key for key in ("teacher", "data") if key in references]
        found: list[Score] = []
        for spec in dict.fromkeys((self.extractor, SECOND)):
            extractor = load_extractor(spec)
            first = spec == self.extractor
            x = extractor(clips)
            for key in present:
                y = reference_features(extractor, references[key], clips, key)
                about = _About(extractor, clips, references[key], key, "" if first else "_random")
                found += about.scores(x, y, self.resamples, every=first)
                if first and f"{key}_other" in references:
                    if set(references[key].digests) & set(references[f"{key}_other"].digests):
                        raise ValueError(
                            f"{key}_other holds the same clips as {key}: give clips of other seeds"
                        )
                    other = reference_features(
                        extractor, references[f"{key}_other"], clips, f"{key}_other"
                    )
                    found.append(
                        about.over_floor(frechet_distance(x, y), frechet_distance(other, y), y)
                    )
        return found


@dataclass(frozen=True)
class _About:
    """What the scores of one extractor against one reference have in common."""

    extractor: Extractor
    clips: Clips
    reference: Clips
    key: str
    suffix: str

    def scores(self, x: Tensor, y: Tensor, resamples: int, every: bool) -> list[Score]:
        order = in_order_of(self.reference, self.clips)
        paired = order is not None
        x = x[order] if paired else x
        distance = frechet_distance(x, y)
        if not every:
            return [self._of("fvd", distance, _label(self.extractor), "lower", None)]
        sd, kernel_spread = frechet_sd(x, y, paired, resamples), kernel_sd(x, y, paired, resamples)
        apart = (
            ()
            if paired
            else (
                "the prompts are unknown or not the reference's: sd, kvd and fvd_infinity are unpaired",
            )
        )
        found = [
            self._of(
                "fvd", distance, _label(self.extractor), "lower", sd, self.key == "teacher", apart
            ),
            self._of(
                "kvd", kernel_distance(x, y, paired), "KVD", "lower", kernel_spread, doubts=apart
            ),
        ]
        if min(len(x), len(y)) >= 4:
            limit, spread = frechet_infinity(x, y, paired), infinity_sd(x, y, paired, resamples)
            title = f"{_label(self.extractor)} of infinite clips"
            found.append(self._of("fvd_infinity", limit, title, "lower", spread, doubts=apart))
        return found

    def over_floor(self, distance: float, floor: float, y: Tensor) -> Score:
        if not floor > FLOOR * y.double().var(0).sum().item():
            raise ValueError(
                f"the distance of {self.key} to {self.key} with other seeds is {floor:.3g}: it must be above rounding, "
                f"{FLOOR:g} of the variance of the features"
            )
        return self._of("fvd_over_floor", distance / floor, "over that of other seeds", "one", None)

    def _of(
        self,
        column: str,
        value: float,
        title: str,
        better: str,
        sd: float | None,
        headline: bool = False,
        doubts: tuple[str, ...] = (),
    ) -> Score:
        column += self.suffix + ("" if self.key == "teacher" else f"_{self.key}")
        whose = "the teacher's clips" if self.key == "teacher" else self.key
        return Score(
            column,
            value,
            f"{title}, to {whose}",
            better=better,
            headline=headline,
            sd=sd,
            extractor=self.extractor.id_for(self.clips),
            warnings=warnings(self.extractor, self.clips, self.reference, self.key) + doubts,
        )


def _label(extractor: Extractor) -> str:
    return "FVD" if extractor.name == PUBLISHED else f"FD[{extractor.name}]"


def warnings(extractor: Extractor, clips: Clips, reference: Clips, key: str) -> tuple[str, ...]:
    """What makes a distance of these sets doubtful."""
    n, d, found = min(len(clips.frames), len(reference.frames)), extractor.dim, []
    if n < d:
        found.append(f"rank-deficient: {n} clips are fewer than the {d} features")
    elif n < max(FEW, 5 * d):
        found.append(f"{n} clips are few: a distance of {d} features wants {max(FEW, 5 * d)}")
    if len(clips.frames) != len(reference.frames):
        found.append(
            f"{len(clips.frames)} clips against {len(reference.frames)} of the {key}: the bias differs from other rows'"
        )
    if clips.copies:
        found.append(
            f"{clips.copies} of {len(clips.frames)} clips are copies: they raise the distance"
        )
    if clips.digest == reference.digest:
        found.append("these are the reference's own clips: 0 by construction")
    return tuple(found)


def reference_features(extractor: Extractor, reference: Clips, clips: Clips, key: str) -> Tensor:
    """Features of a reference that is fit to be one.

    Raises:
        ValueError: if its clips are not like those to score, or some are copies of others.
    """
    same_frames(clips, reference, key)
    if reference.copies:
        raise ValueError(
            f"{reference.copies} of the {len(reference.frames)} clips of the {key} reference are copies of others"
        )
    return extractor(reference)


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is refused
def frechet_distance(x: Features, y: Features) -> float:
    """Squared Wasserstein-2 distance of the Gaussians fitted to features (N, d) and (M, d), covariances over N - 1.

    |mu_x - mu_y|^2 + tr (S_x + S_y - 2 (S_x S_y)^(1/2)) (Dowson and Landau, 1982; Heusel et al., 2017, eq. 6). The trace of the
    root is the nuclear norm of the product of the centred features, or of anything with their Gram matrices: without a matrix
    square root nothing turns complex, and N < d is exact.

    Raises:
        ValueError: if x and y are not two sets of real, finite features of one d >= 1, or so large that the distance is not
            finite.
    """
    x, y = features(x, y)
    mean_x, mean_y = (each.numpy().mean(0, dtype=np.float64) for each in (x, y))
    away, n, m = float(np.square(mean_x - mean_y).sum()), len(x) - 1, len(y) - 1
    if min(n, m) >= x.shape[1]:
        gram_x, gram_y = gram(x, mean_x), gram(y, mean_y)
        spread = _finite(away + gram_x.trace() / n + gram_y.trace() / m)
        shared = root_trace(gram_x, gram_y)
        if shared is not None:
            return float(spread - 2 * shared / math.sqrt(n * m))
    a, b = (
        _factor(x - torch.from_numpy(mean_x)) / math.sqrt(n),
        _factor(y - torch.from_numpy(mean_y)) / math.sqrt(m),
    )
    spread = a.square().sum() + b.square().sum()
    _finite(away + spread.item())  # then so is every product of rows
    return away + (spread - 2 * torch.linalg.svdvals(a @ b.T).sum()).item()


def _finite(distance: float) -> float:
    if not math.isfinite(distance):
        raise ValueError("features are too large: their distance is not finite")
    return distance


def gram(x: Tensor, mean: np.ndarray, rows: int = 8192) -> np.ndarray:
    """Upper triangle of the Gram matrix (d, d), float64, of features x (N, d) less their mean; so many rows at once."""
    x, total = x.numpy(), np.zeros((x.shape[1], x.shape[1]), order="F")
    for start in range(
        0, len(x), rows
    ):  # numpy alone: the threads of torch and of BLAS would wait for each other
        total = dsyrk(1.0, (x[start : start + rows] - mean).T, beta=1.0, c=total, overwrite_c=True)
    return total


def root_trace(a: np.ndarray, b: np.ndarray) -> float | None:
    """tr (a b)^(1/2) of two Gram matrices (upper triangles), (d, d); None where they are too near singular to tell.

    By the eigenvalues of their product, which cost half of singular values. Rounding moves each by about an ulp of the largest,
    which a root shows the more the smaller it is: where it could be seen in the sum, by singular values of Cholesky factors.
    """
    try:
        squares = eigh(
            a, b, type=2, lower=False, eigvals_only=True, driver="gv", check_finite=False
        )
        roots = np.sqrt(np.maximum(squares, 0))
        if squares[0] > 0 and EPS * squares[-1] * (0.5 / roots).sum() < ROUNDING * roots.sum():
            return float(roots.sum())
        factors = [cholesky(each, check_finite=False) for each in (a, b)]
    except LinAlgError:
        return None
    if any(each.diagonal().min() < 1e-3 * each.diagonal().max() for each in factors):
        return None
    return float(svdvals(factors[0] @ factors[1].T, check_finite=False).sum())


def _factor(centred: Tensor) -> Tensor:
    """Some (k, d) with the Gram matrix of the centred features (N, d), k <= N and d."""
    return centred if len(centred) <= centred.shape[1] else torch.linalg.qr(centred, mode="r")[1]


def kernel_distance(x: Features, y: Features, paired: bool = False) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 (Bińkowski et al., 2018), of features (N, d) and (M, d).

    Args:
        paired: x and y are of the same prompts in the same order: such pairs are left out between the sets, as a clip and itself
            are within each (Gretton et al., 2012, eq. 4); else the distance of equal distributions would be below 0.

    Raises:
        ValueError: if x and y are not two sets of real, finite features of one d >= 1, are paired and not as many, or so large
            that the distance is not finite.
    """
    x, y = (each.double() for each in features(x, y))
    if paired and len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} features are no pairs")
    within = sum(
        (k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))
    )
    k = kernel(x, y)
    between = (k.sum() - k.trace()) / (len(k) * (len(k) - 1)) if paired else k.mean()
    return _finite((within - 2 * between).item())


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / d + 1)^3 of every pair, (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def frechet_infinity(x: Tensor, y: Tensor, paired: bool, points: int = 15, draws: int = 4) -> float:
    """Fréchet distance without the bias of few clips.

    The intercept of the distance against 1 / n (Chong and Forsyth, 2020), n from half of the clips to all. Both sets are cut to
    n, as the reference is no larger than the clips: its bias goes as well.

    Args:
        paired: x and y are of the same prompts in the same order; then they are cut to the same ones.
        draws: subsets of each n below all.

    Raises:
        ValueError: for fewer than 4 clips, and where `frechet_distance` raises it.
    """
    most = min(len(x), len(y))
    draw = generator("frechet_infinity", len(x), len(y))
    counts = np.unique(np.linspace(max(2, most // 2), most, points).round().astype(int))
    if most < 4:
        raise ValueError(
            f"{most} clips are too few to extrapolate a distance: at least 4 are needed"
        )
    inverse, values = [], []
    for n in counts:
        for _ in range(draws if n < most else 1):
            i = torch.randperm(len(x), generator=draw)[:n]
            j = i if paired else torch.randperm(len(y), generator=draw)[:n]
            inverse.append(1 / n)
            values.append(frechet_distance(x[i], y[j]))
    return float(np.polyfit(inverse, values, 1)[1])


def infinity_sd(x: Tensor, y: Tensor, paired: bool, resamples: int) -> float:
    """Standard deviation of `frechet_infinity` under the resampling of `frechet_sd`.

    Each resample is extrapolated from its half and its whole alone: as sure as from 15 counts at a sixth of the cost.
    """
    drawn = zip(*_resampled(x, y, paired, resamples), strict=True)
    return float(
        np.std([frechet_infinity(x[i], y[j], paired, points=2, draws=8) for i, j in drawn], ddof=1)
    )


def frechet_sd(x: Tensor, y: Tensor, paired: bool, resamples: int) -> float:
    """Standard deviation of `frechet_distance` under resampling (Efron, 1979) of both sets, jointly where they are paired.

    Resampling repeats clips, which shifts every distance up: the spread is right, percentiles of it are no interval.
    """
    values = [
        frechet_distance(x[i], y[j])
        for i, j in zip(*_resampled(x, y, paired, resamples), strict=True)
    ]
    return float(np.std(values, ddof=1))


def kernel_sd(x: Tensor, y: Tensor, paired: bool, resamples: int) -> float:
    """Standard deviation of `kernel_distance` under the same resampling, from one matrix of kernels."""
    x, y = x.double(), y.double()
    drawn = _resampled(x, y, paired, resamples)
    a, b = (
        torch.nn.functional.one_hot(each, len(s)).sum(1).double()
        for each, s in zip(drawn, (x, y), strict=True)
    )

    def mean(left: Tensor, k: Tensor, right: Tensor, alone: bool) -> Tensor:
        total = torch.einsum("rn,nm,rm->r", left, k, right)
        return (
            (total - left @ k.diagonal()) / (len(k) * (len(k) - 1)) if alone else total / k.numel()
        )

    values = (
        mean(a, kernel(x, x), a, True)
        + mean(b, kernel(y, y), b, True)
        - 2 * mean(a, kernel(x, y), b, paired)
    )
    return values.std().item()


def _resampled(x: Tensor, y: Tensor, paired: bool, resamples: int) -> tuple[Tensor, Tensor]:
    """Indices (resamples, N) and (resamples, M)."""
    draw = generator("bootstrap", len(x), len(y))
    i = torch.randint(len(x), (resamples, len(x)), generator=draw)
    return i, i if paired else torch.randint(len(y), (resamples, len(y)), generator=draw)


@np.errstate(over="ignore", invalid="ignore")
def features(x: Features, y: Features) -> tuple[Tensor, Tensor]:
    """Both as tensors of single or double precision on the processor.

    Raises:
        ValueError: if they are not two sets of real, finite features of one d >= 1.
    """
    x, y = (
        each.detach().cpu() if isinstance(each, Tensor) else _of_array(np.asarray(each))
        for each in (x, y)
    )
    if x.is_complex() or y.is_complex():
        raise ValueError("features are complex: they must be real")
    if (
        x.ndim != 2
        or y.ndim != 2
        or x.shape[1] != y.shape[1]
        or min(len(x), len(y)) < 2
        or not x.shape[1]
    ):
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(
            f"features must be (N, d) and (M, d) with N, M >= 2 and d >= 1; found {shapes}"
        )
    x, y = (
        each if each.dtype in (torch.float32, torch.float64) else each.double() for each in (x, y)
    )
    if not np.isfinite(
        sum(each.numpy().sum(dtype=np.float64) for each in (x, y))
    ):  # numpy's: see `gram`
        raise ValueError("features are not finite, or too large to add up")
    return x, y


def _of_array(x: np.ndarray) -> Tensor:
    if x.dtype.kind not in "fiubc":
        raise ValueError(f"features are {x.dtype}: they must be numbers")
    return torch.from_numpy(np.ascontiguousarray(x))  # torch takes no array that runs backwards


# Self-test


def self_test(extractor: Extractor, count: int = 432, nulls: int = 4) -> dict:
    """Distance of each corruption of held-out clips over that of clean ones, and its z against `nulls` clean sets.

    What the shipped classifier has to hold: frozen clips above 5, half speed above 2, shuffled frames above 3.
    """

    def clips(first: int, pace: float = 1.0) -> Clips:
        frames, prompts = controls.rendered(count, first, pace)
        return Clips(frames, prompts, list(range(first, first + count)))

    reference = extractor(clips(0))
    clean = [frechet_distance(extractor(clips(count * (2 + i))), reference) for i in range(nulls)]
    null, sd = float(np.mean(clean)), float(np.std(clean, ddof=1))
    held_out = clips(count)
    sets = {name: corrupt(held_out.frames, 0) for name, corrupt in controls.CORRUPTIONS.items()}
    sets |= {
        "half speed": clips(count, 0.5).frames,
        "one colour missing": controls.rendered(count, count, without="red")[0],
    }
    ratios = {}
    for name, frames in sets.items():
        distance = frechet_distance(
            extractor(Clips(frames, held_out.prompts, held_out.seeds)), reference
        )
        ratios[name] = {"ratio": round(distance / null, 3), "z": round((distance - null) / sd, 1)}
    return {
        "extractor": f"{extractor.name}#{extractor.sha256}",
        "clips": count,
        "null": round(null, 6),
        "corruptions": ratios,
    }


def main() -> int:
    """Write the self-test of the shipped extractors."""
    write_json(SELF_TEST, {name: self_test(load_extractor(name)) for name in (DEFAULT, SECOND)})
    print(json.dumps(json.loads(SELF_TEST.read_text()), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
