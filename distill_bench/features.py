"""Networks that look at clips for the evaluators: how they are trained, shipped and loaded.

    python -m distill_bench.features --out distill_bench/assets/features

trains the two shipped ones on rendered clips in minutes on one core: a (2+1)D classifier, whose penultimate layer is the feature,
and a CLIP of single frames and captions. Weights are float16 safetensors with a card; the id of a network carries their digest.
Both know "moving shapes" only: other clips need weights of one's own, which no command here downloads.
"""

import argparse
import hashlib
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from distill_bench import shapes
from distill_bench.draws import generator
from distill_bench.store import read_json, write_bytes, write_json

ASSETS = Path(__file__).parent / "assets" / "features"
CLASSIFIER, FRAME_CLIP = "indomain-r2p1-cls", "indomain-frameclip"
TRAIN_KEYS, HELD_OUT_KEYS = 1_000_000, 900_000  # references are rendered from keys below 900,000
BATCH = 32  # clips a forward

HEADS = {"colour": list(shapes.COLOURS), "shape": list(shapes.SHAPES)}
HEADS |= {"direction": list(shapes.DIRECTIONS), "speed": list(shapes.SPEEDS)}
# What one frame can show: captions that differ in other words only (the speed) are one caption to a frame.
WORDS = [*shapes.COLOURS, *shapes.SHAPES, *shapes.DIRECTIONS]


@dataclass(frozen=True)
class Extractor:
    """A frozen network from clips to features; calling it maps uint8 (N, T, 3, H, W) to float32 (N, d)."""

    id: str  # name#digest
    net: Callable[[Tensor], Tensor]  # uint8 (B, T, 3, H, W) -> (B, d)

    def __call__(self, frames: np.ndarray, batch: int = BATCH) -> Tensor:
        with torch.no_grad():
            parts = [self.net(torch.from_numpy(frames[i : i + batch])) for i in range(0, len(frames), batch)]
        features = torch.cat(parts).float()
        if features.ndim != 2 or len(features) != len(frames):
            raise ValueError(f"{self.id} gave features {tuple(features.shape)} for {len(frames)} clips")
        if not features.isfinite().all():
            raise ValueError(f"{self.id} gave features that are not finite")
        if not (features.std(0) > 0).any():
            raise ValueError(f"{self.id} gave the same features for all {len(frames)} clips")
        return features


@dataclass(frozen=True)
class ClipModel:
    """A frozen CLIP: both towers give unit vectors."""

    id: str
    encode_frames: Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) -> (B, d)
    encode_tokens: Callable[[Tensor], Tensor]  # (B, L) -> (B, d)
    tokenize: Callable[[list[str]], Tensor]  # (B, L); prompts with equal tokens are one prompt


class Classifier(nn.Module):
    """(2+1)D convolutions with group norm; four heads on `features`, (B, 64). Input (B, 3, T, H, W) in [-1, 1]."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 48, 64), dim: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for i, width in enumerate(widths):
            stride = 1 if i == 0 else 2
            layers += [nn.Conv3d(before, width, (1, 3, 3), (1, stride, stride), (0, 1, 1)), nn.GroupNorm(8, width), nn.ReLU()]
            layers += [nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0)), nn.GroupNorm(8, width), nn.ReLU()]
            before = width
        self.body = nn.Sequential(*layers)
        self.penultimate = nn.Linear(before, dim)
        self.heads = nn.ModuleDict({name: nn.Linear(dim, len(values)) for name, values in HEADS.items()})

    def features(self, x: Tensor) -> Tensor:
        return self.penultimate(self.body(x).mean((2, 3, 4)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.features(x).relu()
        return {name: head(hidden) for name, head in self.heads.items()}


class FrameTower(nn.Module):
    """The visual tower of the frame CLIP: frames (B, 3, 32, 32) in [-1, 1] -> (B, dim)."""

    def __init__(self, dim: int, widths: tuple[int, ...] = (24, 48, 64, 96)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for i, width in enumerate(widths):
            layers += [nn.Conv2d(before, width, 3, 1 if i == 0 else 2, 1), nn.GroupNorm(8, width), nn.ReLU()]
            before = width
        self.body, self.out = nn.Sequential(*layers), nn.Linear(before, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x).mean((2, 3)))


def frame_clip() -> nn.Module:
    """open_clip's own CLIP with a vocabulary of a dozen words and a convolutional visual tower, untrained."""
    import open_clip

    dim = 64
    vision = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 16, "image_size": 32}  # replaced by the tower
    text = {"context_length": 8, "vocab_size": len(WORDS) + 2, "width": 64, "heads": 2, "layers": 2}
    model = open_clip.CLIP(embed_dim=dim, vision_cfg=vision, text_cfg=text)
    model.visual = FrameTower(dim)
    return model


