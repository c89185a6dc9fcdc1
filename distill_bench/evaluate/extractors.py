"""Frozen networks that turn clips into features, with their input requirements and cached outputs.

Shipped extractors are given as `name` or `name:path`. To use another network, give
`module:function` or `path/to/file.py:function`, where the function takes no arguments and returns
an `Extractor`. The id of an extractor contains the sha256 of its weights, and the number of frames
if its values depend on that number.
"""

import hashlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from distill_bench.domain import shapes
from distill_bench.evaluate import encoders
from distill_bench.evaluate.cache import batched, cached, refuse_training_clips
from distill_bench.evaluate.device import Preprocessed, out_of_memory
from distill_bench.evaluate.video_transformers import (
    FRAMES,
    VJEPA,
    VideoMAEv2,
    read_checkpoint,
    transformers_model,
    under,
)
from distill_bench.evaluator import Clips
from distill_bench.registry import load_file
from distill_bench.store.failures import first_line
from distill_bench.store.files import read_json, sha256

# weights that are not shipped, and their places
VIDEOMAE_V2 = (
    "vit_g_hybrid_pt_1200e_ssv2_ft.pth of https://pjlab-gvm-data.oss-cn-shanghai.aliyuncs.com/"
    "internvideo/videomaev2/"
)
VJEPA_SSV2 = (
    "a folder of vith16.pth.tar and ssv2-probe.pth.tar from "
    "https://dl.fbaipublicfiles.com/jepa/vith16/"
)
DINOV3 = (
    "a transformers folder of DINOv3, e.g. a copy of "
    "https://huggingface.co/facebook/dinov3-vitl16-pretrain-lvd1689m"
)


@dataclass(frozen=True)
class Extractor:
    """A frozen network from clips to features (N, dim), and the clips it accepts."""

    name: str
    version: int  # of the preprocessing
    sha256: str  # of the weights
    dim: int
    # uint8 (B, T, 3, H, W) -> (B, dim). An nn.Module and its input are moved to the device of the
    # evaluation, so its constants are buffers; any other function runs on the processor.
    net: Callable[[Tensor], Tensor]
    preprocessing: str  # in words
    min_frames: int = 2
    max_frames: int | None = None
    size: tuple[int, int] | None = None  # required (H, W); None: any, the network resizes
    frames_matter: bool = False  # values at different frame counts do not compare
    seen: frozenset[int] = frozenset()  # digests of its training clips
    code: str = ""  # digest of the file that defines it, unless it ships with this package

    def id_for(self, clips: Clips) -> str:
        """Name, frame count if it matters, and digest of the weights, e.g. `i3d@T16#0a1b2c3d`."""
        frames = f"@T{clips.frames.shape[1]}" if self.frames_matter else ""
        return f"{self.name}{frames}#{self.sha256[:8]}"

    def reason_to_refuse(self, clips: Clips) -> str | None:
        """Reason why the network cannot take these clips, or None."""
        frames, _, height, width = clips.frames.shape[1:]
        if self.size is not None and (height, width) != self.size:
            needed = f"{self.size[0]}x{self.size[1]}"
            return f"{self.name} takes frames of {needed}; the clips have {height}x{width}"
        if self.min_frames <= frames <= (self.max_frames or frames):
            return None
        if self.max_frames is None:
            needed = f"{self.min_frames} or more"
        elif self.max_frames == self.min_frames:
            needed = f"{self.min_frames}"
        else:
            needed = f"{self.min_frames} to {self.max_frames}"
        return f"{self.name} takes {needed} frames; the clips have {frames}"

    def __call__(self, clips: Clips) -> Tensor:
        """Features (N, dim), float32, read from the cache if possible.

        Raises:
            ValueError: if the network cannot take the clips, was trained on any of them, or gives
                malformed features.
        """
        reason = self.reason_to_refuse(clips)
        if reason is not None:
            raise ValueError(reason)
        refuse_training_clips(self.seen, clips, self.name, "a distance to them means nothing")
        identity = (
            f"{self.name}-v{self.version}",
            self.sha256,
            self.preprocessing,
            str(self.dim),
            self.code,
        )
        return cached("\n".join(identity), clips, lambda: self._features(clips))

    def _features(self, clips: Clips) -> Tensor:
        features = batched(self.net, clips.frames, self.name)
        if features.ndim != 2 or features.shape != (len(clips.frames), self.dim):
            raise ValueError(
                f"{self.name} gave features {tuple(features.shape)} for {len(clips.frames)} clips; "
                f"they must be (N, {self.dim})"
            )
        if not features.isfinite().all():
            raise ValueError(f"{self.name} gave features that are not finite")
        constant = (features.std(0) > 0).float().mean() < 0.5
        if constant and clips.copies < len(clips.frames) - 1:
            raise ValueError(
                f"{self.name} gave constant features for different clips: "
                "its weights or its input are wrong"
            )
        return features


