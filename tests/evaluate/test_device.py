"""Networks of evaluators on a device: what moves there, in which batches, and what is recorded."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_folders import write_sampled
from fake_gpu import NAME, fake_gpu
from random_networks import write_clip
from torch import Tensor, nn

from distill_bench.cli import main
from distill_bench.config.identity import run_id
from distill_bench.config.protocol import protocol, protocol_hash
from distill_bench.config.resolve import resolve
from distill_bench.eval.motion import ClipSpeeds
from distill_bench.evaluate import cache, device
from distill_bench.evaluate.cache import batched
from distill_bench.evaluate.clip_models import embedded_frames, indomain_clip, open_clip_model
from distill_bench.evaluate.device import FittingBatches, Preprocessed, devices_used, scoring_device
from distill_bench.evaluate.extractors import load_extractor
from distill_bench.evaluate.optical_flow import Raft, farneback_flow, lucas_kanade_flow
from distill_bench.evaluate.score import evaluate
from distill_bench.sample import load_folder
from distill_bench.sweep import prepare

SMALL = (8, 3, 32, 32)


class Logits(nn.Module):
    """Network with the signature of I3D's published file."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 400)

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return self.out(x.mean((2, 3, 4)))


class PairFlow(nn.Module):
    """Network with the signature of RAFT."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        return [self.out(torch.cat([first, second], 1))]


class CentredMean(nn.Module):
    """Network whose constant is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.full((3, 1, 1), 127.0)

    def forward(self, frames: Tensor) -> Tensor:
        return (frames.float() - self.mean).mean((1, 3, 4))


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, tuple]]:
    """Networks of every kind with the shape of their clips; I3D's and RAFT's own are replaced."""
    from transformers import VideoMAEConfig, VideoMAEModel

    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    videomae = VideoMAEConfig(
        image_size=32,
        patch_size=16,
        num_frames=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    VideoMAEModel(videomae).save_pretrained(folder / "videomae")
    torch.jit.script(nn.Identity()).save(str(folder / "i3d.pt"))
    i3d = load_extractor(f"i3d-k400-logits-400:{folder}/i3d.pt").net
    i3d.net = Logits()
    published = open_clip_model(f"local-dir:{write_clip(folder)}").embed
    return {
        "classifier": (load_extractor("indomain-r2p1-cls").net, SMALL),
        "random": (load_extractor("random-r2p1").net, (3, 3, 80, 96)),
        "i3d": (i3d, (10, 3, 40, 56)),
        "videomae": (load_extractor(f"videomae:{folder}/videomae").net, (4, 3, 40, 56)),
        "video CLIP": (indomain_clip(True).embed, SMALL),
        "frame CLIP": (Preprocessed(embedded_frames, indomain_clip(False).embed), SMALL),
        "open_clip": (Preprocessed(embedded_frames, published), (2, 3, 40, 56)),
        "lucas-kanade": (ClipSpeeds(lucas_kanade_flow), SMALL),
        "farneback": (ClipSpeeds(farneback_flow), (3, 3, 80, 96)),
        "raft": (ClipSpeeds(Raft(PairFlow(), "raft")), (4, 3, 131, 142)),
    }


def random_clips(count: int, shape: tuple) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def test_all_tensors_of_a_network_are_on_its_device(networks, monkeypatch):
    """farneback and the pictures of open_clip, which stay on the processor, have no fakes."""
    for name, (net, shape) in networks.items():
        if name in ("farneback", "open_clip"):
            continue
        on_device, clips = [], random_clips(2, shape)
        expected = batched(net, clips, name).shape  # fills the caches of the network with values
        net = copy.deepcopy(net)
        net.register_forward_pre_hook(
            lambda net, inputs, seen=on_device: seen.append(
                {x.device.type for x in [*inputs, *net.parameters(), *net.buffers()]}
            )
        )
        with fake_gpu(), devices_used() as used:
            rows = batched(net, clips, name)
        assert on_device == [{"cuda"}] and used == {NAME}, name
        left = {x.device.type for x in [rows, *net.parameters(), *net.buffers()]}
        assert rows.shape == expected and left == {"cpu"}, name
    model = indomain_clip(True)
    text = copy.deepcopy(model.embed_text)
    with fake_gpu():
        captions = model.tokenize(["a red circle", "a blue square"])
        monkeypatch.setitem(model.__dict__, "embed_text", text)
        assert model.embedded_captions(captions).shape == (2, 64)


def test_pictures_of_a_published_clip_return_to_the_device(networks, monkeypatch):
    """Its preprocessing, of pictures on the processor, is left out: fake tensors have no values."""
    net, _ = networks["open_clip"]
    embed = net.net.function
    closure = dict(zip(embed.__code__.co_freevars, embed.__closure__, strict=True))
    monkeypatch.setattr(closure["preprocess"], "cell_contents", lambda frame: frame.float())
    monkeypatch.setattr("torchvision.transforms.functional.to_pil_image", lambda frame: frame)
    net = copy.deepcopy(net)
    with fake_gpu():
        assert batched(net, random_clips(2, SMALL), "open_clip").shape == (2, 8, 16)


def test_a_constant_on_the_processor_is_named_and_a_function_stays_there():
    with (
        fake_gpu(),
        pytest.raises(ValueError, match="centred mixes tensors of cuda:0 and the proc"),
    ):
        batched(CentredMean(), random_clips(2, SMALL), "centred")
    with fake_gpu(), devices_used() as used:
        batched(CentredMean().forward, random_clips(2, SMALL), "centred")
    assert used == {"cpu"}


def test_the_size_of_a_batch_changes_no_feature(networks, monkeypatch):
    for name, (net, shape) in networks.items():
        rows = {}
        for size in (1, 7):
            monkeypatch.setattr(cache, "BATCH", size)
            rows[size] = batched(net, random_clips(8, shape), name)
        error = (rows[7] - rows[1]).norm() / rows[1].norm()
        assert error < 1e-5, name


def limited(most: int, net: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[int]]:
    """A network whose device holds `most` clips, and the sizes of the batches that it was given."""
    sizes = []

    def forward(*inputs: Tensor) -> Tensor:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore")
        return net(*inputs)

    return forward, sizes


def test_a_batch_that_does_not_fit_is_halved_once_for_all(monkeypatch, capsys):
    clips = random_clips(12, (2, 3, 4, 4))
    monkeypatch.setattr(cache, "BATCH", 6)
    mean = lambda frames: frames.float().mean((1, 3, 4))  # noqa: E731
    net, sizes = limited(2, mean)
    assert torch.equal(batched(net, clips, "net"), batched(mean, clips, "net"))
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1, *[1] * 6]
    said = capsys.readouterr().err.splitlines()
    assert said == ["net: a batch of 6 does not fit into memory and is halved"]
    with pytest.raises(ValueError) as failure:
        batched(limited(0, mean)[0], clips, "net")
    assert str(failure.value) == (
        "net does not fit into the memory of cpu with one clip: CUDA out of memory. Tried to "
        "allocate 20.00 GiB."
    )


