"""Motion: how many pixels a frame the fastest parts of a clip move, and the same against the teacher's clips."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from distill_bench.evaluator import Clips, Evaluator, Score

SMALL = 64  # pixels of the shorter side up to which normal flow is used
TOP = 0.05  # share of pixels that counts as the fastest: VBench's dynamic degree


@dataclass(frozen=True)
class Motion(Evaluator):
    """Mean optical flow of the fastest 5 % of pixels (VBench's dynamic degree, unthresholded), of all, and against the teacher.

    Normal flow up to 64 pixels, Farneback's at half resolution above. More motion is not better: noise and shuffled frames move
    a lot, so the ratio to the teacher is to be near 1.
    """

    paper: ClassVar[str] = "arXiv:2311.17982"
    version: ClassVar[int] = 1

    def reason_to_skip(self, clips: Clips) -> str | None:
        if _large(clips.frames) and importlib.util.find_spec("cv2") is None:
            return f"optical flow of frames above {SMALL} pixels needs opencv-python-headless"
        return None

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        how = "farneback-half" if _large(clips.frames) else "normal-flow"
        top, mean = motion(clips.frames)
        flicker = [float(np.abs(np.diff(f.astype(np.int16), axis=0)).mean()) for f in clips.frames]
        unit = "px/frame"
        result = [
            Score("motion", float(top.mean()), "motion, fastest 5 %", unit, None, False, tuple(top.tolist()), extractor=how),
            Score(
                "motion_mean", float(mean.mean()), "motion, all pixels", unit, None, False, tuple(mean.tolist()), extractor=how
            ),
            Score("flicker", float(np.mean(flicker)), "change between frames", "of 255", None, False, tuple(flicker)),
        ]
        if "teacher" in references:
            teacher = float(motion(references["teacher"].frames)[0].mean())
            if teacher == 0:
                raise ValueError("the teacher reference does not move: there is no ratio to it")
            ratio = top / teacher
            title = "motion / teacher's"
            result.append(
                Score("motion_ratio", float(ratio.mean()), title, "", "one", True, tuple(ratio.tolist()), extractor=how)
            )
        return result


def motion(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Speed of clips (N, T, 3, H, W) uint8 in pixels a frame: mean of each pair's fastest 5 %, and of all pixels; (N,) each."""
    speed = farneback_speed if _large(frames) else normal_speed
    tops, means = [], []
    for clip in frames:
        flow = speed(clip).flatten(1)  # (T - 1, pixels)
        tops.append(flow.topk(max(1, round(TOP * flow.shape[1])), 1).values.mean().item())
        means.append(flow.mean().item())
    return np.array(tops), np.array(means)


def normal_speed(clip: np.ndarray, epsilon: float = 4e-3) -> Tensor:
    """Normal optical flow |I_t| |grad I| / (|grad I|^2 + epsilon) of a blurred clip, (T - 1, H, W), colours summed.

    Only the motion along the gradient is seen; it reads low above 3 pixels a frame. Values in [0, 1]: epsilon keeps noise down.
    """
    x = _blurred(torch.from_numpy(clip).float() / 255)
    change = x[1:] - x[:-1]
    middle = torch.nn.functional.pad((x[1:] + x[:-1]) / 2, (1, 1, 1, 1), mode="replicate")
    gx = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
    gy = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    steepness = gx.square() + gy.square()
    return (change.abs() * steepness.sqrt()).sum(1) / (steepness.sum(1) + epsilon)


def farneback_speed(clip: np.ndarray) -> Tensor:
    """Farneback's optical flow at half resolution (4 levels, window 21, 5 rounds): pixels of the full one, (T - 1, H/2, W/2)."""
    import cv2

    grey = [cv2.cvtColor(np.ascontiguousarray(f.transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY) for f in clip]
    half = [cv2.resize(g, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for g in grey]
    flows = [cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 4, 21, 5, 7, 1.5, 0) for a, b in zip(half[:-1], half[1:], strict=True)]
    return 2 * torch.from_numpy(np.stack(flows)).norm(dim=-1)


def _blurred(x: Tensor) -> Tensor:
    """Gaussian blur of one pixel, edges repeated."""
    kernel = torch.exp(-0.5 * torch.arange(-3, 4).float() ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 7)
    x = torch.nn.functional.pad(x, (3, 3, 3, 3), mode="replicate")
    return torch.nn.functional.conv2d(
        torch.nn.functional.conv2d(x, kernel[..., None, :], groups=3), kernel[..., :, None], groups=3
    )


def _large(frames: np.ndarray) -> bool:
    return min(frames.shape[-2:]) > SMALL
