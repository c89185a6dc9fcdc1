"""Optical flow of clips: Lucas-Kanade, Farneback or RAFT, and the speed of points that follow it.

Each method is a function from one clip, uint8 (T, 3, H, W), to the displacement (x, y) of every
pixel from each frame to the next, (T - 1, 2, h, w), in pixels of the clip and on its device. The
size h, w may be smaller than H, W. RAFT is an `nn.Module`, which must be on that device.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample, interpolate, pad

from distill_bench.evaluate.device import FittingBatches
from distill_bench.store.failures import first_line
from distill_bench.store.files import sha256

Flow = Callable[[Tensor], Tensor]
SMALLEST_RAFT = 128  # pixels per side
RAFT_PIXELS = 2**22  # per forward pass on a GPU: ten pairs of 480x832, about 5 GB
SMALL = 64  # shorter side in pixels up to which Lucas-Kanade is used
BLUR = 2.0  # standard deviation of the blur of frames in pixels: reads up to 4 pixels per frame
NEIGHBOURHOOD = 3.0  # standard deviation in pixels of the windows that share one flow vector
DAMPING = 3e-4  # squared gradient, intensities in [0, 1], below which flow is pulled towards 0


def is_large(frames: np.ndarray) -> bool:
    """True if frames (..., H, W) are too large for Lucas-Kanade at a single scale."""
    return min(frames.shape[-2:]) > SMALL


def flow_method(frames: np.ndarray, raft: str | None) -> tuple[str, Flow]:
    """Name and function of the method: RAFT if its weights are given, else by frame size."""
    if raft is not None:
        return raft_flow(Path(raft))
    if is_large(frames):
        return "farneback-half", farneback_flow
    return "lucas-kanade", lucas_kanade_flow


def net_speed(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """Net displacement of points over several frames, per frame, in pixels (h, w).

    Follows the point at each pixel of the first frame. Motion that turns back within these frames,
    such as the jitter of sampled clips, cancels; the mean speed of frame pairs would count it.

    Args:
        flow: displacements between successive frames, (T - 1, 2, h, w), in pixels of the clip.
        size: height and width of the clip.
    """
    height, width = flow.shape[2:]
    scale = torch.tensor([size[1] / width, size[0] / height]).reshape(2, 1, 1).to(flow.device)
    last = torch.tensor([width - 1.0, height - 1.0]).reshape(2, 1, 1).to(flow.device)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    start = torch.stack([x, y]).float().to(flow.device)
    place = start
    for step in flow:
        grid = (2 * place / last - 1).permute(1, 2, 0)[None]
        here = grid_sample(step[None], grid, padding_mode="border", align_corners=True)[0]
        place = (place + here / scale).clamp(torch.zeros_like(last), last)
    return ((place - start) * scale).norm(dim=0) / len(flow)


def lucas_kanade_flow(clip: Tensor) -> Tensor:
    """Flow by least squares in Gaussian windows (Lucas and Kanade, 1981), colours summed.

    A window of the size of a body holds edges of several directions, so that the flow of a body is
    found whole, and not only its part along the gradient. Errors: eval/motion_calibration.json.
    """
    x = _blurred(clip.float() / 255, BLUR)
    change = x[1:] - x[:-1]
    middle = pad((x[1:] + x[:-1]) / 2, (1, 1, 1, 1), mode="replicate")
    gx = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
    gy = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    products = [gx * gx, gx * gy, gy * gy, -gx * change, -gy * change]
    sums = torch.stack([product.sum(1) for product in products])  # over colours
    xx, xy, yy, x_change, y_change = _blurred(sums, NEIGHBOURHOOD)
    xx, yy = xx + DAMPING, yy + DAMPING
    determinant = xx * yy - xy * xy
    flow = yy * x_change - xy * y_change, xx * y_change - xy * x_change
    return torch.stack(flow, 1) / determinant[:, None]


def _blurred(x: Tensor, sd: float) -> Tensor:
    """Gaussian blur (..., H, W) with a standard deviation of `sd` pixels; edges are repeated."""
    return _blur(x.shape[-2], sd).to(x.device) @ x @ _blur(x.shape[-1], sd).T.to(x.device)


@cache
def _blur(size: int, sd: float) -> Tensor:
    """Matrix (size, size) that blurs a line of pixels."""
    radius = round(3 * sd)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / sd) ** 2)
    source = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1)
    weights = (kernel / kernel.sum()).expand(size, -1)
    return torch.zeros(size, size).scatter_add_(1, source, weights)


def farneback_flow(clip: Tensor) -> Tensor:
    """Farneback's flow at half resolution (4 levels, window 21, 5 iterations), on the processor."""
    import cv2  # optional: only for frames above SMALL

    grey = [
        cv2.cvtColor(np.ascontiguousarray(frame.transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY)
        for frame in clip.cpu().numpy()
    ]
    half = [cv2.resize(g, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for g in grey]
    flows = [
        cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 4, 21, 5, 7, 1.5, 0)
        for first, second in pairwise(half)
    ]
    return 2 * torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2).to(clip.device)


def raft_flow(path: Path) -> tuple[str, Flow]:
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
            name = f"{name}#{sha256(path)[:8]}"
            return name, Raft(net, name)
    raise ValueError(f"{path} holds neither raft_small nor raft_large weights of torchvision")


class Raft(nn.Module):
    """RAFT's flow of a clip, in batches of pairs of frames: one on the processor, many on a GPU."""

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        self.net, self.name = net, name
        self.fitting: FittingBatches | None = None

    @torch.no_grad()
    def forward(self, clip: Tensor) -> Tensor:
        x = clip.float() / 127.5 - 1
        height, width = x.shape[2:]
        if min(height, width) < SMALLEST_RAFT:
            raise ValueError(f"frames are {height}x{width}; RAFT needs 128x128 or more")
        # RAFT takes multiples of 8
        x = interpolate(x, (height // 8 * 8, width // 8 * 8), mode="bilinear", align_corners=False)
        if self.fitting is None:
            pairs = 1 if x.device.type == "cpu" else max(1, RAFT_PIXELS // (height * width))
            self.fitting = FittingBatches(f"{self.name}, pairs of frames", pairs)
        # (T - 1, 2, H, W): x, y
        flow = self.fitting(lambda first, second: self.net(first, second)[-1], x[:-1], x[1:])
        scale = torch.tensor([width / x.shape[3], height / x.shape[2]]).reshape(1, 2, 1, 1)
        return flow * scale.to(flow.device)