def test_pairs_of_frames_of_raft_that_do_not_fit_are_halved():
    raft, clip = Raft(PairFlow(), "raft"), torch.from_numpy(random_clips(1, (9, 3, 128, 128))[0])
    expected = raft(clip)
    forward, sizes = limited(3, raft.net.forward)
    raft.net.forward = lambda *pair: forward(*pair)
    raft.fitting = FittingBatches("raft", 8)
    torch.testing.assert_close(raft(clip), expected, rtol=1e-5, atol=1e-5)
    assert sizes == [8, 4, 2, 2, 2, 2]


def test_a_long_pass_announces_its_time_and_memory(monkeypatch, capsys):
    clips, mean = random_clips(4, (2, 3, 4, 4)), lambda frames: frames.float().mean((1, 3, 4))
    batched(mean, clips, "net")
    assert capsys.readouterr().err == "", "a short pass is announced"
    monkeypatch.setattr(cache, "LONG", -1)
    monkeypatch.setattr(cache, "BATCH", 1)
    monkeypatch.setattr(cache, "peak_bytes", lambda device: 2_100_000_000)
    ticks = iter(range(0, 800, 50))  # each pass takes 50 seconds
    monkeypatch.setattr(cache.time, "perf_counter", lambda: next(ticks))
    batched(mean, clips, "net")
    assert capsys.readouterr().err == "net: 4 clips, about 3 min on cpu, 2.1 GB\n"


