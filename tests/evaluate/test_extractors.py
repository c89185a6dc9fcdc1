"""Extractors: batches, ranks and caches change no bit; misuse is refused."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from distill_bench.domain import controls
from distill_bench.evaluate import encoders
from distill_bench.evaluate.cache import batched, cached
from distill_bench.evaluate.distances import frechet_distance
from distill_bench.evaluate.extractors import Extractor, i3d_input, load_extractor
from distill_bench.evaluator import Clips
from distill_bench.networks.ranks import on_first_rank
from distill_bench.pretrain import fit_encoders
from distill_bench.store import files

SHIPPED = (encoders.CLASSIFIER, "random-r2p1")


def clips(count: int = 24, first: int = 0, **more) -> Clips:
    frames, prompts = controls.rendered(count, first)
    return Clips(frames, prompts, list(range(first, first + count)), **more)


@pytest.mark.parametrize("name", SHIPPED)
def test_features_do_not_depend_on_batch_order_or_cache(name, tmp_path, monkeypatch):
    extractor, sample = load_extractor(name), clips(24, cache=tmp_path)
    features = extractor(sample)
    assert torch.equal(extractor(sample), features), "not the cached features"
    assert len(list(tmp_path.iterdir())) == 1
    order = np.random.default_rng(0).permutation(24)
    shuffled = dataclasses.replace(sample, frames=sample.frames[order], cache=None)
    assert torch.allclose(extractor(shuffled), features[order], atol=1e-5)
    monkeypatch.setattr("distill_bench.evaluate.cache.BATCH", 7)
    assert torch.allclose(batched(extractor.net, sample.frames, name), features, atol=1e-5)


def _fail_on_rank_0() -> None:
    raise ValueError("raised by rank 0")


def _two_ranks(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(load_extractor(encoders.CLASSIFIER)(clips(80)), Path(folder) / f"{rank}.pt")
    with pytest.raises(ValueError, match="raised by rank 0"):  # on both ranks: none waits
        on_first_rank(_fail_on_rank_0)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_the_bits_of_one(tmp_path):
    torch.multiprocessing.spawn(_two_ranks, (str(tmp_path),), nprocs=2)
    alone = load_extractor(encoders.CLASSIFIER)(clips(80))
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone)


def test_a_cache_of_other_clips_is_refused(tmp_path):
    extractor = load_extractor("random-r2p1")
    sample, other = clips(cache=tmp_path), clips(first=100, cache=tmp_path)
    extractor(sample)
    (sample_file,) = tmp_path.iterdir()
    extractor(other)
    (other_file,) = set(tmp_path.iterdir()) - {sample_file}
    other_file.write_bytes(sample_file.read_bytes())
    with pytest.raises(ValueError, match="was made from other clips"):
        extractor(other)


def test_a_torn_cache_file_is_replaced(tmp_path):
    sample = clips(cache=tmp_path)
    features = cached("key", sample, lambda: torch.ones(24, 2))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    assert torch.equal(cached("key", sample, lambda: torch.ones(24, 2)), features)


def test_the_shipped_classifier_refuses_its_training_clips():
    extractor = load_extractor(encoders.CLASSIFIER)
    train = fit_encoders.LabelledClips.rendered(4, fit_encoders.TRAIN_KEYS)
    with pytest.raises(ValueError, match="was trained on 4 of these clips"):
        extractor(Clips(train.frames, train.captions(False), list(range(4))))


def test_the_shipped_networks_match_their_cards_and_stay_small():
    for name in (encoders.CLASSIFIER, encoders.FRAME_CLIP, encoders.VIDEO_CLIP):
        card = json.loads((encoders.FOLDER / f"{name}.json").read_text())
        assert files.sha256(encoders.FOLDER / f"{name}.safetensors") == card["sha256"]
    assert sum(p.stat().st_size for p in encoders.FOLDER.parent.rglob("*") if p.is_file()) < 8e6


def test_the_shipped_classifier_reads_attributes_and_motion_of_held_out_clips():
    net, _, _ = encoders.load_encoder(encoders.Classifier(), encoders.CLASSIFIER)
    held_out = fit_encoders.LabelledClips.rendered(216, fit_encoders.HELD_OUT_KEYS + 10_000)
    quality = fit_encoders.classifier_quality(net, held_out)
    for way in ("", "_backwards"):
        assert min(quality[f"{name}{way}"] for name in ("colour", "shape", "speed")) > 0.98
        assert quality[f"velocity_rmse{way}"] < 0.15, "pixels per frame"
        assert quality[f"heading_rmse{way}"] < 0.15


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
def test_malformed_features_are_refused(net, reason):
    with pytest.raises(ValueError, match=reason):
        fake_extractor(net)(clips())


def test_unknown_extractors_and_missing_weights_are_named(tmp_path):
    for spec, reason in (
        ("i3d", "known: indomain-r2p1-cls, random-r2p1, i3d-k400-logits-400, videomae"),
        ("i3d-k400-logits-400", "write i3d-k400-logits-400:/path"),
        (f"i3d-k400-logits-400:{tmp_path}/none.pt", "no weights at"),
        (f"videomae:{tmp_path}", "needs a transformers folder"),
        (f"{tmp_path}/none.py:make", "no extractor at"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_extractor(spec)
    (tmp_path / "bad.pt").write_bytes(b"no torch script")
    with pytest.raises(ValueError, match="is not a TorchScript file"):
        load_extractor(f"i3d-k400-logits-400:{tmp_path}/bad.pt")


MEAN_COLOUR = """
from distill_bench.evaluate.extractors import Extractor

