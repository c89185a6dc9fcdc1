"""Frozen networks that look at clips for the evaluators: what each takes, and what it gives, cached on disk.

An extractor is named `name` or `name:path`; further ones are `module:function` or `path/to/file.py:function` of no argument that
gives an `Extractor`. Its id carries the sha256 of its weights, and the frames where they change the value.
"""

import hashlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distill_bench.domain import shapes
from distill_bench.evaluate import encoders
from distill_bench.evaluate.cache import batched, cached, refuse_seen
from distill_bench.evaluate.weights import load_module, weights_file
from distill_bench.evaluator import Clips
from distill_bench.store.files import first_line, read_json, sha256


@dataclass(frozen=True)
class Extractor:
    """A frozen network from clips to features (N, d), with its contract."""

    name: str
    version: int  # of the preprocessing here
    sha256: str  # of the weights
    dim: int
    net: Callable[[Tensor], Tensor]  # uint8 (B, T, 3, H, W) -> (B, d)
    preprocessing: str
    min_frames: int = 2
    max_frames: int | None = None
    size: tuple[int, int] | None = None  # (H, W) of the clips; None: it resizes any
    frames_matter: bool = (
        False  # values at unlike numbers of frames do not compare: the id says how many
    )
    seen: frozenset[int] = frozenset()  # digests of the clips that it was trained on
    code: str = ""  # digest of the file that it comes from, where that is not ours

    def id_for(self, clips: Clips) -> str:
        """Name, frames where they matter, and digest of the weights."""
        frames = f"@T{clips.frames.shape[1]}" if self.frames_matter else ""
        return f"{self.name}{frames}#{self.sha256[:8]}"

    def reason_to_refuse(self, clips: Clips) -> str | None:
        """Why the network does not take these clips, or None."""
        frames, _, height, width = clips.frames.shape[1:]
        if self.size is not None and (height, width) != self.size:
            return f"{self.name} takes frames of {self.size[0]}x{self.size[1]}; the clips have {height}x{width}"
        if frames < self.min_frames or frames > (self.max_frames or frames):
            most = {None: " or more", self.min_frames: ""}.get(
                self.max_frames, f" to {self.max_frames}"
            )
            return f"{self.name} takes {self.min_frames}{most} frames; the clips have {frames}"
        return None

    def __call__(self, clips: Clips) -> Tensor:
        """Features (N, d), float32; from the cache where they are there.

        Raises:
            ValueError: if the clips are not for this network, were in its training, or its features are no use.
        """
        reason = self.reason_to_refuse(clips)
        if reason is not None:
            raise ValueError(reason)
        refuse_seen(self.seen, clips, self.name, "a distance to them means nothing")
        made_by = (
            f"{self.name}-v{self.version}",
            self.sha256,
            self.preprocessing,
            str(self.dim),
            self.code,
        )
        return cached("\n".join(made_by), clips, lambda: self._features(clips))

    def _features(self, clips: Clips) -> Tensor:
        features = batched(self.net, clips.frames, self.name)
        if features.ndim != 2 or features.shape != (len(clips.frames), self.dim):
            raise ValueError(
                f"{self.name} gave features {tuple(features.shape)} for {len(clips.frames)} clips, not (N, {self.dim})"
            )
        if not features.isfinite().all():
            raise ValueError(f"{self.name} gave features that are not finite")
        if (features.std(0) > 0).float().mean() < 0.5 and clips.copies < len(clips.frames) - 1:
            raise ValueError(
                f"{self.name} gave constant features for clips that differ: its weights or its input are wrong"
            )
        return features


def load_extractor(spec: str) -> Extractor:
    """The extractor of a spec: see the module.

    Raises:
        ValueError: if there is none, or its weights are missing or not what they should be.
    """
    name, _, rest = spec.partition(":")
    if name in EXTRACTORS:
        return EXTRACTORS[name](rest)
    if rest:
        where, _, function = spec.rpartition(":")
        try:
            module = (
                load_module(Path(where))
                if where.endswith(".py")
                else importlib.import_module(where)
            )
            made = getattr(module, function)()
        except (ImportError, AttributeError, OSError, SyntaxError) as error:
            raise ValueError(f"no extractor at {spec!r}: {error}") from error
        if not isinstance(made, Extractor):
            raise ValueError(f"{spec!r} gives a {type(made).__name__}, not an Extractor")
        return replace(made, code=sha256(Path(module.__file__)) if module.__file__ else "")
    raise ValueError(
        f"no extractor called {spec!r}; known: {', '.join(EXTRACTORS)}, or path/to/file.py:function"
    )


@cache
def classifier(path: str = "") -> Extractor:
    """The penultimate layer of the shipped classifier, for clips of the embedded domain."""
    net, digest, seen = encoders.load_encoder(
        encoders.Classifier(), encoders.CLASSIFIER, Path(path or encoders.FOLDER)
    )
    return Extractor(
        encoders.CLASSIFIER,
        1,
        digest,
        encoders.DIM,
        lambda frames: net.standard_features(encoders.scaled(frames).transpose(1, 2)),
        "to [-1, 1]",
        max_frames=shapes.FRAMES,
        min_frames=shapes.FRAMES,
        size=(shapes.SIZE, shapes.SIZE),
        seen=seen,
    )


