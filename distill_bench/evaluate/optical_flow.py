"""Optical flow of clips: normal flow, Farneback or RAFT.

Each method is a function from one clip, uint8 (T, 3, H, W), to the speed of every pixel in pixels
per frame, (T - 1, h, w).
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, pad

from distill_bench.store.failures import first_line
from distill_bench.store.files import sha256

Speed = Callable[[np.ndarray], Tensor]
SMALL = 64  # shorter side in pixels up to which normal flow is used


def is_large(frames: np.ndarray) -> bool:
    """True if frames (..., H, W) are too large for normal flow."""
    return min(frames.shape[-2:]) > SMALL


def flow_method(frames: np.ndarray, raft: str | None) -> tuple[str, Speed]:
    """Name and function of the method: RAFT if its weights are given, else by frame size."""
    if raft is not None:
        return raft_speed(Path(raft))
    if is_large(frames):
        return "farneback-half", farneback_speed
    return "normal-flow", normal_speed


def normal_speed(clip: np.ndarray, epsilon: float = 4e-3) -> Tensor:
    """Normal flow |I_t| |grad I| / (|grad I|^2 + epsilon) of a blurred clip, summed over colours.

    Measures only the motion along the gradient. Underestimates speeds above 3 pixels per frame, and
    the speed of textures and small bodies (eval/motion_calibration.json). Intensities are in
    [0, 1]; epsilon damps noise.
    """
    x = _blurred(torch.from_numpy(clip).float() / 255)
    change = x[1:] - x[:-1]
    middle = pad((x[1:] + x[:-1]) / 2, (1, 1, 1, 1), mode="replicate")
    gx = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
    gy = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    steepness = gx.square() + gy.square()
    return (change.abs() * steepness.sqrt()).sum(1) / (steepness.sum(1) + epsilon)


def _blurred(x: Tensor) -> Tensor:
    """Gaussian blur with a standard deviation of one pixel; edges are repeated."""
    kernel = torch.exp(-0.5 * torch.arange(-3, 4).float() ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 7)
    x = pad(x, (3, 3, 3, 3), mode="replicate")
    return conv2d(conv2d(x, kernel[..., None, :], groups=3), kernel[..., :, None], groups=3)


def farneback_speed(clip: np.ndarray) -> Tensor:
    """Farneback's flow at half resolution (4 levels, window 21, 5 iterations), (T - 1, H/2, W/2).

    Speeds are in pixels of the full resolution.
    """
    import cv2  # optional: only for frames above SMALL

    grey = [
        cv2.cvtColor(np.ascontiguousarray(frame.transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY)
        for frame in clip
    ]
    half = [cv2.resize(g, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for g in grey]
    flows = [
        cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 4, 21, 5, 7, 1.5, 0)
        for first, second in pairwise(half)
    ]
    return 2 * torch.from_numpy(np.stack(flows)).norm(dim=-1)


def raft_speed(path: Path) -> tuple[str, Speed]:
    """Load torchvision's RAFT from a weights file; returns its name with digest, and its function.

    Raises:
        ValueError: if the file holds neither raft_small's weights nor raft_large's.
    """
    from torchvision.models.optical_flow import raft_large, raft_small  # slow; few need it

    if not path.is_file():
        raise ValueError(
            f"no weights at {path}; RAFT needs torchvision's raft_small_*.pth or raft_large_*.pth"
        )
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many kinds of error for a foreign file
        raise ValueError(f"{path} holds no weights: {first_line(error)}") from error
    for name, make in (("raft-small", raft_small), ("raft-large", raft_large)):
        net = make(weights=None)
        if net.state_dict().keys() == state.keys():
            net.load_state_dict(state)
            net.eval().requires_grad_(False)
            return f"{name}#{sha256(path)[:8]}", partial(_raft, net)
    raise ValueError(f"{path} holds neither raft_small nor raft_large weights of torchvision")


@torch.no_grad()
def _raft(net: nn.Module, clip: np.ndarray) -> Tensor:
    x = torch.from_numpy(clip).float() / 127.5 - 1
    height, width = x.shape[2:]
    if min(height, width) < 128:
        raise ValueError(f"frames are {height}x{width}; RAFT needs 128x128 or more")
    # RAFT takes multiples of 8
    x = interpolate(x, (height // 8 * 8, width // 8 * 8), mode="bilinear", align_corners=False)
    flow = torch.cat([net(a[None], b[None])[-1] for a, b in pairwise(x)])  # (T - 1, 2, H, W): x, y
    scale = torch.tensor([width / x.shape[3], height / x.shape[2]]).reshape(1, 2, 1, 1)
    return (flow * scale).norm(dim=1)
