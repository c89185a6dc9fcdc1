"""Fréchet and kernel distances: identities, closed forms, the reference packages, bad input."""

import numpy as np
import pytest
import torch
from torch import Tensor

from distill_bench.draws import generator
from distill_bench.evaluate import distances
from distill_bench.evaluate.distances import (
    biased_kernel_distance,
    checked_features,
    frechet_distance,
    frechet_infinity,
    frechet_sd,
    gram,
    infinity_sd,
    kernel_distance,
    kernel_sd,
    quadratic_kernel,
    resampled,
    root_trace,
)

EXACT = 1e-9


def normal(n: int, d: int, seed: int = 0, spectrum: bool = True) -> Tensor:
    """Features (n, d) with a nonzero mean and, by default, a falling spectrum like real ones."""
    draw = torch.Generator().manual_seed(seed)
    scale = 1 / torch.arange(1, d + 1).sqrt() if spectrum else torch.ones(d)
    return (torch.randn(n, d, generator=draw) * scale + torch.rand(d, generator=draw)).double()


def spread(x: Tensor) -> float:
    return x.var(0).sum().item()


@pytest.mark.parametrize("n, d", [(300, 20), (40, 64)])
def test_identities_of_the_frechet_distance_hold_even_for_fewer_clips_than_features(n, d):
    x = normal(n, d)
    mean = x.mean(0)
    shift = normal(1, d, 5)[0]
    assert abs(frechet_distance(x, x)) <= EXACT * spread(x)
    assert abs(frechet_distance(x, x[torch.randperm(n)])) <= EXACT * spread(x)
    assert frechet_distance(x, x + shift) == pytest.approx(shift.square().sum().item(), rel=EXACT)
    grown = 0.49 * (spread(x) + mean.square().sum().item())
    assert frechet_distance(x, 0.3 * x) == pytest.approx(grown, rel=EXACT)
    y = normal(n, d, 1)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=EXACT)
    rotation = torch.linalg.qr(normal(d, d, 2, False))[0]
    assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(
        frechet_distance(x, y), rel=EXACT
    )


@pytest.mark.parametrize("n, d", [(300, 20), (40, 64)])
def test_the_distance_to_a_symmetric_positive_map_is_the_closed_form(n, d):
    """W2^2 of X and TX is |T mu - mu|^2 + tr (I - T) S (I - T).

    The covariances do not commute, so a product of their roots would fail.
    """
    x = normal(n, d)
    root = normal(d, d, 3, False) / d**0.5
    t = root @ root.T + 0.1 * torch.eye(d).double()
    away = t @ x.mean(0) - x.mean(0)
    rest = torch.eye(d).double() - t
    expected = away.square().sum() + torch.trace(rest @ torch.cov(x.T) @ rest)
    assert frechet_distance(x, x @ t) == pytest.approx(expected.item(), rel=EXACT)


def test_the_distance_in_one_dimension_and_of_diagonal_covariances_is_the_closed_form():
    x, y = normal(50, 1), 2 * normal(70, 1, 1)
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=EXACT)
    corners = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]).double()
    a, b = torch.tensor([1.0, 2, 3]).double(), torch.tensor([2.0, 0.5, 3]).double()
    expected = (a - b).square().sum() * 8 / 7
    assert frechet_distance(corners * a, corners * b) == pytest.approx(expected.item(), rel=EXACT)


@pytest.mark.parametrize("decay, from_gram", [(0.5, True), (1.2, True), (2.0, False), (4.0, False)])
def test_ill_conditioned_gram_matrices_fall_back_to_singular_values(decay, from_gram):
    """Spectrum 1 / k^decay: features against new draws, a multiple, themselves and a rotation.

    Gram matrices square the condition number. The expected value uses factors in float64 and
    squares nothing.
    """
    x, y = (
        torch.randn(400, 80, generator=torch.Generator().manual_seed(i)).double()
        / torch.arange(1, 81) ** decay
        for i in (0, 1)
    )
    for other in (y, 1.2 * x, x, y @ torch.linalg.qr(normal(80, 80, 2, False))[0]):
        a, b = x - x.mean(0), other - other.mean(0)
        factors = [torch.linalg.qr(centred, mode="r")[1] for centred in (a, b)]
        shared = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
        expected = (x.mean(0) - other.mean(0)).square().sum() + (
            a.square().sum() + b.square().sum() - 2 * shared
        ) / 399
        assert frechet_distance(x, other) == pytest.approx(expected.item(), abs=1e-10 * spread(x))
    root = root_trace(*(gram(z, z.mean(0).numpy()) for z in (x, 1.2 * x)))
    assert (root is not None) == from_gram


