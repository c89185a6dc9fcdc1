"""The shipped networks that look at clips of the embedded domain, and their training: minutes on one core.

    distill-bench pretrain --encoders

trains a (2+1)D classifier, whose penultimate layer is a feature, and two CLIPs of open_clip's own class: of single frames and of
whole clips. Weights are float16 safetensors with a card; with them lie the digests of every clip that they have seen, so that
none of those is taken for a reference. Reversed clips with the motion's own direction as label are half of what the networks of
clips see: without them they would read the direction off the nose, which a single frame shows.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill_bench import ASSETS
from distill_bench.domain import shapes
from distill_bench.store.files import sha256

FOLDER = ASSETS / "features"


CLASSIFIER, FRAME_CLIP, VIDEO_CLIP = "indomain-r2p1-cls", "indomain-frameclip", "indomain-videoclip"


DIM = 32  # of the classifier's feature: 5 d is below the 256 clips of a protocol


HEADS = {
    "colour": list(shapes.COLOURS),
    "shape": list(shapes.SHAPES),
    "speed": list(shapes.SPEEDS),
    "heading": list(shapes.DIRECTIONS),  # where the nose is
    "course": [*shapes.DIRECTIONS, "none"],  # where the body goes
}


CLIP_WORDS = sorted({word for a in shapes.all_attributes() for word in shapes.caption(a).split()})


# what one frame can show: captions that differ in other words (the speed) are one caption to a frame
FRAME_WORDS = [*shapes.COLOURS, *shapes.SHAPES, *shapes.DIRECTIONS]


CONTEXT = 12  # tokens of a caption


class R2P1(nn.Module):
    """(2+1)D convolutions (Tran et al., 2018) and a linear layer on their mean: (B, 3, T, H, W) in [-1, 1] -> (B, dim)."""

    def __init__(
        self,
        dim: int,
        norm: Callable[[int], nn.Module] = nn.BatchNorm3d,
        widths: tuple[int, ...] = (24, 48, 96),
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in widths:
            size = 5 if before == 3 else 3
            layers += [
                nn.Conv3d(before, width, (1, size, size), (1, 2, 2), (0, size // 2, size // 2)),
                norm(width),
                nn.ReLU(),
            ]
            layers += [
                nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0)),
                norm(width),
                nn.ReLU(),
            ]
            before = width
        self.body, self.out = nn.Sequential(*layers), nn.Linear(before, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x).mean((2, 3, 4)))


class Classifier(nn.Module):
    """What a clip shows, from features (B, DIM): one linear head an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.features = R2P1(DIM)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(DIM, len(values)) for name, values in HEADS.items()}
        )
        self.register_buffer("mean", torch.zeros(DIM))
        self.register_buffer("std", torch.ones(DIM))

    def standard_features(self, x: Tensor) -> Tensor:
        """Features of mean 0 and standard deviation 1 over the training clips: no dimension outweighs the others."""
        return (self.features(x) - self.mean) / self.std

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
            layers += [
                nn.Conv2d(before, width, 3, 1 if i == 0 else 2, 1),
                nn.GroupNorm(8, width),
                nn.ReLU(),
            ]
            before = width
        self.body, self.out = nn.Sequential(*layers), nn.Linear(before, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x).mean((2, 3)))


def clip_of(tower: Callable[[int], nn.Module], words: list[str]) -> nn.Module:
    """open_clip's own CLIP with a vocabulary of a few words and a small visual tower, untrained."""
    import open_clip

    dim = 64
    vision = {
        "layers": 1,
        "width": 64,
        "head_width": 64,
        "patch_size": 16,
        "image_size": 32,
    }  # replaced by the tower
    text = {
        "context_length": CONTEXT,
        "vocab_size": len(words) + 2,
        "width": 64,
        "heads": 2,
        "layers": 2,
    }
    model = open_clip.CLIP(embed_dim=dim, vision_cfg=vision, text_cfg=text)
    model.visual = tower(dim)
    return model


def frame_clip() -> nn.Module:
    """The CLIP of single frames, untrained."""
    return clip_of(FrameTower, FRAME_WORDS)


def video_clip() -> nn.Module:
    """The CLIP of whole clips, untrained."""
    return clip_of(R2P1, CLIP_WORDS)


def tokenize(prompts: list[str], words: list[str]) -> Tensor:
    """Tokens (B, CONTEXT) of the known words, closed by the largest id, where open_clip pools."""
    tokens = torch.zeros(len(prompts), CONTEXT, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = [words.index(w) + 1 for w in re.findall(r"[a-z]+", prompt.lower()) if w in words][
            : CONTEXT - 1
        ]
        row[: len(ids) + 1] = torch.tensor([*ids, len(words) + 1])
    return tokens


def scaled(frames: Tensor) -> Tensor:
    """uint8 to float in [-1, 1]."""
    if frames.dtype != torch.uint8:
        raise ValueError(f"clips must be uint8 in 0..255; found {frames.dtype}")
    return (
        frames.float().div_(127.5).sub_(1)
    )  # in place: as long as a clip is moved about no network runs


def load_encoder(
    net: nn.Module, name: str, folder: Path = FOLDER
) -> tuple[nn.Module, str, frozenset[int]]:
    """`net` with the shipped weights, their sha256, and the digests of the clips that it was trained on."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise ValueError(f"no weights at {path}: train them with distill-bench pretrain --encoders")
    state = load_file(path)
    seen = frozenset(state.pop("trained_on").tolist())
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return net.eval().requires_grad_(False), sha256(path), seen