@cache
def random_r2p1(path: str = "") -> Extractor:
    """The same network with more features and random weights: a second opinion that never saw the domain.

    Random features judge appearance well and motion weakly (arXiv:2208.09218). Group norms: with a batch norm's first statistics
    the features of all clips are nearly equal.
    """
    if path:
        raise ValueError(f"random-r2p1 has no weights to read from {path}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = encoders.R2P1(64, lambda width: nn.GroupNorm(8, width)).eval().requires_grad_(False)
    digest = hashlib.sha256(
        b"".join(v.numpy().tobytes() for v in net.state_dict().values())
    ).hexdigest()

    def features(frames: Tensor) -> Tensor:
        x = encoders.scaled(frames).flatten(0, 1)
        if min(x.shape[-2:]) > 64:
            scale = 64 / min(x.shape[-2:])
            x = interpolate(
                x, [round(scale * side) for side in x.shape[-2:]], mode="bilinear", antialias=True
            )
        return net(x.reshape(*frames.shape[:2], *x.shape[1:]).transpose(1, 2))

    return Extractor(
        "random-r2p1",
        1,
        digest,
        64,
        features,
        "to [-1, 1]; shorter side to 64 at most, bilinear, antialiased",
    )


@cache
def i3d(path: str) -> Extractor:
    """Logits of Kinetics-400 by I3D in TorchScript (`i3d_torchscript.pt` of StyleGAN-V): the network of FVD.

    Frames are squashed to 224x224 by bilinear interpolation without antialiasing and scaled to [-1, 1], as the published
    distances are made (metrics differ by 10 % with another resize). The value depends strongly on the number of frames.
    """
    file = weights_file(path, "i3d-k400-logits-400", "the TorchScript file i3d_torchscript.pt")
    try:
        with warnings.catch_warnings():  # that TorchScript goes: the published file is one
            warnings.simplefilter("ignore", FutureWarning)
            net = torch.jit.load(str(file), map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(f"{file} is no TorchScript file: {first_line(error)}") from error

    def features(frames: Tensor) -> Tensor:
        try:
            with torch.jit.fuser("none"):
                found = net(i3d_input(frames), rescale=False, resize=False, return_features=True)
        except RuntimeError as error:
            raise ValueError(
                f"{file} does not take clips as i3d_torchscript.pt does: {first_line(error)}"
            ) from error
        return (
            found[None] if found.ndim == 1 else found
        )  # a batch of one comes back without its axis

    return Extractor(
        "i3d-k400-logits-400",
        1,
        sha256(file),
        400,
        features,
        "uint8; squashed to 224x224, bilinear, no antialiasing; to [-1, 1]",
        min_frames=10,
        frames_matter=True,
    )


def i3d_input(frames: Tensor) -> Tensor:
    """(B, 3, T, 224, 224) in [-1, 1] of uint8 frames (B, T, 3, H, W)."""
    x = interpolate(
        encoders.scaled(frames).flatten(0, 1), (224, 224), mode="bilinear", align_corners=False
    )
    return x.reshape(*frames.shape[:3], 224, 224).transpose(1, 2)


@cache
def videomae(path: str) -> Extractor:
    """The mean token of a VideoMAE in a transformers folder; its number of frames must be the clips'."""
    from transformers import VideoMAEModel

    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"videomae needs a transformers folder with config.json, as videomae:/path; found {path or 'no path'!r}"
        )
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not files:
        raise ValueError(f"{folder} holds no weights (model.safetensors)")
    try:
        net, loading = VideoMAEModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no VideoMAE: {first_line(error)}") from error
    if loading[
        "missing_keys"
    ]:  # transformers makes what is missing up, and only says so in its log
        raise ValueError(
            f"{folder} lacks weights of a VideoMAE, for instance {min(loading['missing_keys'])}"
        )
    net.eval().requires_grad_(False)
    about = read_json(folder / "preprocessor_config.json") or {}
    mean, std = (
        torch.tensor(about.get(key, default)).reshape(1, 3, 1, 1)
        for key, default in (
            ("image_mean", [0.485, 0.456, 0.406]),
            ("image_std", [0.229, 0.224, 0.225]),
        )
    )
    size, count = net.config.image_size, net.config.num_frames

    def features(frames: Tensor) -> Tensor:
        x = interpolate(
            (encoders.scaled(frames).flatten(0, 1) + 1) / 2,
            (size, size),
            mode="bilinear",
            align_corners=False,
        )
        x = ((x - mean) / std).reshape(*frames.shape[:3], size, size)
        return net(pixel_values=x).last_hidden_state.mean(1)

    # the configurations too: other means, another size or another activation make other features of the same weights
    files += sorted(folder.glob("*config.json"))
    digest = hashlib.sha256("".join(f.name + sha256(f) for f in files).encode()).hexdigest()
    return Extractor(
        f"videomae-{folder.name}",
        1,
        digest,
        net.config.hidden_size,
        features,
        f"squashed to {size}x{size}, bilinear, no antialiasing; mean and standard deviation of the folder",
        min_frames=count,
        max_frames=count,
    )


EXTRACTORS: dict[str, Callable[[str], Extractor]] = {
    encoders.CLASSIFIER: classifier,
    "random-r2p1": random_r2p1,
    "i3d-k400-logits-400": i3d,
    "videomae": videomae,
}