def packages() -> dict[str, object]:
    """Each reference package's Fréchet distance of two sets of features."""
    from cleanfid.fid import frechet_distance as clean
    from pytorch_fid.fid_score import calculate_frechet_distance as pytorch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    def moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)

    def torch_fidelity(x: Tensor, y: Tensor) -> float:
        statistics = fid_features_to_statistics(x), fid_features_to_statistics(y)
        return fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]

    return {
        "pytorch-fid": lambda x, y: pytorch(*moments(x), *moments(y)),
        "clean-fid": lambda x, y: clean(*moments(x), *moments(y)),
        "torch-fidelity": torch_fidelity,
        "torchmetrics": torchmetrics_distance,
    }


def torchmetrics_distance(x: Tensor, y: Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    net = torch.nn.Identity()
    net.num_features = x.shape[1]
    metric = FrechetInceptionDistance(feature=net).set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    return metric.compute().item()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("package", ["pytorch-fid", "clean-fid", "torch-fidelity", "torchmetrics"])
@pytest.mark.parametrize(
    "n, m, d, tolerance", [(1024, 1024, 64, 1e-6), (500, 300, 64, 1e-6), (100, 120, 160, 1e-5)]
)
def test_the_frechet_distance_agrees_with_the_reference_packages(package, n, m, d, tolerance):
    x, y = normal(n, d), 1.2 * normal(m, d, 1)
    assert frechet_distance(x, y) == pytest.approx(packages()[package](x, y), rel=tolerance)


def test_the_kernel_distance_agrees_with_the_reference_packages():
    from cleanfid.fid import kernel_distance as clean
    from torch_fidelity.metric_kid import mmd2
    from torchmetrics.image.kid import poly_mmd

    x, y = normal(120, 40), 1.2 * normal(120, 40, 1)
    distance = kernel_distance(x, y)
    k = [(a @ b.T / 40 + 1) ** 3 for a, b in ((x, x), (x, y), (y, y))]
    assert distance == pytest.approx(poly_mmd(x, y).item(), rel=EXACT)
    expected = mmd2(*(matrix.numpy() for matrix in k))
    assert distance == pytest.approx(expected, rel=EXACT)
    # clean-fid averages over subsets; a single subset of all clips is the whole set
    expected = clean(x.numpy(), y.numpy(), 1, 120)
    assert distance == pytest.approx(expected, rel=EXACT)


def test_the_biased_kernel_distance_is_that_of_the_mean_features_of_its_kernel():
    """Products of two entries of x, or of three entries of (x, 1)."""
    x, y = normal(12, 3), normal(9, 3, 1)
    pairs = [torch.einsum("ni,nj->ij", z, z) / 3 / len(z) for z in (x, y)]
    grown = [torch.cat([z / 3**0.5, torch.ones(len(z), 1)], 1) for z in (x, y)]
    triples = [torch.einsum("ni,nj,nk->ijk", z, z, z) / len(z) for z in grown]
    for kernel, means in (({"kernel": quadratic_kernel}, pairs), ({}, triples)):
        expected = (means[0] - means[1]).square().sum().item()
        assert biased_kernel_distance(x, y, **kernel) == pytest.approx(expected, rel=1e-6)
        assert biased_kernel_distance(x, x, **kernel) == pytest.approx(0, abs=1e-12)
        single, double = (
            biased_kernel_distance(*z, **kernel)
            for z in ((x.float(), y.float()), (x.float().double(), y.float().double()))
        )
        assert single == pytest.approx(double, rel=1e-12)


def test_the_paired_kernel_distance_of_paired_sets_is_unbiased():
    """Clips of one prompt share a component. Unpaired, the distance would be negative."""
    values = []
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        prompt = torch.randn(100, 8, generator=draw)
        x, y = (prompt + 0.1 * torch.randn(100, 8, generator=draw) for _ in range(2))
        values.append((kernel_distance(x, y, paired=True), kernel_distance(x, y)))
    paired, plain = np.array(values).T
    assert abs(paired.mean()) < 4 * paired.std() / 30**0.5
    assert plain.mean() < 10 * -plain.std() / 30**0.5


def test_extrapolation_to_infinite_clips_removes_the_bias():
    """Gaussians 2 apart: the distance of 200 clips is far above 4, the extrapolation is not."""
    limits, plain = [], []
    for seed in range(6):
        x, y = (
            torch.randn(200, 30, generator=torch.Generator().manual_seed(2 * seed + i))
            for i in range(2)
        )
        y[:, 0] += 2
        limits.append(frechet_infinity(x, y, paired=False))
        plain.append(frechet_distance(x, y))
    assert np.mean(plain) > 5.5
    assert abs(np.mean(limits) - 4) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(
    "distance, sd",
    [
        (lambda x, y, paired: frechet_distance(x, y), frechet_sd),
        (kernel_distance, kernel_sd),
        (frechet_infinity, infinity_sd),
    ],
)
def test_the_bootstrap_sd_is_the_sd_over_independent_draws(distance, sd, paired):
    """The sets are 2 apart; paired sets share half of their variance clip by clip."""
    draws = []
    for seed in range(40):
        x, y, prompt = torch.randn(3, 150, 10, generator=torch.Generator().manual_seed(seed))
        if paired:
            x, y = (x + prompt) / 2**0.5, (y + prompt) / 2**0.5
        y[:, 0] += 2
        draws.append((x, y))
    true = np.std([distance(x, y, paired) for x, y in draws], ddof=1)
    bootstrap = np.mean([sd(x, y, paired, 60) for x, y in draws[:6]])
    assert 0.7 * true < bootstrap < 1.5 * true


@pytest.mark.parametrize("paired, m", [(False, 25), (True, 30)])
def test_the_sd_equals_that_of_a_loop_over_resamples(paired, m):
    """The kernel's by reweighting; extrapolations from half of the clips and all."""
    x, y = normal(30, 5), normal(m, 5, 1)
    pairs = list(zip(*resampled(x, y, paired, 12), strict=True))
    for sd, distance in (
        (frechet_sd, lambda x, y: frechet_distance(x, y)),
        (kernel_sd, lambda x, y: kernel_distance(x, y, paired)),
        (infinity_sd, lambda x, y: frechet_infinity(x, y, paired, points=2, draws=8)),
    ):
        loop = np.std([distance(x[i], y[j]) for i, j in pairs], ddof=1)
        assert sd(x, y, paired, 12) == pytest.approx(loop, rel=1e-5)
    assert kernel_sd(x.float(), y.float(), paired, 12) == pytest.approx(
        kernel_sd(x.float().double(), y.float().double(), paired, 12), rel=1e-9
    )


def test_resamples_draw_with_replacement_and_pairs_together():
    x, y = torch.zeros(40, 1), torch.zeros(30, 1)
    i, j = resampled(x, y, False, 50)
    assert i.shape == (50, 40) and j.shape == (50, 30)
    assert set(i.unique().tolist()) == set(range(40)) and set(j.unique().tolist()) == set(range(30))
    assert all(len(draw.unique()) < 40 for draw in i), "clips repeat"
    stream = generator("bootstrap", 40, 30)  # shared with no other draw
    assert torch.equal(i, torch.randint(40, (50, 40), generator=stream))
    assert torch.equal(j, torch.randint(30, (50, 30), generator=stream))
    assert not torch.equal(i[0], i[1])
    i, j = resampled(x, x, True, 5)
    assert torch.equal(i, j)
    i, j = resampled(x, x, False, 5)
    assert not torch.equal(i, j)


@pytest.mark.parametrize("paired", [False, True])
def test_the_extrapolation_goes_from_half_of_the_clips_to_all(paired, monkeypatch):
    """Its distances are of subsets without repeats; they are linear in 1 / n here."""
    subsets = []

    def linear(x, y):
        subsets.append((x[:, 0].tolist(), y[:, 0].tolist()))
        return 3.0 + 7.0 / len(x)

    monkeypatch.setattr(distances, "frechet_distance", linear)
    x = torch.arange(20.0)[:, None]
    y = torch.arange(20.0 if paired else 26.0)[:, None]
    assert frechet_infinity(x, y, paired, points=6, draws=3) == pytest.approx(3.0)
    assert [len(i) for i, _ in subsets] == [n for n in (10, 12, 14, 16, 18) for _ in range(3)] + [
        20
    ]
    for i, j in subsets:
        assert len(i) == len(j) == len(set(i)) == len(set(j))
        assert (i == j) == paired
    stream = generator("frechet_infinity", len(x), len(y))  # shared with no other draw
    assert subsets[0][0] == torch.randperm(20, generator=stream)[:10].tolist()
    assert subsets[0] != subsets[1] and len({tuple(j) for _, j in subsets}) == len(subsets)
    for times, counts in ((1, 11), (5, 15)):  # of the 15 values of n, those that differ
        subsets.clear()
        frechet_infinity(x.repeat(times, 1), y.repeat(times, 1), paired)
        assert len(subsets) == 4 * (counts - 1) + 1, "four draws of each"
    for n, m, counts in ((4, 4, [2, 3, 4]), (7, 8, [3, 4, 5, 6, 7])):
        subsets.clear()
        frechet_infinity(x[:n], y[:m], paired and n == m)
        assert sorted({len(i) for i, _ in subsets}) == counts
    if not paired:  # clips beyond the number of the other set take part, too
        frechet_infinity(y, x, paired)
        assert max(max(i) for i, _ in subsets) == 25.0
    with pytest.raises(ValueError, match="3; at least 4 needed"):
        frechet_infinity(x[:3], y[:4], False)


def test_paired_subsets_are_of_the_same_prompts():
    """A shift of every clip is the distance of every paired subset."""
    x = normal(30, 3)
    shifted = x + torch.tensor([3.0, 0.0, 4.0])
    assert frechet_infinity(x, shifted, paired=True) == pytest.approx(25.0, rel=1e-6)
    assert frechet_infinity(x, shifted, paired=False) != pytest.approx(25.0, rel=1e-3)


def test_a_gram_matrix_is_summed_in_blocks_in_double_precision():
    x = normal(50, 6).float()
    mean = x.double().mean(0).numpy()
    centred = x.double().numpy() - mean
    for rows in (7, 50, 8192):
        total = gram(x, mean, rows)
        assert total.dtype == np.float64
        np.testing.assert_allclose(np.triu(total), np.triu(centred.T @ centred), rtol=1e-6)


def test_single_precision_features_have_double_precision_moments():
    """Around a mean of 1000, single precision would keep two digits of the spread."""
    x = (normal(3000, 4) + 1000).float()
    y = (1.5 * normal(3000, 4, 1) + 1000).float()
    expected = frechet_distance(x.double(), y.double())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x[:3], y[:3]) == pytest.approx(
        frechet_distance(x[:3].double(), y[:3].double()), rel=1e-3
    )


