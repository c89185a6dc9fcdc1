"""Fréchet and kernel distances: exact identities, the reference packages on the same features, extractors and their guards."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_bench.eval import fvd
from distill_bench.eval.fvd import (
    FVD,
    frechet_distance,
    frechet_infinity,
    frechet_sd,
    infinity_sd,
    kernel_distance,
    kernel_sd,
)
from torch import Tensor

from distill_bench.domain import controls
from distill_bench.evaluate import encoders
from distill_bench.evaluate.cache import batched, cached
from distill_bench.evaluate.extractors import Extractor, i3d_input, load_extractor
from distill_bench.evaluator import Clips, in_order_of
from distill_bench.networks.ranks import on_first_rank
from distill_bench.pretrain import fit_encoders
from distill_bench.store import files

EXACT = 1e-9


def normal(n: int, d: int, seed: int = 0, spectrum: bool = True) -> Tensor:
    """Features (n, d) of a spectrum like that of real ones, with a mean."""
    draw = torch.Generator().manual_seed(seed)
    scale = 1 / torch.arange(1, d + 1).sqrt() if spectrum else torch.ones(d)
    return (torch.randn(n, d, generator=draw) * scale + torch.rand(d, generator=draw)).double()


def spread(x: Tensor) -> float:
    return x.var(0).sum().item()


@pytest.mark.parametrize("n, d", [(300, 20), (40, 64)])
def test_identities_of_the_distance_hold_also_for_fewer_clips_than_features(n, d):
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
def test_a_symmetric_positive_map_moves_by_its_closed_form(n, d):
    """W2^2 of X and TX is |T mu - mu|^2 + tr (I - T) S (I - T): the covariances do not commute, so no shortcut passes."""
    x = normal(n, d)
    root = normal(d, d, 3, False) / d**0.5
    t = root @ root.T + 0.1 * torch.eye(d).double()
    away = t @ x.mean(0) - x.mean(0)
    rest = torch.eye(d).double() - t
    expected = away.square().sum() + torch.trace(rest @ torch.cov(x.T) @ rest)
    assert frechet_distance(x, x @ t) == pytest.approx(expected.item(), rel=EXACT)


def test_one_dimension_and_diagonal_covariances_have_their_formulas():
    x, y = normal(50, 1), 2 * normal(70, 1, 1)
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=EXACT)
    corners = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]).double()
    a, b = torch.tensor([1.0, 2, 3]).double(), torch.tensor([2.0, 0.5, 3]).double()
    expected = (a - b).square().sum() * 8 / 7
    assert frechet_distance(corners * a, corners * b) == pytest.approx(expected.item(), rel=EXACT)


@pytest.mark.parametrize("decay, from_gram", [(0.5, True), (1.2, True), (2.0, False), (4.0, False)])
def test_the_squares_of_gram_matrices_are_used_only_where_they_cost_nothing(decay, from_gram):
    """Features of a spectrum that falls as 1 / k^decay against others of it, against a multiple and against themselves.

    Gram matrices square the condition number; what is compared to squares nothing, in float64.
    """
    x, y = (
        torch.randn(400, 80, generator=torch.Generator().manual_seed(i)).double()
        / torch.arange(1, 81) ** decay
        for i in (0, 1)
    )
    for other in (y, 1.2 * x, x, y @ torch.linalg.qr(normal(80, 80, 2, False))[0]):
        a, b = x - x.mean(0), other - other.mean(0)
        factors = [torch.linalg.qr(each, mode="r")[1] for each in (a, b)]
        shared = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
        expected = (x.mean(0) - other.mean(0)).square().sum() + (
            a.square().sum() + b.square().sum() - 2 * shared
        ) / 399
        assert frechet_distance(x, other) == pytest.approx(expected.item(), abs=1e-10 * spread(x))
    found = fvd.root_trace(*(fvd.gram(each, each.mean(0).numpy()) for each in (x, 1.2 * x)))
    assert (found is not None) == from_gram


def packages() -> dict[str, object]:
    """Fréchet distance of two sets of features by each reference package."""
    pytest.importorskip("pytorch_fid")
    pytest.importorskip("cleanfid")
    pytest.importorskip("torch_fidelity")
    from cleanfid.fid import frechet_distance as clean
    from pytorch_fid.fid_score import calculate_frechet_distance as pytorch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    def moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)

    def torch_fidelity(x: Tensor, y: Tensor) -> float:
        found = fid_statistics_to_metric(
            fid_features_to_statistics(x), fid_features_to_statistics(y), False
        )
        return found["frechet_inception_distance"]

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
def test_the_distance_is_that_of_the_reference_packages(package, n, m, d, tolerance):
    x, y = normal(n, d), 1.2 * normal(m, d, 1)
    assert frechet_distance(x, y) == pytest.approx(packages()[package](x, y), rel=tolerance)


def test_the_kernel_distance_is_that_of_the_reference_packages():
    torch_fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    clean = pytest.importorskip("cleanfid.fid")
    from torchmetrics.image.kid import poly_mmd

    x, y = normal(120, 40), 1.2 * normal(120, 40, 1)
    mine = kernel_distance(x, y)
    k = [(a @ b.T / 40 + 1) ** 3 for a, b in ((x, x), (x, y), (y, y))]
    assert mine == pytest.approx(poly_mmd(x, y).item(), rel=EXACT)
    theirs = torch_fidelity.mmd2(*(each.numpy() for each in k))
    assert mine == pytest.approx(theirs, rel=EXACT)
    # clean-fid means subsets; one subset of every clip is the whole
    assert mine == pytest.approx(clean.kernel_distance(x.numpy(), y.numpy(), 1, 120), rel=EXACT)


def test_the_paired_kernel_distance_of_paired_sets_is_near_zero():
    """x and y share what a prompt gives: the cross term without those pairs is unbiased, with them it is below 0."""
    values = []
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        prompt = torch.randn(100, 8, generator=draw)
        x, y = (prompt + 0.1 * torch.randn(100, 8, generator=draw) for _ in range(2))
        values.append((kernel_distance(x, y, paired=True), kernel_distance(x, y)))
    paired, plain = np.array(values).T
    assert abs(paired.mean()) < 4 * paired.std() / 30**0.5
    assert plain.mean() < 10 * -plain.std() / 30**0.5


def test_the_distance_to_infinite_clips_has_lost_the_bias():
    """Gaussians that are 2 apart: the distance of 200 clips is far above 4, its limit is not."""
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


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(
    "distance, sd",
    [
        (lambda x, y, paired: frechet_distance(x, y), frechet_sd),
        (kernel_distance, kernel_sd),
        (frechet_infinity, infinity_sd),
    ],
)
def test_the_spread_of_the_bootstrap_is_the_spread_over_draws(distance, sd, paired):
    """Sets that are 2 apart; paired ones share half of their variance clip by clip."""
    draws = []
    for seed in range(40):
        x, y, prompt = torch.randn(3, 150, 10, generator=torch.Generator().manual_seed(seed))
        if paired:
            x, y = (x + prompt) / 2**0.5, (y + prompt) / 2**0.5
        y[:, 0] += 2
        draws.append((x, y))
    true = np.std([distance(x, y, paired) for x, y in draws], ddof=1)
    found = np.mean([sd(x, y, paired, 60) for x, y in draws[:6]])
    assert 0.7 * true < found < 1.5 * true


def test_the_spread_of_the_kernel_distance_is_the_resampled_one():
    """The matrix form against a loop over resampled sets."""
    x, y = normal(30, 5), normal(25, 5, 1)
    i, j = fvd._resampled(x, y, False, 20)
    loop = torch.tensor([kernel_distance(x[a], y[b]) for a, b in zip(i, j, strict=True)])
    assert kernel_sd(x, y, False, 20) == pytest.approx(loop.double().std().item(), rel=1e-5)


def test_features_may_be_arrays_and_of_any_precision():
    x, y = normal(30, 5).half(), normal(25, 5, 1).half()
    for distance in (frechet_distance, kernel_distance):
        expected = distance(x.double(), y.double())
        for kind in (x.float().requires_grad_(), x.numpy(), x.double().numpy(), x):
            assert distance(kind, y) == pytest.approx(expected, rel=EXACT)


def test_lists_are_of_double_precision_and_arrays_may_run_backwards():
    x, y = normal(30, 5), normal(25, 5, 1)
    for distance in (frechet_distance, kernel_distance):
        assert distance(x.tolist(), y.tolist()) == distance(x, y)
        assert distance(x.numpy(), y.numpy()[::-1]) == distance(x, y.flip(0))


@pytest.mark.parametrize("d", [5, 64])  # more and fewer clips than features
@pytest.mark.parametrize("size", [1e160, 1e307])
def test_features_whose_distance_is_not_finite_are_refused(size, d):
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="too large"):
            distance(size * normal(40, d), size * normal(40, d, 1))


def test_sets_of_unlike_size_are_no_pairs():
    with pytest.raises(ValueError, match="5 and 4 features are no pairs"):
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
        (torch.full((5, 3), torch.nan), torch.zeros(5, 3), "not finite"),
    ],
)
def test_features_that_are_none_are_refused(x, y, reason):
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match=reason):
            distance(x, y)


# Extractors


def clips(count: int = 24, first: int = 0, **more) -> Clips:
    frames, prompts = controls.rendered(count, first)
    return Clips(frames, prompts, list(range(first, first + count)), **more)


@pytest.mark.parametrize("name", [fvd.DEFAULT, fvd.SECOND])
def test_features_depend_on_neither_batch_nor_order_nor_cache(name, tmp_path, monkeypatch):
    extractor, some = load_extractor(name), clips(24, cache=tmp_path)
    features = extractor(some)
    assert torch.equal(extractor(some), features), "from the cache"
    assert len(list(tmp_path.iterdir())) == 1
    order = np.random.default_rng(0).permutation(24)
    shuffled = dataclasses.replace(some, frames=some.frames[order], cache=None)
    assert torch.allclose(extractor(shuffled), features[order], atol=1e-5)
    monkeypatch.setattr("distill_bench.evaluate.cache.BATCH", 7)
    assert torch.allclose(batched(extractor.net, some.frames, name), features, atol=1e-5)


def _raised(why: str) -> None:
    raise ValueError(why)


def _two_ranks(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    extractor, some = load_extractor(fvd.DEFAULT), clips(80)
    torch.save(extractor(some), Path(folder) / f"{rank}.pt")
    with pytest.raises(
        ValueError, match="the first rank's alone"
    ):  # and the other does not wait for it
        on_first_rank(lambda: _raised("the first rank's alone"))
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_same_bits_as_one(tmp_path):
    torch.multiprocessing.spawn(_two_ranks, (str(tmp_path),), nprocs=2)
    alone = load_extractor(fvd.DEFAULT)(clips(80))
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone)


def test_a_cache_of_other_clips_is_refused(tmp_path):
    extractor, some, other = (
        load_extractor(fvd.SECOND),
        clips(cache=tmp_path),
        clips(first=100, cache=tmp_path),
    )
    extractor(some)
    (mine,) = tmp_path.iterdir()
    extractor(other)
    (theirs,) = set(tmp_path.iterdir()) - {mine}
    theirs.write_bytes(mine.read_bytes())
    with pytest.raises(ValueError, match="was made from other clips"):
        extractor(other)


def test_a_torn_cache_is_made_again(tmp_path):
    some = clips(cache=tmp_path)
    made = cached("key", some, lambda: torch.ones(24, 2))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    assert torch.equal(cached("key", some, lambda: torch.ones(24, 2)), made)


def test_the_shipped_encoder_refuses_the_clips_that_it_was_trained_on():
    extractor = load_extractor(fvd.DEFAULT)
    with pytest.raises(ValueError, match="was trained on 4 of these clips"):
        extractor(clips(4, fit_encoders.TRAIN_KEYS))


def test_the_shipped_networks_are_those_of_their_cards():
    for name in (encoders.CLASSIFIER, encoders.FRAME_CLIP, encoders.VIDEO_CLIP):
        card = json.loads((encoders.FOLDER / f"{name}.json").read_text())
        assert files.sha256(encoders.FOLDER / f"{name}.safetensors") == card["sha256"]
    assert sum(p.stat().st_size for p in encoders.FOLDER.parent.rglob("*") if p.is_file()) < 8e6


def test_the_shipped_classifier_names_everything_on_held_out_clips():
    net, _, _ = encoders.load_encoder(encoders.Classifier(), encoders.CLASSIFIER)
    held_out, labels = fit_encoders.rendered(216, encoders.HELD_OUT_KEYS + 10_000)
    assert min(fit_encoders.classifier_accuracy(net, held_out, labels).values()) > 0.98


def test_the_stored_self_test_is_of_the_shipped_extractors_and_passes():
    """Frozen clips above 5 times the null, half speed above 2, shuffled frames above 3; and it can be made again."""
    stored = json.loads(fvd.SELF_TEST.read_text())
    for name in (fvd.DEFAULT, fvd.SECOND):
        assert stored[name]["extractor"] == f"{name}#{load_extractor(name).sha256}"
    ratios = {k: v["ratio"] for k, v in stored[fvd.DEFAULT]["corruptions"].items()}
    assert ratios["frozen"] > 5 and ratios["half speed"] > 2 and ratios["shuffled"] > 3
    assert all(v["z"] > 3 for v in stored[fvd.DEFAULT]["corruptions"].values())
    again = fvd.self_test(load_extractor(fvd.DEFAULT), 72, 2)["corruptions"]
    assert (
        again["frozen"]["ratio"] > 5
        and again["half speed"]["ratio"] > 2
        and again["shuffled"]["ratio"] > 3
    )


def fake_extractor(net, dim: int = 3, **more) -> Extractor:
    return Extractor("fake", 1, "0" * 64, dim, net, "none", **more)


@pytest.mark.parametrize(
    "net, reason",
    [
        (lambda x: torch.zeros(2 * len(x), 3), "gave 48 rows for 24 clips"),
        (lambda x: torch.zeros(len(x), 4), r"gave features \(24, 4\)"),
        (lambda x: torch.full((len(x), 3), torch.nan), "not finite"),
        (lambda x: torch.ones(len(x), 3), "constant features"),
    ],
)
def test_an_extractor_that_is_broken_is_found_out(net, reason):
    with pytest.raises(ValueError, match=reason):
        fake_extractor(net)(clips())


def test_unknown_extractors_and_missing_weights_are_clear_errors(tmp_path):
    for spec, reason in (
        ("i3d", "known: indomain-r2p1-cls, random-r2p1, i3d-k400-logits-400, videomae"),
        ("i3d-k400-logits-400", "by path: i3d-k400-logits-400:/path"),
        (f"i3d-k400-logits-400:{tmp_path}/none.pt", "no weights at"),
        (f"videomae:{tmp_path}", "needs a transformers folder"),
        (f"{tmp_path}/none.py:make", "no extractor at"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_extractor(spec)
    (tmp_path / "bad.pt").write_bytes(b"no torch script")
    with pytest.raises(ValueError, match="is no TorchScript file"):
        load_extractor(f"i3d-k400-logits-400:{tmp_path}/bad.pt")


def test_an_extractor_of_ones_own_comes_by_path(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from distill_bench.evaluate.extractors import Extractor\n"
        "def make():\n    return Extractor('mine', 1, '1' * 64, 3, lambda x: x.float().mean((1, 3, 4)), 'none')\n"
    )
    some = clips()
    assert load_extractor(f"{path}:make")(some).shape == (24, 3)
    scores = FVD(extractor=f"{path}:make", resamples=10).scores(some, {"teacher": clips(24, 100)})
    assert scores[0].extractor == "mine#11111111" and scores[0].title.startswith("FD[mine]")


class FakeI3D(torch.nn.Module):
    """The signature of the published file."""

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        assert not rescale and not resize and return_features
        assert x.shape[1] == 3 and x.shape[3] == 224 and x.shape[4] == 224 and x.abs().max() <= 1
        means = x.mean([3, 4]).flatten(1)
        return (
            torch.nn.functional.pad(means, [0, 400 - means.shape[1]])
            + torch.arange(400) * x.mean([1, 2, 3, 4])[:, None]
        )


def test_i3d_takes_frames_as_the_published_distances_do(tmp_path):
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(FakeI3D()).save(str(path))
    frames = np.random.default_rng(0).integers(0, 256, (4, 12, 3, 40, 56), dtype=np.uint8)
    some = Clips(frames, ["a"] * 4, [0, 1, 2, 3])
    extractor = load_extractor(f"i3d-k400-logits-400:{path}")
    assert extractor(some).shape == (4, 400)
    assert extractor.id_for(some) == f"i3d-k400-logits-400@T12#{extractor.sha256[:8]}"
    scores = FVD(extractor=f"i3d-k400-logits-400:{path}", resamples=5).scores(
        some, {"data": dataclasses.replace(some)}
    )
    assert scores[0].column == "fvd_data" and scores[0].title == "FVD, to data"
    assert "rank-deficient: 4 clips are fewer than the 400 features" in scores[0].warnings
    with pytest.raises(ValueError, match="takes 10 or more frames; the clips have 8"):
        extractor(dataclasses.replace(some, frames=frames[:, :8]))
    # as in cd-fvd, StyleGAN-V: per frame, bilinear, half-pixel centres, no antialiasing, (2 x / 255) - 1
    one = torch.from_numpy(frames[:1]).float() / 255
    byhand = (
        torch.stack(
            [
                torch.nn.functional.interpolate(f[None], (224, 224), mode="bilinear")[0]
                for f in one[0]
            ],
            1,
        )[None]
        * 2
        - 1
    )
    assert torch.allclose(i3d_input(torch.from_numpy(frames[:1])), byhand, atol=1e-6)


I3D = os.environ.get("DISTILL_BENCH_I3D", "")
needs_i3d = pytest.mark.skipif(
    not Path(I3D).is_file(), reason="DISTILL_BENCH_I3D names no i3d_torchscript.pt"
)


@needs_i3d
def test_i3d_of_zeros_and_ones_is_the_published_value():
    """JunyaoHu/common_metrics_on_video_quality: 8 clips of 30 frames of 64x64, black against white: 151.256."""
    extractor = load_extractor(f"i3d-k400-logits-400:{I3D}")
    black, white = (
        torch.full((8, 30, 3, 64, 64), value, dtype=torch.uint8).numpy() for value in (0, 255)
    )
    x, y = (batched(extractor.net, frames, "i3d") for frames in (black, white))
    assert frechet_distance(x, y) == pytest.approx(151.256, abs=0.01)


@needs_i3d
@pytest.mark.timeout(1200)
def test_i3d_of_random_clips_is_the_value_of_the_original_implementation():
    """universome/fvd-comparison, compare_metrics.py: uniform floats fed as they are; TensorFlow's and PyTorch's are 10.138085."""
    net = torch.jit.load(I3D).eval()

    def features(seed: int) -> Tensor:
        found = []
        for clip in np.random.RandomState(seed).rand(128, 16, 224, 224, 3).astype(np.float32):
            with torch.no_grad():
                x = torch.from_numpy(clip).permute(3, 0, 1, 2)[None]
                found.append(
                    net(x, rescale=False, resize=False, return_features=True).reshape(1, 400)
                )
        return torch.cat(found)

    assert frechet_distance(features(1), features(2)) == pytest.approx(10.138085, abs=1e-3)


@pytest.mark.parametrize("frames", [4, 8])
def test_videomae_comes_from_a_folder_and_takes_its_own_number_of_frames(tmp_path, frames):
    from transformers import VideoMAEConfig, VideoMAEModel

    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=32,
        patch_size=16,
        num_frames=4,
        tubelet_size=2,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    VideoMAEModel(config).save_pretrained(tmp_path / "tiny")
    extractor = load_extractor(f"videomae:{tmp_path / 'tiny'}")
    some = clips(6)
    some = dataclasses.replace(some, frames=some.frames[:, :frames])
    if frames == 8:
        with pytest.raises(ValueError, match="takes 4 frames; the clips have 8"):
            extractor(some)
        return
    features = extractor(some)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (torch.from_numpy(some.frames).float() / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        model = VideoMAEModel.from_pretrained(tmp_path / "tiny").eval()
        expected = model(pixel_values=x).last_hidden_state.mean(1)
    assert torch.allclose(features, expected, atol=1e-4)
    assert extractor.id_for(some).startswith("videomae-tiny#")


def test_videomae_of_other_means_is_another_and_one_without_weights_is_none(tmp_path):
    """The means are no weights, and yet a cache of features made with others must not be found."""
    from safetensors.torch import load_file, save_file
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(
        image_size=32,
        patch_size=16,
        num_frames=4,
        tubelet_size=2,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    for name in ("a", "b", "c"):
        torch.manual_seed(0)
        VideoMAEModel(config).save_pretrained(tmp_path / name)
    (tmp_path / "b" / "preprocessor_config.json").write_text(
        '{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}'
    )
    a, b = (load_extractor(f"videomae:{tmp_path / name}") for name in "ab")
    assert a.sha256 != b.sha256
    weights = load_file(tmp_path / "c" / "model.safetensors")
    weights.pop(min(weights))
    save_file(weights, tmp_path / "c" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of a VideoMAE"):
        load_extractor(f"videomae:{tmp_path / 'c'}")


def test_large_clips_go_through_a_network_a_few_at_a_time(monkeypatch):
    some, sizes = clips(8), []

    def net(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x.float().mean((1, 3, 4))

    monkeypatch.setattr("distill_bench.evaluate.cache.VALUES", 3 * some.frames[0].size)
    batched(net, some.frames, "some")
    assert sizes == [3, 3, 2]


# The evaluator


def by_column(scores) -> dict[str, object]:
    return {score.column: score for score in scores}


def test_known_good_is_nearer_than_known_bad():
    reference, other, mine = clips(72, 1000), clips(72, 2000), clips(72)
    references = {"teacher": reference, "teacher_other": other, "data": other}
    noise = np.random.default_rng(0).integers(0, 256, mine.frames.shape, dtype=np.uint8)
    sets = [mine.frames, controls.backwards(mine.frames), controls.frozen(mine.frames), noise]
    rows = [
        by_column(FVD(resamples=5).scores(dataclasses.replace(mine, frames=f), references))
        for f in sets
    ]
    for column in ("fvd", "fvd_data", "fvd_over_floor", "fvd_infinity"):
        values = [row[column].value for row in rows]
        assert values == sorted(values), column
    assert rows[0]["fvd_random"].value < rows[2]["fvd_random"].value < rows[3]["fvd_random"].value
    assert rows[0]["fvd_over_floor"].value < 2 < rows[2]["fvd_over_floor"].value
    assert rows[0]["fvd"].headline and not any(s.headline for c, s in rows[0].items() if c != "fvd")
    assert any("72 clips are few" in w for w in rows[0]["fvd"].warnings)


def reordered(some: Clips, order) -> Clips:
    return dataclasses.replace(
        some,
        frames=some.frames[order],
        prompts=[some.prompts[i] for i in order],
        seeds=[some.seeds[i] for i in order],
    )


def test_the_order_of_clips_is_of_no_matter():
    """Two clips a prompt, those of a prompt swapped as well; features to the rounding of other batches."""
    two = [
        dataclasses.replace(c, prompts=[c.prompts[i // 2] for i in range(36)])
        for c in (clips(36), clips(36, 1000))
    ]
    mine, reference = (dataclasses.replace(each, seeds=list(range(36))) for each in two)
    expected = by_column(FVD(resamples=10).scores(mine, {"teacher": reference}))
    for order in (np.random.default_rng(0).permutation(36), np.arange(36) ^ 1):
        found = by_column(FVD(resamples=10).scores(reordered(mine, order), {"teacher": reference}))
        for column, score in expected.items():
            assert found[column].value == pytest.approx(score.value, rel=1e-3, abs=1e-5), column
            assert score.sd is None or found[column].sd == pytest.approx(score.sd, rel=1e-3), column
        assert not any("unpaired" in w for score in found.values() for w in score.warnings)
    turned = reordered(mine, np.arange(36)[::-1]), reordered(reference, np.arange(36)[::-1])
    again = by_column(FVD(resamples=10).scores(turned[0], {"teacher": turned[1]}))
    assert again["kvd"].value == pytest.approx(expected["kvd"].value, rel=1e-3, abs=1e-5)


def test_clips_in_the_order_of_the_reference_keep_it():
    """The harness's order, two seeds a prompt and no order of letters, with other seeds in the reference too."""
    mine = clips(6)
    mine = dataclasses.replace(mine, prompts=["c", "a", "b"] * 2)
    for first in (0, 1000):
        assert in_order_of(
            dataclasses.replace(mine, seeds=list(range(first, first + 6))), mine
        ) == list(range(6))


