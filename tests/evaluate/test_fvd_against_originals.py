"""FVD and KVD from uint8 clips to score, against cd-fvd, torch-fidelity and torchmetrics.

The networks have random weights, the same for both sides. A mistake in the preprocessing must move
the score away from the original's by far more than the tolerance.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from preprocessing_mistakes import RESIZED, SCALED, resized
from random_networks import RandomLogits
from textures import textured_clips
from torch import Tensor, nn
from torchvision.transforms import v2

from distill_bench.domain import controls
from distill_bench.eval.fvd import FVD
from distill_bench.evaluate import encoders, extractors
from distill_bench.evaluator import Clips

TOLERANCE = 1e-5  # relative
CAUGHT = 20 * TOLERANCE  # the least error of a planted mistake
N = 4  # clips per set


class Features(nn.Module):
    """Features of uint8 clips as the metric packages ask for them."""

    def __init__(self, of_clips: Callable[[Tensor], Tensor], dim: int) -> None:
        super().__init__()
        self.of_clips, self.num_features = of_clips, dim

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        return self.of_clips(clips).double()


def random_logits() -> nn.Module:
    torch.manual_seed(0)
    return RandomLogits().eval()


def channels_last(clips: Tensor) -> np.ndarray:
    return clips.permute(0, 1, 3, 4, 2).numpy()


def i3d(folder: Path) -> tuple[str, Features]:
    """cd-fvd's preprocessing of I3D."""
    from cdfvd.third_party.i3d.utils import preprocess_i3d

    net, path = random_logits(), folder / "i3d_torchscript.pt"
    torch.jit.script(net).save(str(path))
    original = Features(lambda x: net(preprocess_i3d(channels_last(x))), 400)
    return f"i3d-k400-logits-400:{path}", original


def videomae(folder: Path) -> tuple[str, Features]:
    """cd-fvd's resizing for VideoMAE; mean and standard deviation of transformers' processor."""
    from cdfvd.third_party.VideoMAEv2.utils import preprocess_videomae
    from transformers import VideoMAEConfig, VideoMAEImageProcessor, VideoMAEModel

    torch.manual_seed(0)
    config = VideoMAEConfig(
        patch_size=32,
        num_frames=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.3,
    )
    net = VideoMAEModel(config).eval()
    processor = VideoMAEImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    normalize = v2.Normalize(processor.image_mean, processor.image_std)

    def features(clips: Tensor) -> Tensor:
        x = preprocess_videomae(channels_last(clips)).transpose(1, 2)
        return net(pixel_values=normalize(x)).last_hidden_state.mean(1)

    return f"videomae:{folder}", Features(features, 16)


def random_r2p1(folder: Path) -> tuple[str, Features]:
    """torchvision's transforms."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = encoders.R2P1(64, lambda width: nn.GroupNorm(8, width)).eval()
    prepared = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize(64, antialias=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    return "random-r2p1", Features(lambda x: net(prepared(x).transpose(1, 2)), 64)


def classifier(folder: Path) -> tuple[str, Features]:
    """torchvision's transforms."""
    net, _, _ = encoders.load_encoder(encoders.Classifier(), encoders.CLASSIFIER)
    prepared = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    )
    original = Features(lambda x: net.standard_features(prepared(x).transpose(1, 2)), encoders.DIM)
    return encoders.CLASSIFIER, original


ORIGINALS = {
    "i3d": i3d,
    "videomae": videomae,
    "random-r2p1": random_r2p1,
    "indomain-r2p1-cls": classifier,
}


def clip_sets(name: str) -> tuple[Clips, Clips]:
    """Clips to score and a reference without common prompts, so that both sides are unpaired."""
    if name == encoders.CLASSIFIER:
        frames = controls.rendered(N, 0)[0], controls.noisy(controls.rendered(N, 500)[0], 0)
    else:
        count = 10 if name == "i3d" else 4  # frames
        frames = (
            textured_clips(N, count, 240, 300, seed=0),
            textured_clips(N, count, 240, 300, seed=1, contrast=0.6),
        )
    return tuple(Clips(x, [f"{i}"] * N, list(range(N))) for i, x in enumerate(frames))


