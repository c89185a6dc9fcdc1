"""Fréchet and kernel distances between two sets of features, and their standard deviations."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.linalg import LinAlgError, cholesky, eigh, svdvals
from scipy.linalg.blas import dsyrk
from torch import Tensor
from torch.nn.functional import one_hot

from distill_bench.draws import generator

Features = Tensor | np.ndarray | Sequence[Sequence[float]]  # (N, d)
Kernel = Callable[[Tensor, Tensor], Tensor]  # (N, d), (M, d) -> (N, M)
EPS = float(np.finfo(float).eps)
ROUNDING = 1e-11  # share of a sum that may be rounding error


@np.errstate(over="ignore", invalid="ignore")  # non-finite results raise below
def frechet_distance(x: Features, y: Features) -> float:
    """Squared Wasserstein-2 distance of the Gaussians fitted to features (N, d) and (M, d).

    |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)), covariances over N - 1 (Dowson and Landau,
    1982; Heusel et al., 2017, eq. 6). The trace of the root is the nuclear norm of A B^T for any A,
    B with the Gram matrices of the centred features. No matrix square root is taken, so no value
    becomes complex, and the result is exact for N < d.

    Raises:
        ValueError: if x and y are not two sets of real, finite features with the same d >= 1, or if
            their distance is not finite.
    """
    x, y = checked_features(x, y)
    mean_x = x.numpy().mean(0, dtype=np.float64)
    mean_y = y.numpy().mean(0, dtype=np.float64)
    between_means = float(np.square(mean_x - mean_y).sum())
    n, m = len(x) - 1, len(y) - 1
    if min(n, m) >= x.shape[1]:
        gram_x, gram_y = gram(x, mean_x), gram(y, mean_y)
        total = _finite(between_means + gram_x.trace() / n + gram_y.trace() / m)
        root = root_trace(gram_x, gram_y)
        if root is not None:
            return float(total - 2 * root / math.sqrt(n * m))
    a = _factor(x - torch.from_numpy(mean_x)) / math.sqrt(n)
    b = _factor(y - torch.from_numpy(mean_y)) / math.sqrt(m)
    traces = a.square().sum() + b.square().sum()
    _finite(between_means + traces.item())  # bounds every entry of a @ b.T
    return between_means + (traces - 2 * torch.linalg.svdvals(a @ b.T).sum()).item()


def gram(x: Tensor, mean: np.ndarray, rows: int = 8192) -> np.ndarray:
    """Upper triangle (d, d) of the Gram matrix of features (N, d) minus their mean, in float64."""
    x = x.numpy()
    total = np.zeros((x.shape[1], x.shape[1]), order="F")
    # numpy throughout: the thread pools of torch and BLAS would compete
    for start in range(0, len(x), rows):
        centred = x[start : start + rows] - mean
        total = dsyrk(1.0, centred.T, beta=1.0, c=total, overwrite_c=True)
    return total


def root_trace(a: np.ndarray, b: np.ndarray) -> float | None:
    """tr (a b)^(1/2) of two Gram matrices, upper triangles (d, d); None if nearly singular.

    Eigenvalues of the product cost half as much as singular values of the factors, but rounding
    moves each eigenvalue by about an ulp of the largest. If the error of the summed roots could
    exceed ROUNDING, singular values of Cholesky factors are used instead.
    """
    try:
        squares = eigh(
            a, b, type=2, lower=False, eigvals_only=True, driver="gv", check_finite=False
        )
        roots = np.sqrt(np.maximum(squares, 0))
        if squares[0] > 0 and EPS * squares[-1] * (0.5 / roots).sum() < ROUNDING * roots.sum():
            return float(roots.sum())
        factors = [cholesky(matrix, check_finite=False) for matrix in (a, b)]
    except LinAlgError:
        return None
    if any(factor.diagonal().min() < 1e-3 * factor.diagonal().max() for factor in factors):
        return None
    return float(svdvals(factors[0] @ factors[1].T, check_finite=False).sum())


def _factor(centred: Tensor) -> Tensor:
    """A factor (k, d), k <= min(N, d), with the Gram matrix of the centred features (N, d)."""
    return centred if len(centred) <= centred.shape[1] else torch.linalg.qr(centred, mode="r")[1]


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Kernel of KID and KVD: (x.y / d + 1)^3 of all pairs."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def quadratic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Kernel of JEDi: (x.y / d)^2 of all pairs."""
    return (x @ y.T / x.shape[1]) ** 2


def kernel_distance(
    x: Features, y: Features, paired: bool = False, kernel: Kernel = cubic_kernel
) -> float:
    """Unbiased squared MMD of features (N, d) and (M, d); Bińkowski et al., 2018 (KID).

    Args:
        paired: x and y belong to the same prompts, in the same order. The cross term then leaves
            out pairs with equal prompts, just as the other terms leave out pairs of a clip with
            itself (Gretton et al., 2012, eq. 4). Otherwise the distance of equal distributions
            would be negative on average.

    Raises:
        ValueError: as `frechet_distance`, and if paired sets differ in size.
    """
    x, y = (features.double() for features in checked_features(x, y))
    if paired and len(x) != len(y):
        raise ValueError(
            f"{len(x)} and {len(y)} features cannot be paired; the numbers must be equal"
        )
    within = sum(_off_diagonal_mean(k) for k in (kernel(x, x), kernel(y, y)))
    cross = kernel(x, y)
    between = _off_diagonal_mean(cross) if paired else cross.mean()
    return _finite((within - 2 * between).item())


def biased_kernel_distance(x: Features, y: Features, kernel: Kernel = cubic_kernel) -> float:
    """Squared MMD with the pairs of a clip and itself: never negative, and larger for few clips.

    Gretton et al., 2012, eq. 5.
    """
    x, y = (features.double() for features in checked_features(x, y))
    return _finite((kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()).item())


