"""Mistakes to plant in the preprocessing of extractors: range, channels, axes, frames, resizing."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from distill_bench.evaluate.encoders import scaled


def resized(**settings) -> Callable[..., Tensor]:
    """Replacement of the extractors' `interpolate` with other settings."""

    def wrong(x: Tensor, size: tuple[int, int], **own) -> Tensor:
        merged = own | settings
        if merged["mode"] == "nearest":
            merged = {"mode": "nearest"}
        return interpolate(x, size, **merged)

    return wrong


def cropped(x: Tensor, size: tuple[int, int], **own) -> Tensor:
    """Resize a square cut out of the centre."""
    square = v2.functional.center_crop(x, min(x.shape[-2:]))
    return interpolate(square, size, **own)


SCALED = {  # replacements of `encoders.scaled`, on which all extractors rest
    "range 0 to 1": lambda x: (scaled(x) + 1) / 2,
    "range 0 to 255": lambda x: x.float(),
    "range of 8 bits divided by 256": lambda x: x.float() / 128 - 1,
    "blue first": lambda x: scaled(x.flip(-3)),
    "grey": lambda x: scaled(x).mean(-3, keepdim=True).expand(x.shape),
    "T and C swapped": lambda x: scaled(x).transpose(-4, -3).reshape(x.shape),
    "H and W swapped": lambda x: scaled(x).transpose(-2, -1).reshape(x.shape),
    "rows from the bottom": lambda x: scaled(x.flip(-2)),
    "frames backwards": lambda x: scaled(x.flip(-4)),
    "every second frame, twice": lambda x: scaled(x[:, torch.arange(x.shape[1]) // 2 * 2]),
    "one frame late": lambda x: scaled(torch.cat([x[:, 1:], x[:, -1:]], 1)),
}
RESIZED = {  # replacements of the extractors' `interpolate`
    "nearest": resized(mode="nearest"),
    "bicubic": resized(mode="bicubic"),
    "corners aligned": resized(align_corners=True),
    "cropped": cropped,
}