def load_extractor(spec: str) -> Extractor:
    """Load the extractor that `spec` names (syntax: see the module docstring).

    Raises:
        ValueError: if the spec names no extractor, or its weights are missing or invalid.
    """
    name, _, path = spec.partition(":")
    if name in EXTRACTORS:
        return EXTRACTORS[name](path)
    if not path:
        raise ValueError(
            f"no extractor called {spec!r}; known: {', '.join(EXTRACTORS)}, "
            "or path/to/file.py:function"
        )
    place, _, function = spec.rpartition(":")
    try:
        is_file = place.endswith(".py")
        module = load_file(Path(place)) if is_file else importlib.import_module(place)
        extractor = getattr(module, function)()
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ValueError(f"no extractor at {spec!r}: {error}") from error
    if not isinstance(extractor, Extractor):
        raise ValueError(f"{spec!r} returned a {type(extractor).__name__}, not an Extractor")
    return replace(extractor, code=sha256(Path(module.__file__)) if module.__file__ else "")


@cache
def classifier(path: str = "") -> Extractor:
    """Penultimate layer of the shipped classifier, for clips of the embedded domain."""
    net, digest, seen = encoders.load_encoder(
        encoders.Classifier(), encoders.CLASSIFIER, Path(path or encoders.FOLDER)
    )

    def features(net: encoders.Classifier, frames: Tensor) -> Tensor:
        return net.standard_features(encoders.scaled(frames).transpose(1, 2))

    return Extractor(
        encoders.CLASSIFIER,
        1,
        digest,
        encoders.DIM,
        Preprocessed(features, net),
        "to [-1, 1]",
        max_frames=shapes.FRAMES,
        min_frames=shapes.FRAMES,
        size=(shapes.SIZE, shapes.SIZE),
        seen=seen,
    )


@cache
def random_r2p1(path: str = "") -> Extractor:
    """Randomly initialised network of the classifier's architecture, with 64 features.

    Random features judge appearance well and motion weakly (arXiv:2208.09218). The norms are group
    norms, because untrained batch norms make the features of all clips nearly equal.
    """
    if path:
        raise ValueError(f"random-r2p1 has no weights to read from {path}; leave out the path")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = encoders.R2P1(64, lambda width: nn.GroupNorm(8, width)).eval().requires_grad_(False)
    weights = b"".join(v.numpy().tobytes() for v in net.state_dict().values())

    def features(net: nn.Module, frames: Tensor) -> Tensor:
        x = encoders.scaled(frames).flatten(0, 1)
        shorter = min(x.shape[-2:])
        if shorter > 64:
            size = [round(64 / shorter * side) for side in x.shape[-2:]]
            x = interpolate(x, size, mode="bilinear", antialias=True)
        return net(x.reshape(*frames.shape[:2], *x.shape[1:]).transpose(1, 2))

    return Extractor(
        "random-r2p1",
        1,
        hashlib.sha256(weights).hexdigest(),
        64,
        Preprocessed(features, net),
        "to [-1, 1]; shorter side to 64 at most, bilinear, antialiased",
    )


