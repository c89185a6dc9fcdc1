"""Networks shipped for the embedded domain: a clip classifier, a CLIP of frames, a CLIP of clips.

`distill-bench pretrain --encoders` trains them in minutes on one core (`pretrain/fit_encoders.py`).
Their files are float16 safetensors, each with a card, and hold the digests of all training clips,
so that a training clip is never scored or used as a reference.
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
CLASSIFIER = "indomain-r2p1-cls"
FRAME_CLIP = "indomain-frameclip"
VIDEO_CLIP = "indomain-videoclip"

DIM = 32  # features of the classifier; a protocol of 256 clips has 8 clips per feature
CONTEXT = 12  # tokens per caption

HEADS = {  # classes of each head of the classifier
    "colour": list(shapes.COLOURS),
    "shape": list(shapes.SHAPES),
    "speed": list(shapes.SPEEDS),
}
# vectors (x, y), y pointing down, that the classifier regresses
VECTORS = (
    "velocity",  # of the body, pixels per frame
    "heading",  # from the body to the nose, a unit vector
)
CLIP_WORDS = sorted({word for a in shapes.all_attributes() for word in shapes.caption(a).split()})
# words that a single frame can show; captions that differ only in speed become equal
FRAME_WORDS = [*shapes.COLOURS, *shapes.SHAPES, *shapes.DIRECTIONS]


def kind_in_frame(attributes: shapes.Attributes) -> str:
    """Kind of a caption in FRAME_WORDS: `direction`, also if it names the speed, or `free`."""
    return "direction" if attributes.direction else "free"


class R2P1(nn.Module):
    """(2+1)D convolutions (Tran et al., 2018) and a linear layer on their mean over T, H and W.

    (B, 3, T, H, W) in [-1, 1] -> (B, dim).
    """

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
            padding = (0, size // 2, size // 2)
            spatial = nn.Conv3d(before, width, (1, size, size), (1, 2, 2), padding)
            temporal = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))
            layers += [spatial, norm(width), nn.ReLU(), temporal, norm(width), nn.ReLU()]
            before = width
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(before, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x).mean((2, 3, 4)))


class Classifier(nn.Module):
    """Attributes and motion of a clip: one linear head each on features (B, DIM).

    Heads give logits of HEADS, and the values of VECTORS.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = R2P1(DIM)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(DIM, len(classes)) for name, classes in HEADS.items()}
            | {name: nn.Linear(DIM, 2) for name in VECTORS}
        )
        self.register_buffer("mean", torch.zeros(DIM))
        self.register_buffer("std", torch.ones(DIM))

    def standard_features(self, x: Tensor) -> Tensor:
        """Features standardised over the training clips, so that no dimension dominates."""
        return (self.features(x) - self.mean) / self.std

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.features(x).relu()
        return {name: head(hidden) for name, head in self.heads.items()}


class FrameTower(nn.Module):
    """Visual tower of the frame CLIP: frames (B, 3, 32, 32) in [-1, 1] -> (B, dim)."""

    def __init__(self, dim: int, widths: tuple[int, ...] = (24, 48, 64, 96)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for i, width in enumerate(widths):
            stride = 1 if i == 0 else 2
            layers += [
                nn.Conv2d(before, width, 3, stride, 1),
                nn.GroupNorm(8, width),
                nn.ReLU(),
            ]
            before = width
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(before, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x).mean((2, 3)))


def frame_clip() -> nn.Module:
    """Untrained CLIP of single frames."""
    return _small_clip(FrameTower, FRAME_WORDS)


def video_clip() -> nn.Module:
    """Untrained CLIP of whole clips."""
    return _small_clip(R2P1, CLIP_WORDS)


def _small_clip(tower: Callable[[int], nn.Module], words: list[str]) -> nn.Module:
    """open_clip's own CLIP class with a small vocabulary and visual tower."""
    import open_clip  # slow to import

    dim = 64
    placeholder = {  # replaced by the tower
        "layers": 1,
        "width": 64,
        "head_width": 64,
        "patch_size": 16,
        "image_size": 32,
    }
    text = {
        "context_length": CONTEXT,
        "vocab_size": len(words) + 2,
        "width": 64,
        "heads": 2,
        "layers": 2,
    }
    model = open_clip.CLIP(embed_dim=dim, vision_cfg=placeholder, text_cfg=text)
    model.visual = tower(dim)
    return model


def tokenize(prompts: list[str], words: list[str]) -> Tensor:
    """Tokens (B, CONTEXT) of the known words, then the largest id, at which open_clip pools."""
    index = {word: i + 1 for i, word in enumerate(words)}
    tokens = torch.zeros(len(prompts), CONTEXT, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = [index[word] for word in re.findall(r"[a-z]+", prompt.lower()) if word in index]
        ids = [*ids[: CONTEXT - 1], len(words) + 1]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def scaled(frames: Tensor) -> Tensor:
    """Convert uint8 frames to float32 in [-1, 1]."""
    if frames.dtype != torch.uint8:
        raise ValueError(f"clips are {frames.dtype}; they must be uint8 in 0..255")
    return frames.float().div_(127.5).sub_(1)  # in place: copies of clips are slow


def load_encoder(
    net: nn.Module, name: str, folder: Path = FOLDER
) -> tuple[nn.Module, str, frozenset[int]]:
    """Load weights into `net`; return it with the file's sha256 and its training clips' digests."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise ValueError(f"no weights at {path}; train them: distill-bench pretrain --encoders")
    state = load_file(path)
    seen = frozenset(state.pop("trained_on").tolist())
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return net.eval().requires_grad_(False), sha256(path), seen