def _off_diagonal_mean(k: Tensor) -> Tensor:
    return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))


def frechet_infinity(x: Tensor, y: Tensor, paired: bool, points: int = 15, draws: int = 4) -> float:
    """Fréchet distance extrapolated to infinitely many clips, which removes its bias.

    Intercept of the distance against 1 / n (Chong and Forsyth, 2020), for n from half of the clips
    to all. Both sets are cut to n, because both contribute bias.

    Args:
        paired: x and y belong to the same prompts, in the same order; both are cut to the same
            prompts.
        points: number of values of n.
        draws: random subsets per value of n, except the largest.

    Raises:
        ValueError: for fewer than 4 clips, and as `frechet_distance`.
    """
    largest = min(len(x), len(y))
    if largest < 4:
        raise ValueError(f"too few clips to extrapolate a distance: {largest}; at least 4 needed")
    draw = generator("frechet_infinity", len(x), len(y))
    counts = np.linspace(max(2, largest // 2), largest, points).round().astype(int)
    inverses, distances = [], []
    for n in np.unique(counts):
        for _ in range(draws if n < largest else 1):
            i = torch.randperm(len(x), generator=draw)[:n]
            j = i if paired else torch.randperm(len(y), generator=draw)[:n]
            inverses.append(1 / n)
            distances.append(frechet_distance(x[i], y[j]))
    return float(np.polyfit(inverses, distances, 1)[1])


def frechet_sd(x: Tensor, y: Tensor, paired: bool, resamples: int) -> float:
    """Bootstrap standard deviation of `frechet_distance` (Efron, 1979); paired sets jointly.

    Resampling repeats clips, which shifts all distances up. Their spread remains valid; their
    percentiles are not a confidence interval.
    """
    pairs = zip(*resampled(x, y, paired, resamples), strict=True)
    return float(np.std([frechet_distance(x[i], y[j]) for i, j in pairs], ddof=1))


def infinity_sd(x: Tensor, y: Tensor, paired: bool, resamples: int) -> float:
    """Bootstrap standard deviation of `frechet_infinity`.

    Each resample is extrapolated from two values of n (half of the clips and all), which is as
    precise as 15 values at a sixth of the cost.
    """
    pairs = zip(*resampled(x, y, paired, resamples), strict=True)
    limits = [frechet_infinity(x[i], y[j], paired, points=2, draws=8) for i, j in pairs]
    return float(np.std(limits, ddof=1))


def kernel_sd(
    x: Tensor, y: Tensor, paired: bool, resamples: int, kernel: Kernel = cubic_kernel
) -> float:
    """Bootstrap standard deviation of `kernel_distance`, by reweighting one matrix of kernels."""
    x, y = x.double(), y.double()
    i, j = resampled(x, y, paired, resamples)
    weights_x = one_hot(i, len(x)).sum(1).double()  # (resamples, N): how often each clip is drawn
    weights_y = one_hot(j, len(y)).sum(1).double()

    def mean(left: Tensor, k: Tensor, right: Tensor, off_diagonal: bool) -> Tensor:
        total = torch.einsum("rn,nm,rm->r", left, k, right)
        if off_diagonal:
            return (total - left @ k.diagonal()) / (len(k) * (len(k) - 1))
        return total / k.numel()

    distances = (
        mean(weights_x, kernel(x, x), weights_x, True)
        + mean(weights_y, kernel(y, y), weights_y, True)
        - 2 * mean(weights_x, kernel(x, y), weights_y, paired)
    )
    return distances.std().item()


def resampled(x: Tensor, y: Tensor, paired: bool, resamples: int) -> tuple[Tensor, Tensor]:
    """Indices of bootstrap resamples, (resamples, N) and (resamples, M); equal if paired."""
    draw = generator("bootstrap", len(x), len(y))
    i = torch.randint(len(x), (resamples, len(x)), generator=draw)
    return i, i if paired else torch.randint(len(y), (resamples, len(y)), generator=draw)


@np.errstate(over="ignore", invalid="ignore")
def checked_features(x: Features, y: Features) -> tuple[Tensor, Tensor]:
    """Both sets as float32 or float64 tensors on the CPU.

    Raises:
        ValueError: if they are not two sets of real, finite features with the same d >= 1.
    """
    x, y = _as_tensor(x), _as_tensor(y)
    if x.is_complex() or y.is_complex():
        raise ValueError("features are complex; they must be real")
    matrices = x.ndim == y.ndim == 2 and x.shape[1] == y.shape[1] >= 1
    if not matrices or min(len(x), len(y)) < 2:
        raise ValueError(
            "features must be (N, d) and (M, d) with N, M >= 2 and d >= 1; "
            f"found {tuple(x.shape)} and {tuple(y.shape)}"
        )
    x, y = (
        features if features.dtype in (torch.float32, torch.float64) else features.double()
        for features in (x, y)
    )
    if not np.isfinite(sum(features.numpy().sum(dtype=np.float64) for features in (x, y))):
        raise ValueError("features are not finite, or too large to add up")
    return x, y


def _as_tensor(features: Features) -> Tensor:
    if isinstance(features, Tensor):
        return features.detach().cpu()
    array = np.asarray(features)
    if array.dtype.kind not in "fiubc":
        raise ValueError(f"features are {array.dtype}; they must be numbers")
    return torch.from_numpy(np.ascontiguousarray(array))  # torch rejects negative strides


def _finite(distance: float) -> float:
    if not math.isfinite(distance):
        raise ValueError("features are too large: their distance is not finite")
    return distance
