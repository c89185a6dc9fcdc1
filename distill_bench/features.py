"""Frozen networks that look at clips for the evaluators: what each takes, and what it gives, cached on disk.

An extractor is named `name` or `name:path`; further ones are `module:function` or `path/to/file.py:function` of no argument that
gives an `Extractor`. Its id carries the sha256 of its weights, and the frames where they change the value.
"""

import hashlib
import importlib
import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distill_bench import encoders, shapes
from distill_bench.evaluator import Clips
from distill_bench.store import first_line, read_json, sha256, write_bytes

# clips a forward, and values of frames, which cuts that of large clips; fixed, so that no bit depends on them nor on the ranks
BATCH, VALUES = 32, 2**26
CACHE_VERSION = 2  # of the code between frames and features that no id names


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


def refuse_seen(seen: frozenset[int], clips: Clips, name: str, why: str) -> None:
    """ValueError for clips that a network was trained on."""
    known = len(seen.intersection(clips.digests))
    if known:
        raise ValueError(f"{name} was trained on {known} of these clips: {why}")


def batched(net: Callable[[Tensor], Tensor], frames: np.ndarray, name: str) -> Tensor:
    """`net` on every clip, in batches of one size; under torch.distributed the ranks share the batches and all get all.

    Raises:
        ValueError: if the network gives another number of rows than clips.
    """
    rank, ranks = place()
    size = max(1, min(BATCH, VALUES // frames[0].size))
    starts = range(0, len(frames), size)
    mine: dict[int, Tensor] = {}
    console = Console(file=sys.stderr, quiet=not sys.stderr.isatty() or rank > 0)
    with torch.no_grad():
        for start in track(starts[rank::ranks], name, console=console, transient=True):
            part = torch.from_numpy(frames[start : start + size])
            try:
                found = net(part).float().cpu()
            except (
                ArithmeticError,
                AssertionError,
                AttributeError,
                LookupError,
                TypeError,
            ) as error:  # a stranger's code
                raise ValueError(
                    f"{name} fails on these clips: {type(error).__name__}: {first_line(error)}"
                ) from error
            if len(found) != len(part):
                raise ValueError(f"{name} gave {len(found)} rows for {len(part)} clips")
            mine[start] = found
    if ranks > 1:
        everyone: list[dict[int, Tensor]] = [{} for _ in range(ranks)]
        torch.distributed.all_gather_object(everyone, mine)
        mine = {start: part for each in everyone for start, part in each.items()}
    return torch.cat([mine[start] for start in starts])


def place() -> tuple[int, int]:
    """Rank and number of ranks under torch.distributed, else 0 and 1."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def of_first_rank(make: Callable[[], Any]) -> Any:
    """What `make` gives, or raises, on the first rank, on every rank.

    What all must agree on is looked at by one: a file that another job writes between two looks would leave some ranks waiting,
    and so would an error of one rank alone.
    """
    rank, ranks = place()
    if ranks == 1:
        return make()
    box: list[Any] = [None, None]
    if not rank:
        try:
            box[0] = make()
        except (ValueError, OSError) as error:
            box[1] = error
    torch.distributed.broadcast_object_list(box, 0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def cached(key: str, clips: Clips, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives for these frames; kept in the clips' cache folder by the key and the digest of the frames.

    What is torn or damaged there is made again.

    Raises:
        ValueError: if a file there says that it was made from something else.
    """
    about = {"key": key, "frames": clips.digest, "cache_version": str(CACHE_VERSION)}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = None if clips.cache is None else clips.cache / f"{name}.safetensors"
    kept = of_first_rank(lambda: None if path is None else _kept(path, about))
    if kept is not None:
        return kept
    made = make().contiguous()
    if path is not None and not place()[0]:
        try:
            write_bytes(path, save({"features": made}, about | {"sha256": _sum(made)}))
        except OSError as error:  # a read-only folder of someone else's clips
            print(f"features are not kept: {error}", file=sys.stderr)
    return made


def _kept(path: Path, about: dict[str, str]) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            said, features = file.metadata() or {}, file.get_tensor("features")
            if {**said, "sha256": ""} != {**about, "sha256": ""}:
                raise ValueError(
                    f"the cache {path} was made from other clips or another network: delete it"
                )
            return features if said.get("sha256") == _sum(features) else None
    except SafetensorError:
        return None


def _sum(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().numpy().tobytes()).hexdigest()


# Extractors


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
                _module_at(Path(where)) if where.endswith(".py") else importlib.import_module(where)
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
    file = _weights(path, "i3d-k400-logits-400", "the TorchScript file i3d_torchscript.pt")
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


# CLIPs


@dataclass(frozen=True)
class ClipModel:
    """A frozen CLIP; `embed` and `embed_text` give unit vectors."""

    id: str
    embed: Callable[
        [Tensor], Tensor
    ]  # uint8 frames (B, 3, H, W), or clips (B, T, 3, H, W) where `whole` -> (B, d)
    embed_text: Callable[[Tensor], Tensor]  # tokens (B, L) -> (B, d)
    tokenize: Callable[[list[str]], Tensor]
    whole: bool = False  # sees clips, not single frames
    seen: frozenset[int] = frozenset()  # digests of the clips that it was trained on

    def similarities(self, clips: Clips) -> tuple[Tensor, Tensor]:
        """100 times the cosine of every clip with every distinct caption, (N, captions), frames averaged; each clip's caption.

        Captions of equal tokens are one: a model that drops words is not asked to tell what it cannot read.

        Raises:
            ValueError: if the clips were in its training, or its cosines are no numbers.
        """
        refuse_seen(self.seen, clips, self.id, "their scores mean nothing")
        kinds, kind = self.tokenize(clips.prompts).unique(dim=0, return_inverse=True)
        with torch.no_grad():
            text = self.embed_text(kinds).float()
        image = cached(
            f"{self.id}-embedding", clips, lambda: batched(self._embedded, clips.frames, self.id)
        )
        cosine = 100 * (image @ text.T)
        cosine = cosine if self.whole else cosine.mean(1)
        if not cosine.isfinite().all():
            raise ValueError(f"{self.id} gave cosines that are not finite")
        return cosine, kind

    def _embedded(self, frames: Tensor) -> Tensor:
        if self.whole:
            return self.embed(frames)
        return self.embed(frames.flatten(0, 1)).reshape(*frames.shape[:2], -1)


@cache
def indomain_clip(whole: bool) -> ClipModel:
    """The shipped CLIP of single frames, which ignores words that no frame shows, or of whole clips."""
    name, words = (
        (encoders.VIDEO_CLIP, encoders.CLIP_WORDS)
        if whole
        else (encoders.FRAME_CLIP, encoders.FRAME_WORDS)
    )
    model, digest, seen = encoders.load_encoder(
        encoders.video_clip() if whole else encoders.frame_clip(), name
    )

    def embed(images: Tensor) -> Tensor:
        x = encoders.scaled(images)
        return model.encode_image(x.transpose(1, 2) if whole else x, normalize=True)

    return ClipModel(
        f"{name}#{digest[:8]}",
        embed,
        lambda tokens: model.encode_text(tokens, normalize=True),
        lambda prompts: encoders.tokenize(prompts, words),
        whole,
        seen,
    )


@cache
def open_clip_model(spec: str) -> ClipModel:
    """A CLIP of open_clip: `local-dir:/folder`, `MODEL:TAG` or `MODEL:/weights/file`; without weights it is an error.

    Weights by file come with no metadata: OpenAI's need a `-quickgelu` model.
    """
    import open_clip

    name, _, weights = spec.partition(":")
    logging.disable(logging.ERROR)  # what open_clip has to say is said below, in one line
    try:
        if name == "local-dir":
            folder = Path(weights)
            files = sorted(
                p
                for p in folder.glob("open_clip_*")
                if p.suffix in {".safetensors", ".bin", ".pt", ".pth"}
            )
            if not (folder / "open_clip_config.json").is_file() or not files:
                raise ValueError("it needs open_clip_config.json and open_clip_model.safetensors")
            model, _, preprocess = open_clip.create_model_and_transforms(
                spec, require_pretrained=True
            )
            tokenizer = open_clip.get_tokenizer(spec)
            digest = hashlib.sha256(
                (_state_digest(model) + sha256(folder / "open_clip_config.json")).encode()
            ).hexdigest()
        else:
            if not weights:
                raise ValueError(
                    "weights are missing: write MODEL:TAG, MODEL:/weights/file or local-dir:/folder"
                )
            model, _, preprocess = open_clip.create_model_and_transforms(
                name, pretrained=weights, require_pretrained=True
            )
            tokenizer = open_clip.get_tokenizer(name)
            digest = _state_digest(model)
    except (
        Exception
    ) as error:  # torch answers a file that is none of its own with errors of many kinds
        raise ValueError(f"no CLIP at {spec!r}: {first_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    model.eval().requires_grad_(False)

    def embed(frames: Tensor) -> Tensor:
        from torchvision.transforms.functional import to_pil_image

        return model.encode_image(
            torch.stack([preprocess(to_pil_image(f)) for f in frames]), normalize=True
        )

    label = Path(weights).name if name == "local-dir" else f"{name}-{Path(weights).stem}"
    return ClipModel(
        f"open_clip-{label}#{digest[:8]}",
        embed,
        lambda t: model.encode_text(t, normalize=True),
        tokenizer,
    )


def _state_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _weights(path: str, name: str, what: str) -> Path:
    if not path:
        raise ValueError(f"{name} needs {what} by path: {name}:/path")
    if not Path(path).is_file():
        raise ValueError(f"no weights at {path}: {name} needs {what}")
    return Path(path)


@cache
def _module_at(path: Path):
    spec = importlib.util.spec_from_file_location(
        f"distill_bench_extractor_{path.stem}", path.resolve()
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