@cache
def i3d(path: str) -> Extractor:
    """Kinetics-400 logits of I3D (StyleGAN-V's `i3d_torchscript.pt`): the features of FVD.

    As for published distances, frames are resized to 224x224 by bilinear interpolation without
    antialiasing and scaled to [-1, 1]; another resizing changes the distances by 10 %. Values
    depend strongly on the number of frames.
    """
    name = "i3d-k400-logits-400"
    if not path:
        raise ValueError(f"{name} needs the path of i3d_torchscript.pt; write {name}:/path")
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no weights at {path}; {name} needs the TorchScript i3d_torchscript.pt")
    try:
        with warnings.catch_warnings():  # TorchScript is deprecated, but the published file uses it
            warnings.simplefilter("ignore", FutureWarning)
            net = torch.jit.load(str(file), map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(f"{file} is not a TorchScript file: {first_line(error)}") from error

    def features(net: nn.Module, frames: Tensor) -> Tensor:
        try:
            with torch.jit.fuser("none"):
                logits = net(i3d_input(frames), rescale=False, resize=False, return_features=True)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise ValueError(
                f"{file} does not take clips as i3d_torchscript.pt does: {first_line(error)}"
            ) from error
        return logits[None] if logits.ndim == 1 else logits  # a batch of one loses its axis

    return Extractor(
        name,
        1,
        sha256(file),
        400,
        Preprocessed(features, net),
        "uint8; squashed to 224x224, bilinear, no antialiasing; to [-1, 1]",
        min_frames=10,
        frames_matter=True,
    )


def i3d_input(frames: Tensor) -> Tensor:
    """Convert uint8 frames (B, T, 3, H, W) to (B, 3, T, 224, 224) in [-1, 1]."""
    x = encoders.scaled(frames).flatten(0, 1)
    x = interpolate(x, (224, 224), mode="bilinear", align_corners=False)
    return x.reshape(*frames.shape[:3], 224, 224).transpose(1, 2)


@cache
def videomae(path: str) -> Extractor:
    """Mean token of a VideoMAE in a transformers folder; the model fixes the number of frames."""
    folder = Path(path)
    net, digest = transformers_model("videomae", path, "VideoMAEModel", "VideoMAE")
    preprocessor = read_json(folder / "preprocessor_config.json") or {}
    mean = torch.tensor(preprocessor.get("image_mean", [0.485, 0.456, 0.406]))
    std = torch.tensor(preprocessor.get("image_std", [0.229, 0.224, 0.225]))
    mean, std = mean.reshape(1, 3, 1, 1), std.reshape(1, 3, 1, 1)
    size, frame_count = net.config.image_size, net.config.num_frames

    def features(net: nn.Module, frames: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        x = (encoders.scaled(frames).flatten(0, 1) + 1) / 2
        x = interpolate(x, (size, size), mode="bilinear", align_corners=False)
        x = ((x - mean) / std).reshape(*frames.shape[:3], size, size)
        return net(pixel_values=x).last_hidden_state.mean(1)

    return Extractor(
        f"videomae-{folder.name}",
        1,
        digest,
        net.config.hidden_size,
        Preprocessed(features, net, mean=mean, std=std),
        f"squashed to {size}x{size}, bilinear, no antialiasing; "
        "mean and standard deviation of the folder",
        min_frames=frame_count,
        max_frames=frame_count,
    )


@cache
def dinov3(path: str) -> Extractor:
    """Mean over frames of the class token, of length 1, of a DINOv3 in a transformers folder."""
    from transformers import DINOv3ViTImageProcessor  # slow to import, rarely used

    folder = Path(path)
    net, digest = transformers_model("dinov3", path, "DINOv3ViTModel", "DINOv3")
    if not (folder / "preprocessor_config.json").is_file():
        raise ValueError(f"{folder} lacks preprocessor_config.json; copy {DINOV3}")
    prepare = DINOv3ViTImageProcessor.from_pretrained(folder, local_files_only=True)

    def features(net: nn.Module, frames: Tensor) -> Tensor:
        images = prepare(frames.flatten(0, 1), return_tensors="pt")["pixel_values"]
        tokens = net(pixel_values=images.to(frames.device)).pooler_output
        return normalize(tokens, dim=1).reshape(*frames.shape[:2], -1).mean(1)

    return Extractor(
        f"dinov3-{folder.name}",
        1,
        digest,
        net.config.hidden_size,
        Preprocessed(features, net),
        "resizing, mean and standard deviation of the folder",
    )


@cache
def videomae_v2(path: str) -> Extractor:
    """Features of CD-FVD: VideoMAE-v2, fine-tuned on Something-Something-v2."""
    name = "videomae-v2-ssv2"
    if not path:
        raise ValueError(f"{name} needs weights, as {name}:/path: {VIDEOMAE_V2}")
    file = Path(path)
    weights = read_checkpoint(file, "model", "module")
    try:
        net = VideoMAEv2(weights)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} holds no VideoMAE-v2: {first_line(error)}") from error
    return Extractor(
        name,
        1,
        sha256(file),
        net.norm.normalized_shape[0],
        net.eval().requires_grad_(False),
        "squashed to 224x224, bilinear, no antialiasing; to [0, 1]",
        frames_matter=True,
    )


@cache
def vjepa(path: str) -> Extractor:
    """Features of JEDi: V-JEPA and its probe of Something-Something-v2."""
    name = "vjepa-ssv2"
    if not path:
        raise ValueError(f"{name} needs weights, as {name}:/path: {VJEPA_SSV2}")
    files = [Path(path) / file for file in ("vith16.pth.tar", "ssv2-probe.pth.tar")]
    encoder = read_checkpoint(files[0], "target_encoder", "encoder")
    probe = read_checkpoint(files[1], "classifier")
    try:
        net = VJEPA(encoder, under("pooler.", probe))
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} holds no V-JEPA: {first_line(error)}") from error
    return Extractor(
        name,
        1,
        hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest(),
        net.norm.normalized_shape[0],
        net.eval().requires_grad_(False),
        f"{FRAMES} frames, evenly spaced; squashed to 224x224, bilinear, antialiased; ImageNet's "
        "mean and standard deviation",
        min_frames=FRAMES,
        frames_matter=True,
    )


EXTRACTORS: dict[str, Callable[[str], Extractor]] = {
    encoders.CLASSIFIER: classifier,
    "random-r2p1": random_r2p1,
    "i3d-k400-logits-400": i3d,
    "videomae": videomae,
    "videomae-v2-ssv2": videomae_v2,
    "vjepa-ssv2": vjepa,
    "dinov3": dinov3,
}