def distances(spec: str, sets: tuple[Clips, Clips]) -> np.ndarray:
    """Our `fvd` and `kvd`."""
    clips, reference = sets
    scores = FVD(extractor=spec, resamples=2).scores(clips, {"teacher": reference})
    return np.array([s.value for column in ("fvd", "kvd") for s in scores if s.column == column])


def by_torchmetrics(original: Features, sets: tuple[Clips, Clips]) -> np.ndarray:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    values = []
    for metric in (
        FrechetInceptionDistance(feature=original),
        KernelInceptionDistance(feature=original, subsets=1, subset_size=N),
    ):
        for real, clips in zip((False, True), sets, strict=True):
            metric.update(torch.from_numpy(clips.frames), real=real)
        value = metric.compute()
        values.append(value[0] if isinstance(value, tuple) else value)
    return np.array(values, dtype=float)


def by_torch_fidelity(
    original: Features, sets: tuple[Clips, Clips], monkeypatch: pytest.MonkeyPatch
) -> np.ndarray:
    import torch_fidelity
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Extractor(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name: str, features: list[str], **unused: object) -> None:
            super().__init__(name, features)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("clips",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "clips"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, clips: Tensor) -> tuple[Tensor]:
            return (original(clips),)

    class Frames(torch.utils.data.Dataset):
        def __init__(self, clips: Clips) -> None:
            self.frames = torch.from_numpy(clips.frames)

        def __len__(self) -> int:
            return len(self.frames)

        def __getitem__(self, index: int) -> Tensor:
            return self.frames[index]

    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "clips", Extractor)
    metrics = torch_fidelity.calculate_metrics(
        input1=Frames(sets[0]),
        input2=Frames(sets[1]),
        feature_extractor="clips",
        fid=True,
        kid=True,
        kid_subsets=1,
        kid_subset_size=N,
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
    )
    keys = ("frechet_inception_distance", "kernel_inception_distance_mean")
    return np.array([metrics[key] for key in keys])


def by_cd_fvd(sets: tuple[Clips, Clips], monkeypatch: pytest.MonkeyPatch) -> float:
    """cd-fvd's FVD; it divides covariances by N, the others by N - 1."""
    import cdfvd.fvd

    net = random_logits()
    monkeypatch.setattr(cdfvd.fvd, "load_i3d_model", lambda device, path: net)
    metric = cdfvd.fvd.cdfvd("i3d", n_fake="full", device="cpu")
    metric.fake_stats.max_items = None
    clips, reference = (channels_last(torch.from_numpy(x.frames)) for x in sets)
    distance = metric.compute_fvd(reference, clips)
    means = [stats.get_mean_cov()[0] for stats in (metric.real_stats, metric.fake_stats)]
    of_means = np.square(means[0] - means[1]).sum()
    return float(of_means + (distance - of_means) * N / (N - 1))


@pytest.fixture(scope="module", params=ORIGINALS)
def compared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple]:
    """Extractor's spec, original's features, the clips, and torchmetrics' distances of them."""
    spec, original = ORIGINALS[request.param](tmp_path_factory.mktemp(request.param))
    sets = clip_sets(request.param)
    return request.param, spec, original, sets, by_torchmetrics(original, sets)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Metric `Kernel:UserWarning")
def test_fvd_and_kvd_of_clips_are_the_originals(compared, monkeypatch):
    name, spec, original, sets, expected = compared
    ours = distances(spec, sets)
    np.testing.assert_allclose(ours, expected, rtol=TOLERANCE)
    np.testing.assert_allclose(ours, by_torch_fidelity(original, sets, monkeypatch), rtol=TOLERANCE)
    if name == "i3d":
        assert ours[0] == pytest.approx(by_cd_fvd(sets, monkeypatch), rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [*SCALED, *RESIZED, "antialiasing"])
def test_a_mistake_in_the_preprocessing_is_caught(compared, mistake, monkeypatch):
    """Antialiasing is a mistake for the published extractors, its absence for the random one."""
    name, spec, _, sets, expected = compared
    if mistake in SCALED:
        monkeypatch.setattr(encoders, "scaled", SCALED[mistake])
    elif name == encoders.CLASSIFIER:
        pytest.skip("takes frames of its own size")
    else:
        wrong = RESIZED.get(mistake) or resized(antialias=name != "random-r2p1")
        monkeypatch.setattr(extractors, "interpolate", wrong)
    error = np.abs(distances(spec, sets) / expected - 1)
    assert error.max() > CAUGHT