@pytest.mark.parametrize("files", [False, True])
def test_features_come_in_bounded_memory_from_a_folder_of_any_size(tmp_path, monkeypatch, files):
    """Its own memory, without pages of mapped files, grows by less than a quarter of the clips."""
    monkeypatch.setattr(load_folder, "MAPPED_BYTES", 2**20)
    monkeypatch.setattr(cache, "BATCH", 1)
    frames = np.full((64, 8, 3, 160, 160), 7, np.uint8)
    frames += np.arange(64, dtype=np.uint8).reshape(64, 1, 1, 1, 1)
    folder = tmp_path / "a"
    if files:
        folder.mkdir()
        for index, clip in enumerate(frames):
            np.save(folder / f"{index:02d}.npy", clip)
    else:
        write_sampled(folder, count=64, frames=frames)
    size, expected = frames.nbytes, frames.mean((1, 2, 3, 4))
    del frames
    used = []

    def watched(function: Callable) -> Callable:
        def watch(argument: Tensor | Path) -> Tensor:
            used.append(own_bytes())
            return function(argument)

        return watch

    monkeypatch.setattr(load_folder, "read_clip", watched(load_folder.read_clip))
    clips = load_folder.load_clips(folder).frames
    features = batched(watched(lambda batch: batch.float().mean((1, 2, 3, 4))), clips, "net")
    np.testing.assert_allclose(features.numpy(), expected)
    assert max(used) - used[1] < size / 4
    left = {path.name for path in folder.rglob("*")} - {f"{i:02d}.npy" for i in range(64)}
    assert left <= {".features", "clips.npy", "manifest.jsonl", "row.json"}


def test_scores_record_the_device_also_from_cached_features(tmp_path, monkeypatch):
    folder, reference = write_sampled(tmp_path / "a"), write_sampled(tmp_path / "b", first=100)
    arguments = {"teacher": reference}, ["fvd", "attributes"]
    with monkeypatch.context() as patch:
        patch.setattr(device, "device_name", lambda device: "NVIDIA H200")
        first = evaluate(folder, *arguments)
    assert {line["device"] for line in first if line["metric"] == "fvd"} == {"NVIDIA H200"}
    assert {line["device"] for line in first if line["metric"] == "attributes"} == {"cpu"}
    assert evaluate(folder, *arguments, device="cpu") == first, "scored again"
    again = evaluate(folder, *arguments, out=tmp_path / "again.jsonl")
    assert again == first, "features of the cache lost their device"


def test_a_gpu_computes_with_all_bits_of_float32():
    matmul, used, net = torch.backends.cuda.matmul, [], nn.Flatten()
    net.register_forward_hook(
        lambda *_: used.append((matmul.fp32_precision, torch.backends.cudnn.allow_tf32))
    )
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with fake_gpu():
            batched(net, random_clips(2, (2, 3, 4, 4)), "flat")
        assert used == [("ieee", False)]
        assert matmul.fp32_precision == "tf32", "of the user's own work"
    finally:
        matmul.fp32_precision = before