def make():
    return Extractor("own", 1, "1" * 64, 3, lambda x: x.float().mean((1, 3, 4)), "none")
"""


def test_a_users_extractor_is_loaded_by_path(tmp_path):
    (tmp_path / "own.py").write_text(MEAN_COLOUR)
    extractor = load_extractor(f"{tmp_path}/own.py:make")
    assert extractor(clips()).shape == (24, 3)
    assert extractor.id_for(clips()) == "own#11111111" and len(extractor.code) == 64


class FakeI3D(torch.nn.Module):
    """Network with the signature of the published file."""

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


def test_i3d_gets_frames_preprocessed_as_in_published_distances(tmp_path):
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(FakeI3D()).save(str(path))
    frames = np.random.default_rng(0).integers(0, 256, (4, 12, 3, 40, 56), dtype=np.uint8)
    sample = Clips(frames, ["a"] * 4, [0, 1, 2, 3])
    extractor = load_extractor(f"i3d-k400-logits-400:{path}")
    assert extractor(sample).shape == (4, 400)
    assert extractor.id_for(sample) == f"i3d-k400-logits-400@T12#{extractor.sha256[:8]}"
    with pytest.raises(ValueError, match="takes 10 or more frames; the clips have 8"):
        extractor(dataclasses.replace(sample, frames=frames[:, :8]))
    # as in cd-fvd and StyleGAN-V: per frame, bilinear, half-pixel centres, no antialiasing
    one = torch.from_numpy(frames[:1]).float() / 255
    resized = [interpolate(frame[None], (224, 224), mode="bilinear")[0] for frame in one[0]]
    expected = 2 * torch.stack(resized, 1)[None] - 1
    assert torch.allclose(i3d_input(torch.from_numpy(frames[:1])), expected, atol=1e-6)


I3D = os.environ.get("DISTILL_BENCH_I3D", "")
needs_i3d = pytest.mark.skipif(
    not Path(I3D).is_file(), reason="DISTILL_BENCH_I3D names no i3d_torchscript.pt"
)


@needs_i3d
def test_i3d_distance_of_black_and_white_clips_is_the_published_value():
    """JunyaoHu/common_metrics_on_video_quality: 8 clips of 30 frames of 64x64: 151.256."""
    extractor = load_extractor(f"i3d-k400-logits-400:{I3D}")
    black, white = (
        torch.full((8, 30, 3, 64, 64), value, dtype=torch.uint8).numpy() for value in (0, 255)
    )
    x, y = (batched(extractor.net, frames, "i3d") for frames in (black, white))
    assert frechet_distance(x, y) == pytest.approx(151.256, abs=0.01)


@needs_i3d
@pytest.mark.timeout(1200)
def test_i3d_distance_of_random_clips_is_that_of_the_original_implementation():
    """universome/fvd-comparison, compare_metrics.py: uniform floats without preprocessing.

    TensorFlow and PyTorch both give 10.138085.
    """
    net = torch.jit.load(I3D).eval()

    def features(seed: int) -> Tensor:
        logits = []
        for clip in np.random.RandomState(seed).rand(128, 16, 224, 224, 3).astype(np.float32):
            with torch.no_grad():
                x = torch.from_numpy(clip).permute(3, 0, 1, 2)[None]
                output = net(x, rescale=False, resize=False, return_features=True)
                logits.append(output.reshape(1, 400))
        return torch.cat(logits)

    assert frechet_distance(features(1), features(2)) == pytest.approx(10.138085, abs=1e-3)


def save_videomae(folder: Path) -> Path:
    """A tiny VideoMAE of 4 frames with fixed random weights."""
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
    torch.manual_seed(0)
    VideoMAEModel(config).save_pretrained(folder)
    return folder


def test_videomae_is_loaded_from_a_folder(tmp_path):
    from transformers import VideoMAEModel

    folder = save_videomae(tmp_path / "tiny")
    extractor, sample = load_extractor(f"videomae:{folder}"), clips(6)
    sample = dataclasses.replace(sample, frames=sample.frames[:, :4])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = torch.from_numpy(sample.frames).float() / 255
    x = (x - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        model = VideoMAEModel.from_pretrained(folder).eval()
        expected = model(pixel_values=x).last_hidden_state.mean(1)
    assert torch.allclose(extractor(sample), expected, atol=1e-4)
    assert extractor.id_for(sample).startswith("videomae-tiny#")


def test_videomae_takes_the_number_of_frames_of_its_config(tmp_path):
    extractor = load_extractor(f"videomae:{save_videomae(tmp_path / 'tiny')}")
    with pytest.raises(ValueError, match="takes 4 frames; the clips have 8"):
        extractor(clips(6))


def test_the_digest_of_videomae_covers_its_preprocessing(tmp_path):
    """Features made with other means must not be found in the cache."""
    a, b = (save_videomae(tmp_path / name) for name in "ab")
    (b / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    assert load_extractor(f"videomae:{a}").sha256 != load_extractor(f"videomae:{b}").sha256


def test_a_videomae_without_all_of_its_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_videomae(tmp_path / "tiny")
    weights = load_file(folder / "model.safetensors")
    weights.pop(min(weights))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of a VideoMAE"):
        load_extractor(f"videomae:{folder}")


def test_large_clips_are_batched_in_smaller_numbers(monkeypatch):
    sample, sizes = clips(8), []

    def net(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x.float().mean((1, 3, 4))

    monkeypatch.setattr("distill_bench.evaluate.cache.VALUES", 3 * sample.frames[0].size)
    batched(net, sample.frames, "net")
    assert sizes == [3, 3, 2]
