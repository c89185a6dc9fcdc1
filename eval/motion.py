"""Motion of clips in pixels per frame, and its ratio to the motion of the teacher's clips."""

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from distill_bench.domain import controls, shapes
from distill_bench.evaluate.cache import batched, cached
from distill_bench.evaluate.optical_flow import SMALL, Speed, flow_method, is_large
from distill_bench.evaluator import (
    Clips,
    Evaluator,
    Score,
    mean_score,
    order_to_match,
    pairing_warnings,
    require_same_frames,
)

RAFT = "DISTILL_BENCH_RAFT"  # environment variable: path of RAFT's weights
TOP = 0.05  # share of pixels that counts as the fastest, as in VBench's dynamic degree
NOISE = 0.02  # standard deviation of noise for the noise floor, as a share of the range


@dataclass(frozen=True)
class Motion(Evaluator):
    """Mean optical flow of the fastest 5 % of pixels (as VBench), and its ratio to the teacher's.

    More motion is not better: noise and shuffled frames move a lot. The best ratio is 1.
    """

    paper: ClassVar[str] = "arXiv:2311.17982"
    version: ClassVar[int] = 1

    # weights of torchvision's raft_small or raft_large; None: normal flow or Farneback, by size
    raft: str | None = field(default_factory=lambda: os.environ.get(RAFT))

    def reason_to_skip(self, clips: Clips) -> str | None:
        if self.raft is not None or not is_large(clips.frames) or importlib.util.find_spec("cv2"):
            return None
        return (
            f"optical flow of frames above {SMALL} pixels needs opencv: "
            "pip install 'distill-bench[optical-flow]'"
        )

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        method, speed = flow_method(clips.frames, self.raft)
        by_pair, all_pixels = pair_speeds(clips, method, speed)
        top = by_pair.mean(1)  # (N,)
        diagonals_per_second = 100 * clips.fps / math.hypot(*clips.frames.shape[3:])  # in per cent
        flicker = [np.abs(np.diff(f.astype(np.int16), axis=0)).mean() for f in clips.frames]
        fields = {"unit": "px/frame", "extractor": method}
        scores = [
            mean_score("motion", top, "motion, fastest 5 %", **fields),
            mean_score("motion_mean", all_pixels.mean(1), "motion, all pixels", **fields),
            mean_score(
                "motion_diagonals",
                diagonals_per_second * top,
                "motion, fastest 5 %",
                unit="% of the diagonal/s",
                extractor=method,
            ),
            Score(
                "motion_floor",
                noise_floor(clips, speed),
                "motion read off still noisy frames",
                **fields,
            ),
            mean_score("flicker", flicker, "change between frames", unit="of 255"),
        ]
        dynamic = dynamic_degree(clips, by_pair, speed)
        if dynamic is not None:
            title = f"dynamic degree[{method}]"
            scores.append(mean_score("dynamic_degree", dynamic, title, extractor=method))
        if _in_domain(clips):
            true = shapes.centroid_speed(clips.frames)
            title = "speed of the body (oracle)"
            scores.append(mean_score("motion_true", true, title, unit="px/frame"))
        if "teacher" in references:
            scores.append(ratio_to_teacher(clips, top, references["teacher"], method, speed))
        return scores


def ratio_to_teacher(
    clips: Clips, top: np.ndarray, teacher: Clips, method: str, speed: Speed
) -> Score:
    """Ratio of the mean motion to the teacher's.

    Raises:
        ValueError: if the teacher's clips differ in size or rate, or stand still.
    """
    require_same_frames(clips, teacher, "teacher")
    teacher_top = pair_speeds(teacher, method, speed)[0].mean(1)
    teacher_mean = float(teacher_top.mean())
    if not teacher_mean > 0:
        raise ValueError("the teacher reference does not move: there is no ratio to it")
    warnings = pairing_warnings(clips, teacher)
    if teacher_mean < noise_floor(teacher, speed):
        warnings += (f"the reference moves {teacher_mean:.3g} px/frame, below its noise floor",)
    order = order_to_match(clips, teacher)
    return mean_score(
        "motion_ratio",
        top / teacher_mean if order is None else ratio_by_clip(top, teacher_top[order]),
        "motion / teacher's",
        better="one",
        headline=True,
        extractor=method,
        warnings=warnings,
    )


def ratio_by_clip(values: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Per-clip linearisation (N,) of mean(values) / mean(references), by the delta method.

    The mean of the entries is the ratio. Their spread is the sampling error of the ratio when pairs
    are resampled jointly: differences in speed between prompts cancel. A single entry is not the
    ratio of a clip.
    """
    ratio = values.mean() / references.mean()
    return ratio + (values - ratio * references) / references.mean()


def pair_speeds(clips: Clips, method: str, speed: Speed) -> tuple[np.ndarray, np.ndarray]:
    """`motion` of clips, cached; ranks share the work."""

    def both(frames: Tensor) -> Tensor:
        return torch.from_numpy(np.stack(motion(frames.numpy(), speed), 1))

    key = f"optical-flow-{method}-v{Motion.version}-by-clip"
    speeds = cached(key, clips, lambda: batched(both, clips.frames, method)).double()
    top, all_pixels = speeds.unbind(1)
    return top.numpy(), all_pixels.numpy()


def motion(frames: np.ndarray, speed: Speed) -> tuple[np.ndarray, np.ndarray]:
    """Mean speed of the fastest 5 % of pixels and of all, per frame pair: (N, T - 1) each.

    Args:
        frames: clips, uint8 (N, T, 3, H, W).
    """
    top, all_pixels = [], []
    for clip in frames:
        flat = speed(clip).flatten(1)
        top.append(flat.topk(max(1, round(TOP * flat.shape[1])), 1).values.mean(1))
        all_pixels.append(flat.mean(1))
    return torch.stack(top).double().numpy(), torch.stack(all_pixels).double().numpy()


def noise_floor(clips: Clips, speed: Speed, most: int = 64) -> float:
    """Motion measured on the first `most` clips, frozen and with noise added; the truth is 0."""
    still = controls.noisy(controls.frozen(clips.frames[:most, :2]), 0, NOISE)
    return float(motion(still, speed)[0].mean())


def dynamic_degree(clips: Clips, top: np.ndarray, speed: Speed) -> np.ndarray | None:
    """1 for each dynamic clip, else 0, (N,), as in VBench (dynamic_degree.py@45e79ec).

    The optical flow is that of this evaluator, not VBench's. Frames are taken at 8 per second. A
    clip of n frames is dynamic if the fastest 5 % exceed 6 min(H, W) / 256 pixels in at least
    round(4 n / 16) pairs. None below 3 frames: VBench then requires 0 pairs and calls every clip
    dynamic.
    """
    step = max(1, round(clips.fps / 8))
    frames = clips.frames[:, ::step]
    if frames.shape[1] < 3:
        return None
    if step > 1:
        top = motion(frames, speed)[0]
    threshold = 6 * min(frames.shape[3:]) / 256
    needed = max(1, round(4 * frames.shape[1] / 16))
    return ((top > threshold).sum(1) >= needed).astype(float)


def _in_domain(clips: Clips) -> bool:
    """True for moving shapes, whose speed is known exactly."""
    try:
        return clips.frames.shape[3:] == (shapes.SIZE, shapes.SIZE) and all(
            map(shapes.parse, clips.prompts)
        )
    except ValueError:
        return False