@pytest.mark.parametrize("prompts", [[""] * 24, ["x"] * 24, [*clips().prompts[:-1], ""]])
def test_what_is_not_paired_says_so(prompts):
    other = dataclasses.replace(clips(24, 1000), prompts=prompts)
    for some, reference in ((clips(), other), (other, clips())):
        found = by_column(FVD(resamples=5).scores(some, {"teacher": reference}))
        assert {c for c, s in found.items() if any("unpaired" in w for w in s.warnings)} == {
            "fvd",
            "kvd",
            "fvd_infinity",
        }


def test_a_floor_of_the_references_own_clips_is_refused():
    some, reference, other = clips(12), clips(12, 1000), clips(12, 2000)
    one_shared = dataclasses.replace(
        other, frames=np.concatenate([reference.frames[3:4], other.frames[1:]])
    )
    for floor in (reference, reordered(reference, np.arange(12)[::-1]), one_shared):
        with pytest.raises(
            ValueError,
            match="teacher_other holds the same clips as teacher: give clips of other seeds",
        ):
            FVD(resamples=5).scores(some, {"teacher": reference, "teacher_other": floor})


def test_a_floor_of_rounding_is_refused(tmp_path):
    """Clips that differ where the extractor does not look."""
    path = tmp_path / "blind.py"
    path.write_text(
        "from distill_bench.evaluate.extractors import Extractor\n"
        "def make():\n    return Extractor('blind', 1, '1' * 64, 3, lambda x: x[..., 1:].float().mean((1, 3, 4)), 'none')\n"
    )
    some, reference = clips(12), clips(12, 1000)
    frames = reference.frames.copy()
    frames[..., 0] ^= 1
    floor = dataclasses.replace(reference, frames=frames)
    with pytest.raises(ValueError, match="it must be above rounding"):
        FVD(extractor=f"{path}:make", resamples=5).scores(
            some, {"teacher": reference, "teacher_other": floor}
        )


def test_copies_and_ones_own_reference_are_recorded():
    reference = clips(12, 1000)
    own = by_column(FVD(resamples=5).scores(reference, {"teacher": reference}))["fvd"]
    assert abs(own.value) < 1e-9 and any("0 by construction" in w for w in own.warnings)
    copied = dataclasses.replace(reference, frames=reference.frames[[0] * 6 + list(range(6))])
    found = by_column(FVD(resamples=5).scores(copied, {"teacher": reference}))["fvd"]
    assert any("6 of 12 clips are copies" in w for w in found.warnings)
    with pytest.raises(ValueError, match="6 of the 12 clips of the teacher reference are copies"):
        FVD(resamples=5).scores(reference, {"teacher": copied})


def test_all_clips_alike_is_a_score_and_no_crash():
    reference = clips(12, 1000)
    one = dataclasses.replace(reference, frames=reference.frames[[0] * 12])
    assert by_column(FVD(resamples=5).scores(one, {"teacher": reference}))["fvd"].value > 1