def test_features_may_be_tensors_or_arrays_of_any_precision():
    x, y = normal(30, 5).half(), normal(25, 5, 1).half()
    for distance in (frechet_distance, kernel_distance):
        expected = distance(x.double(), y.double())
        for kind in (x.float().requires_grad_(), x.numpy(), x.double().numpy(), x):
            assert distance(kind, y) == pytest.approx(expected, rel=EXACT)


def test_two_clips_of_integers_are_enough():
    x, y = checked_features([[1, 2], [3, 4]], np.array([[True, False], [True, True]]))
    assert x.tolist() == [[1, 2], [3, 4]] and y.tolist() == [[1, 0], [1, 1]]
    assert x.dtype == y.dtype == torch.float64
    # the sum is beyond single precision
    single = checked_features(torch.full((9, 1), 1e38), np.full((9, 1), 3e38, np.float32))
    assert {features.dtype for features in single} == {torch.float32}


def test_lists_are_read_in_double_precision_and_reversed_arrays_are_accepted():
    x, y = normal(30, 5), normal(25, 5, 1)
    for distance in (frechet_distance, kernel_distance):
        assert distance(x.tolist(), y.tolist()) == distance(x, y)
        assert distance(x.numpy(), y.numpy()[::-1]) == distance(x, y.flip(0))