def test_the_command_takes_a_device(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path), "--device", "mps"])
    error = capsys.readouterr().err
    assert error == "distill-bench evaluate: device 'mps' is unknown; known: cpu, cuda, cuda:N\n"


@pytest.mark.parametrize(
    ("gpus", "name", "reason"),
    [
        (0, "gpu", "device 'gpu' is unknown; known: cpu, cuda, cuda:N"),
        (0, "mps", "device 'mps' is unknown; known: cpu, cuda, cuda:N"),
        (0, "cuda", "device cuda: this process sees no GPU; use cpu"),
        (1, "cuda:9", "device cuda:9: this process sees cuda:0; use one of these or cpu"),
        (4, "cuda:9", "device cuda:9: this process sees cuda:0 to cuda:3; use one of these or cpu"),
    ],
)
def test_a_wrong_device_is_refused(gpus, name, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError) as failure:
        scoring_device(name)
    assert str(failure.value) == reason


def test_the_default_device_is_the_gpu_of_the_process(monkeypatch):
    assert scoring_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [str(scoring_device(name)) for name in (None, "cuda", "cuda:1", "cpu")] == [
        "cuda:2",
        "cuda:2",
        "cuda:1",
        "cpu",
    ]


def test_the_device_of_a_protocol_reaches_the_evaluators_and_no_identity(tmp_path, monkeypatch):
    fields = {"method": "dmd2", "protocol": {"clips": 2}}
    plain = resolve(fields)
    config = resolve(fields | {"protocol": {"clips": 2, "device": "cpu"}})
    assert run_id(config) == run_id(plain) and protocol_hash(config) == protocol_hash(plain)
    assert protocol(config) == protocol(plain)
    calls = []
    monkeypatch.setattr(prepare, "evaluate", lambda *_, **keywords: calls.append(keywords))
    prepare.score_clips(config, tmp_path, {})
    assert [call["device"] for call in calls] == ["cpu"]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_a_gpu_gives_the_features_of_the_processor(networks):
    """The tolerance of eval/README.md; TF32 would be off by a hundred times as much."""
    for name, (net, shape) in networks.items():
        clips = random_clips(40, shape)
        rows = {}
        for place in ("cpu", "cuda"):
            with device.running_on(scoring_device(place)):
                rows[place] = batched(net, clips, name)
        error = (rows["cuda"] - rows["cpu"]).norm() / rows["cpu"].norm()
        assert error < 1e-4, name
        assert not {p.device.type for p in net.parameters()} - {"cpu"}, name


@needs_gpu
def test_raft_in_batches_of_pairs_on_a_gpu_is_raft_on_the_processor():
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    net = ClipSpeeds(Raft(raft_small(weights=None).eval().requires_grad_(False), "raft"))
    clips = random_clips(2, (9, 3, 136, 152))
    with device.running_on(scoring_device("cpu")):
        expected = batched(net, clips, "raft")
    net.flow.fitting = None
    with device.running_on(scoring_device("cuda")):
        rows = batched(net, clips, "raft")
    assert (rows - expected).norm() / expected.norm() < 1e-3


@needs_gpu
def test_scores_on_a_gpu_are_those_of_the_processor(tmp_path):
    lines = {}
    for place in ("cpu", "cuda"):
        folder = write_sampled(tmp_path / place / "a", count=64)
        references = {"teacher": write_sampled(tmp_path / place / "b", first=100, count=64)}
        lines[place] = evaluate(folder, references, device=place)
    assert {line["device"] for line in lines["cuda"] if line["metric"] == "fvd"} == {
        torch.cuda.get_device_name()
    }
    for on_cpu, on_gpu in zip(lines["cpu"], lines["cuda"], strict=True):
        assert on_gpu["value"] == pytest.approx(on_cpu["value"], rel=1e-3, abs=1e-4), on_cpu[
            "column"
        ]


def own_bytes() -> int:
    """Resident memory of this process without pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    pytest.skip("this system does not tell")
