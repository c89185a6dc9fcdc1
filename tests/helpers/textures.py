"""Clips of coloured textures in motion, large enough that every kind of resizing shows."""

import numpy as np
import torch
from torch.nn.functional import interpolate

BRIGHTNESS = (1.0, 0.9, 0.7)


def textured_clips(
    count: int, frames: int, height: int, width: int, seed: int, contrast: float = 1.0
) -> np.ndarray:
    """Coarse and fine textures that move, uint8 (N, T, 3, H, W).

    No colour is like another, and brightness falls over three frames and jumps back, so that
    neither channels nor time can be turned round unnoticed.
    """
    draw = torch.Generator().manual_seed(seed)
    coarse = interpolate(
        torch.rand(count, 3, 6, 6, generator=draw), (height, width), mode="bicubic"
    )
    still = 0.7 * coarse + 0.3 * torch.rand(count, 3, height, width, generator=draw)
    still = contrast * still * torch.tensor([1.0, 0.7, 0.4]).reshape(3, 1, 1)
    moving = [still.roll((t, 3 * t), (-2, -1)) * BRIGHTNESS[t % 3] for t in range(frames)]
    clips = torch.stack(moving, 1)
    return (255 * clips.clamp(0, 1)).round().byte().numpy()