def tokenize(prompts: list[str]) -> Tensor:
    """Tokens (B, 8) of the words that one frame can show, closed by the largest id, where open_clip pools."""
    tokens = torch.zeros(len(prompts), 8, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = [WORDS.index(w) + 1 for w in re.findall(r"[a-z]+", prompt.lower()) if w in WORDS][:7]
        row[: len(ids) + 1] = torch.tensor([*ids, len(WORDS) + 1])
    return tokens


@cache
def load_classifier(folder: Path = ASSETS) -> Extractor:
    """The shipped classifier as an extractor, for clips of 8 frames of 32x32."""
    net, digest = _load(Classifier(), folder, CLASSIFIER)
    expected = (shapes.FRAMES, 3, shapes.SIZE, shapes.SIZE)

    def features(frames: Tensor) -> Tensor:
        if tuple(frames.shape[1:]) != expected:
            raise ValueError(f"{CLASSIFIER} takes clips {expected}; found {tuple(frames.shape[1:])}")
        return net.features(scaled(frames).transpose(1, 2))

    return Extractor(f"{CLASSIFIER}#{digest}", features)


@cache
def load_i3d(path: Path) -> Extractor:
    """I3D in TorchScript (StyleGAN-V's `i3d_torchscript.pt`): logits of Kinetics-400, (B, 400); 10 frames or more."""
    net, digest = torch.jit.load(str(path), map_location="cpu").eval(), _digest(path)

    def features(frames: Tensor) -> Tensor:
        if frames.shape[1] < 10:
            raise ValueError(f"I3D needs 10 frames or more; found {frames.shape[1]}")
        # its own rescaling takes 0..255; the names are those of the published file
        found = net(frames.float().transpose(1, 2), rescale=True, resize=True, return_features=True)
        return found.reshape(len(frames), -1)

    return Extractor(f"i3d-k400-logits-400#{digest}", features)


@cache
def load_frame_clip(folder: Path = ASSETS) -> ClipModel:
    """The shipped frame CLIP; it ignores words that no frame shows."""
    model, digest = _load(frame_clip(), folder, FRAME_CLIP)
    return ClipModel(
        f"{FRAME_CLIP}#{digest}",
        lambda frames: model.encode_image(scaled(frames), normalize=True),
        lambda tokens: model.encode_text(tokens, normalize=True),
        tokenize,
    )


@cache
def load_open_clip(folder: Path) -> ClipModel:
    """A CLIP from a local folder with `open_clip_config.json` and weights; a model without weights is an error."""
    import open_clip

    weights = sorted(p for p in folder.glob("open_clip_*") if p.suffix in {".safetensors", ".bin", ".pt", ".pth"})
    if not (folder / "open_clip_config.json").is_file() or not weights:
        raise ValueError(f"{folder} is no CLIP folder: it needs open_clip_config.json and open_clip_model.safetensors")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
    model.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")

    def encode_frames(frames: Tensor) -> Tensor:
        from torchvision.transforms.functional import to_pil_image

        return model.encode_image(torch.stack([preprocess(to_pil_image(f)) for f in frames]), normalize=True)

    name = f"open_clip-{folder.name}#{_digest(weights[0])}"
    return ClipModel(name, encode_frames, lambda t: model.encode_text(t, normalize=True), tokens)


def scaled(frames: Tensor) -> Tensor:
    """uint8 to float in [-1, 1]."""
    if frames.dtype != torch.uint8:
        raise ValueError(f"clips must be uint8; found {frames.dtype}")
    return frames.float() / 127.5 - 1


def _load(net: nn.Module, folder: Path, name: str) -> tuple[nn.Module, str]:
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise ValueError(f"no weights at {path}: train them with python -m distill_bench.features --out {folder}")
    net.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return net.eval().requires_grad_(False), _digest(path)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


# Training


def main(argv: list[str] | None = None) -> int:
    """Command line: train and write both networks with their cards."""
    parser = argparse.ArgumentParser(prog="distill_bench.features", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, default=900, help="updates of each network")
    parser.add_argument("--clips", type=int, default=4320, help="rendered training clips")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    train, labels = rendered(options.clips, TRAIN_KEYS)
    held_out, held_labels = rendered(648, HELD_OUT_KEYS)
    command = f"python -m distill_bench.features --steps {options.steps} --clips {options.clips} --seed {options.seed}"
    for name, fit, score in (
        (CLASSIFIER, fit_classifier, classifier_accuracy),
        (FRAME_CLIP, fit_frame_clip, retrieval_accuracy),
    ):
        begin = time.monotonic()
        net = fit(train, labels, options.steps, options.seed)
        seconds = round(time.monotonic() - begin)
        half = {k: v.detach().half().contiguous() for k, v in net.state_dict().items()}
        net.load_state_dict({k: v.float() for k, v in half.items()})
        path = options.out / f"{name}.safetensors"
        write_bytes(path, save(half))
        card = {"id": f"{name}#{_digest(path)}", "command": command, "seed": options.seed, "train_seconds": seconds}
        card |= {"torch": torch.__version__, "parameters": sum(p.numel() for p in net.parameters())}
        card |= {"train_keys_from": TRAIN_KEYS, "held_out_keys_from": HELD_OUT_KEYS}
        card |= {"held_out_clips": len(held_out), "held_out_accuracy": score(net.eval(), held_out, held_labels)}
        write_json(path.with_suffix(".json"), card)
        print(json.dumps(card), flush=True)
    return 0


def rendered(count: int, first_key: int) -> tuple[np.ndarray, list[shapes.Attributes]]:
    """`count` clips that go through all attributes in turn, each with a key of its own."""
    everything = shapes.all_attributes()
    labels = [everything[i % len(everything)] for i in range(count)]
    return np.stack([shapes.render(a, first_key + i) for i, a in enumerate(labels)]), labels


def fit_classifier(clips: np.ndarray, labels: list[shapes.Attributes], steps: int, seed: int) -> Classifier:
    """Cross entropy of the four heads, summed."""
    torch.manual_seed(seed)
    net, draw = Classifier(), generator("features", seed)
    answers = _answers(labels)

    def loss(_: int) -> Tensor:
        chosen = torch.randint(len(clips), (32,), generator=draw)
        logits = net(scaled(torch.from_numpy(clips[chosen.numpy()])).transpose(1, 2))
        return sum(nn.functional.cross_entropy(logits[k], answers[k][chosen]) for k in HEADS)

    _descend(net, loss, steps, 3e-3)
    return net


def fit_frame_clip(clips: np.ndarray, labels: list[shapes.Attributes], steps: int, seed: int) -> nn.Module:
    """open_clip's contrastive loss on batches that hold each caption once, so that no negative is false."""
    import open_clip

    torch.manual_seed(seed)
    net, draw, contrast = frame_clip(), generator("features", seed), open_clip.ClipLoss()
    tokens = tokenize([shapes.caption(a) for a in labels])
    kinds, kind = tokens.unique(dim=0, return_inverse=True)
    members = [(kind == k).nonzero()[:, 0] for k in range(len(kinds))]

    def loss(_: int) -> Tensor:
        chosen = torch.stack([m[torch.randint(len(m), (1,), generator=draw)[0]] for m in members])
        at = torch.randint(clips.shape[1], (len(chosen),), generator=draw)
        image = net.encode_image(scaled(torch.from_numpy(clips[chosen.numpy(), at.numpy()])), normalize=True)
        return contrast(image, net.encode_text(tokens[chosen], normalize=True), net.logit_scale.exp())

    def clamp() -> None:
        with torch.no_grad():
            net.logit_scale.clamp_(max=math.log(100))

    _descend(net, loss, steps, 2e-3, clamp)
    return net


def _descend(
    net: nn.Module, loss: Callable[[int], Tensor], steps: int, lr: float, after: Callable[[], None] = lambda: None
) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        after()
        if step % 100 == 0 or step == steps - 1:
            print(f"{type(net).__name__} step {step}: loss {value.item():.3f}", flush=True)


@torch.no_grad()
def classifier_accuracy(net: Classifier, clips: np.ndarray, labels: list[shapes.Attributes]) -> dict[str, float]:
    """Share of clips that each head names rightly."""
    answers = _answers(labels)
    parts = [net(scaled(torch.from_numpy(clips[i : i + BATCH])).transpose(1, 2)) for i in range(0, len(clips), BATCH)]
    return {k: (torch.cat([p[k] for p in parts]).argmax(1) == answers[k]).float().mean().item() for k in HEADS}


@torch.no_grad()
def retrieval_accuracy(net: nn.Module, clips: np.ndarray, labels: list[shapes.Attributes]) -> dict[str, float]:
    """Share of middle frames whose nearest caption is their own, and 100 times the cosine with it."""
    kinds, kind = tokenize([shapes.caption(a) for a in labels]).unique(dim=0, return_inverse=True)
    frames = torch.from_numpy(clips[:, clips.shape[1] // 2])
    cosine = net.encode_image(scaled(frames), normalize=True) @ net.encode_text(kinds, normalize=True).T
    own = cosine.gather(1, kind[:, None]).mean().item()
    return {"captions": len(kinds), "r1": (cosine.argmax(1) == kind).float().mean().item(), "cosine_x100": 100 * own}


def _answers(labels: list[shapes.Attributes]) -> dict[str, Tensor]:
    rows = [asdict(a) for a in labels]
    return {k: torch.tensor([values.index(row[k]) for row in rows]) for k, values in HEADS.items()}


def card(name: str, folder: Path = ASSETS) -> dict:
    """What is known of a shipped network."""
    return read_json(folder / f"{name}.json") or {}


if __name__ == "__main__":
    raise SystemExit(main())