@pytest.mark.parametrize("d", [5, 64])  # more and fewer clips than features
@pytest.mark.parametrize("size", [1e160, 1e307])
def test_features_too_large_for_a_finite_distance_are_refused(size, d):
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="too large"):
            distance(size * normal(40, d), size * normal(40, d, 1))


def test_finite_parts_with_too_large_a_sum_are_refused():
    """The spread and the distance of the means, or the sums of both sets."""
    apart, still = 1e154 * np.array([[[0.8, 0, 0], [-0.8, 0, 0]], [[0, 1, 0], [0, 1, 0]]])
    half = np.full((2, 1), 5e307)
    for sets, reason in (((apart, still), "their distance"), ((half, half), "to add up")):
        with pytest.raises(ValueError, match=reason):
            frechet_distance(*sets)


def test_sets_of_different_size_cannot_be_paired():
    with pytest.raises(ValueError, match="5 and 4 features cannot be paired"):
        kernel_distance(normal(5, 3), normal(4, 3), paired=True)


@pytest.mark.parametrize(
    "x, y, reason",
    [
        (torch.zeros(5, 0), torch.zeros(5, 0), "d >= 1"),
        (torch.zeros(5, 3, dtype=torch.complex64), torch.zeros(5, 3), "complex"),
        (np.zeros((5, 3), complex), np.zeros((5, 3)), "complex"),
        (np.full((5, 3), "a"), np.zeros((5, 3)), "must be numbers"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "features must be"),
        (torch.zeros(1, 3), torch.zeros(5, 3), "features must be"),
        (torch.zeros(5), torch.zeros(5), "features must be"),
        (torch.zeros(5, 3), torch.zeros(1, 3), "features must be"),
        (torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.complex64), "complex"),
        (torch.zeros(5, 3, 1), torch.zeros(5, 3, 1), "features must be"),
        (torch.zeros(5, 3), torch.zeros(5), "features must be"),
        (torch.full((5, 3), torch.nan), torch.zeros(5, 3), "not finite"),
        (torch.zeros(5, 3), torch.full((5, 3), torch.inf), "not finite"),
    ],
)
def test_invalid_features_are_refused(x, y, reason):
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match=reason):
            distance(x, y)
