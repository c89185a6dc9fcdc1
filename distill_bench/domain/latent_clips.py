"""Latents as clips of grey squares, from which they can be read back almost exactly.

8 bits are coarser than a narrow mode of a mixture. Ordered dithering spreads the remainder over the
pixels of a square: each pixel rounds down after adding its own threshold, and the thresholds are
equally spaced, so the mean over the square is the latent to within `ERROR`.
"""

import numpy as np
import torch
from torch import Tensor

from distill_bench.domain.closed_form import enlarged

RANGE = 8.0  # a latent of -RANGE is black, of RANGE white; others are clamped
FRAMES, PIXELS = 2, 4  # of a latent's square: frames, and pixels along both sides
SQUARE = FRAMES * PIXELS * PIXELS * 3  # values per latent
ERROR = RANGE / 255 / SQUARE  # largest difference between a latent and its reading


def grey_video(latents: Tensor) -> Tensor:
    """Video (B, 3, F, Y, X) in [-1, 1] of latents (B, 1, T, H, W), without dithering."""
    return enlarged(latents / RANGE, FRAMES, PIXELS)


def dithered(latents: Tensor) -> Tensor:
    """Frames uint8 (B, F, 3, Y, X) of latents (B, 1, T, H, W), on the CPU."""
    levels = (grey_video(latents.detach().double().cpu()).clamp(-1, 1) + 1) * 127.5
    _, _, frames, height, width = levels.shape
    repeats = (1, frames // FRAMES, height // PIXELS, width // PIXELS)
    return (levels + _thresholds().repeat(repeats)).floor().to(torch.uint8).transpose(1, 2)


def undithered(frames: np.ndarray, shape: tuple[int, int, int, int]) -> Tensor:
    """Latents (B, 1, T, H, W), float64, of dithered frames uint8 (B, F, 3, Y, X).

    Args:
        shape: of a latent, (1, T, H, W).

    Raises:
        ValueError: if the frames have another size than clips of such latents.
    """
    _, t, h, w = shape
    size = (FRAMES * t, 3, PIXELS * h, PIXELS * w)
    if frames.shape[1:] != size:
        raise ValueError(f"clips are {frames.shape[1:]} (T, 3, H, W), but latents need {size}")
    squares = frames.reshape(len(frames), t, FRAMES, 3, h, PIXELS, w, PIXELS)
    levels = squares.mean((2, 3, 5, 7), dtype=np.float64)
    return torch.from_numpy((levels / 127.5 - 1) * RANGE)[:, None]


def _thresholds() -> Tensor:
    """Thresholds (3, FRAMES, PIXELS, PIXELS) of a square, equally spaced in (0, 1), shuffled."""
    order = torch.randperm(SQUARE, generator=torch.Generator().manual_seed(0))
    return ((order.double() + 0.5) / SQUARE).reshape(3, FRAMES, PIXELS, PIXELS)
