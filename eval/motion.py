"""Motion of clips in pixels per frame, and how it compares with that of the teacher's clips."""

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distill_bench.domain import controls, shapes
from distill_bench.evaluate.cache import batched, cached
from distill_bench.evaluate.distributions import (
    deviations,
    ratio_by_clip,
    spread_ratio_by_clip,
    wasserstein_by_clip,
)
from distill_bench.evaluate.optical_flow import (
    SMALL,
    SMALLEST_RAFT,
    Flow,
    flow_method,
    is_large,
    net_speed,
    raft_flow,
)
from distill_bench.evaluator import (
    Citation,
    Clips,
    Evaluator,
    Score,
    mean_score,
    order_to_match,
    pairing_warnings,
    require_same_frames,
)

RAFT = "DISTILL_BENCH_RAFT"  # environment variable: path of RAFT's weights
ORACLE = "oracle"  # extractor of scores of exact motion
TOP = 0.05  # share of pixels that counts as the fastest, as in VBench's dynamic degree
WINDOW = 8  # frames over which a displacement must last to count
NOISE = 0.02  # standard deviation of noise for the noise floor, as a share of the range
STILL = 0.05  # of the shorter side per second: slower clips count as still


@dataclass(frozen=True)
class Motion(Evaluator):
    """Motion of the fastest 5 % of pixels, and its distribution over clips against the teacher's.

    A point's motion is its net displacement over 8 frames, by optical flow. More is not better: a
    student should move as its teacher does. `motion_ratio` compares means, `motion_spread_ratio`
    the spread within a prompt; `motion_w1` sees both, and clips that stand still. Scores that end
    in `_true` are of the body's exact speed, on the embedded domain.
    """

    paper: ClassVar[Citation] = Citation(
        "2311.17982",
        "VBench: Comprehensive Benchmark Suite for Video Generative Models",
        "Ziqi Huang, Yinan He, Jiashuo Yu, Fan Zhang, Chenyang Si, Yuming Jiang, Yuanhan Zhang, "
        "Tianxing Wu, Qingyang Jin, Nattapol Chanpaisit, Yaohui Wang, Xinyuan Chen, Limin Wang, "
        "Dahua Lin, Yu Qiao, Ziwei Liu",
        2023,
    )
    version: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = (
        "motion",
        "motion_mean",
        "motion_diagonals",
        "motion_floor",
        "flicker",
        "dynamic_degree",
        "motion_still",
        "motion_still_teacher",
        "motion_ratio",
        "motion_w1",
        "motion_w1_over_floor",
        "motion_spread_ratio",
        "motion_true",
        "motion_still_true",
        "motion_still_teacher_true",
        "motion_ratio_true",
        "motion_w1_true",
        "motion_w1_over_floor_true",
        "motion_spread_ratio_true",
    )

    # weights of torchvision's raft_small or raft_large; None: Lucas-Kanade or Farneback, by size
    raft: str | None = field(default_factory=lambda: os.environ.get(RAFT))

    def reason_to_skip(self, clips: Clips) -> str | None:
        if self.raft is not None:
            raft_flow(Path(self.raft))  # raises if the weights do not load
            height, width = clips.frames.shape[3:]
            if min(height, width) >= SMALLEST_RAFT:
                return None
            needed = f"{SMALLEST_RAFT}x{SMALLEST_RAFT}"
            return f"frames are {height}x{width}; RAFT needs {needed} or more; unset {RAFT}"
        if not is_large(clips.frames) or importlib.util.find_spec("cv2"):
            return None
        return (
            f"optical flow of frames above {SMALL} pixels needs opencv: "
            "pip install 'distill-bench[optical-flow]'"
        )

    def extractors(self, clips: Clips) -> frozenset[str]:
        return frozenset({flow_method(clips.frames, self.raft)[0], ORACLE})

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        method, flow = flow_method(clips.frames, self.raft)
        speeds = clip_speeds(clips, method, flow)
        height, width = clips.frames.shape[3:]
        diagonals_per_second = 100 * clips.fps / math.hypot(height, width)  # in per cent
        flicker = [np.abs(np.diff(f.astype(np.int16), axis=0)).mean() for f in clips.frames]
        title, fields = "motion, fastest 5 %", {"unit": "px/frame", "extractor": method}
        scores = [
            mean_score("motion", speeds.top, title, **fields),
            mean_score("motion_mean", speeds.mean, "motion, all pixels", **fields),
            mean_score(
                "motion_diagonals",
                diagonals_per_second * speeds.top,
                title,
                unit="% of the diagonal/s",
                extractor=method,
            ),
            Score(
                "motion_floor",
                noise_floor(clips, flow),
                "motion read off still noisy frames",
                **fields,
            ),
            mean_score("flicker", flicker, "change between frames", unit="of 255"),
        ]
        dynamic = dynamic_degree(clips, speeds.by_pair, flow)
        if dynamic is not None:
            title = f"dynamic degree[{method}]"
            scores.append(mean_score("dynamic_degree", dynamic, title, extractor=method))
        by_flow = Comparison(
            clips=clips,
            references=references,
            speed=lambda x: clip_speeds(x, method, flow).top,
            floor=lambda x: noise_floor(x, flow),
            still_below=STILL * min(height, width) / clips.fps,
            name="motion",
            extractor=method,
        )
        scores += by_flow.scores()
        if _in_domain(clips):
            true = Comparison(
                clips=clips,
                references=references,
                speed=lambda x: shapes.centroid_speed(x.frames),
                floor=lambda x: 0.0,
                still_below=shapes.STILL_BELOW,
                name="speed of the body",
                extractor=ORACLE,
                suffix="_true",
            )
            title = "speed of the body (oracle)"
            scores.append(mean_score("motion_true", true.values, title, unit="px/frame"))
            scores += true.scores()
        return scores


@dataclass(frozen=True)
class Comparison:
    """Speeds of clips against those of the teacher's clips, by one way of measuring."""

    clips: Clips
    references: Mapping[str, Clips]
    speed: Callable[[Clips], np.ndarray]  # (N,), in pixels per frame
    floor: Callable[[Clips], float]  # reading of still clips
    still_below: float  # in pixels per frame
    name: str  # of the quantity
    extractor: str
    suffix: str = ""  # of the columns

    @cached_property
    def values(self) -> np.ndarray:
        """Speed of each clip, (N,)."""
        return self.speed(self.clips)

    def scores(self) -> list[Score]:
        """Share of still clips; with a teacher, the scores that compare with its clips.

        Raises:
            ValueError: if the teacher's clips stand still, by optical flow.
        """
        still = "share of still clips"
        scores = [self._score("motion_still", self.values < self.still_below, still)]
        if "teacher" not in self.references:
            return scores
        teacher = self.references["teacher"]
        require_same_frames(self.clips, teacher, "teacher")
        reference = self.speed(teacher)
        title = f"{still}, the teacher's"
        share = float((reference < self.still_below).mean())
        scores.append(Score(f"motion_still_teacher{self.suffix}", share, title))
        if reference.mean() > 0:
            return [*scores, *self._against(teacher, reference)]
        if self.suffix:  # the oracle sees no body in the clips of a bad teacher
            return scores
        raise ValueError("the teacher reference does not move: there is no ratio to it")

    def _against(self, teacher: Clips, reference: np.ndarray) -> list[Score]:
        """Ratio of the means, W1, and ratio of the spreads, to those of the teacher's clips."""
        doubts = pairing_warnings(self.clips, teacher)
        if reference.mean() < self.floor(teacher):
            mean = f"{reference.mean():.3g}"
            doubts += (f"the reference moves {mean} px/frame, below its noise floor",)
        order = order_to_match(self.clips, teacher)
        paired = order is not None
        matched = reference[order] if paired else reference
        main = not self.suffix
        ratio = ratio_by_clip(self.values, matched, paired)
        title = f"{self.name} / teacher's"
        scores = [
            self._score("motion_ratio", ratio, title, better="one", headline=main, warnings=doubts),
            self._score(
                "motion_w1",
                wasserstein_by_clip(self.values, matched, paired),
                f"W1 of {self.name} to the teacher's",
                unit="px/frame",
                better="lower",
                headline=main,
                warnings=_distance_warnings(self.clips, teacher),
            ),
        ]
        if "teacher_other" in self.references:
            scores.append(self._over_floor(reference, self.references["teacher_other"]))
        own = deviations(self.values, self.clips.prompts)
        others = deviations(reference, teacher.prompts)
        if own is not None and others is not None and others.any():
            spread = spread_ratio_by_clip(own, others[order] if paired else others, paired)
            title = f"spread of {self.name} within prompts / teacher's"
            score = self._score(
                "motion_spread_ratio", spread, title, better="one", headline=main, warnings=doubts
            )
            scores.append(score)
        return scores

    def _over_floor(self, reference: np.ndarray, other: Clips) -> Score:
        """W1 divided by that of the teacher's other seeds, which is a perfect student's.

        Raises:
            ValueError: if the other seeds' clips move exactly as the reference's.
        """
        require_same_frames(self.clips, other, "teacher_other")
        floor = wasserstein_by_clip(self.speed(other), reference, paired=False).mean()
        if not floor > 0:
            raise ValueError(
                "teacher_other moves exactly as the teacher reference: give clips of other seeds"
            )
        w1 = wasserstein_by_clip(self.values, reference, paired=False).mean()
        title = f"W1 of {self.name} over that of other seeds"
        return Score(
            f"motion_w1_over_floor{self.suffix}",
            float(w1 / floor),
            title,
            better="one",
            extractor=self.extractor,
        )

    def _score(self, column: str, by_clip: np.ndarray, title: str, **fields: Any) -> Score:
        return mean_score(
            f"{column}{self.suffix}", by_clip, title, extractor=self.extractor, **fields
        )


def _distance_warnings(clips: Clips, teacher: Clips) -> tuple[str, ...]:
    """Reasons to doubt a distance between these sets of clips."""
    warnings: tuple[str, ...] = ()
    n, m = len(clips.frames), len(teacher.frames)
    if n != m:
        warnings += (f"{n} clips against {m} of the teacher: the bias differs from other rows'",)
    if all(clips.prompts) and sorted(clips.prompts) != sorted(teacher.prompts):
        warnings += ("the prompts are not the reference's",)
    if clips.digest == teacher.digest:
        warnings += ("these are the reference's own clips: 0 by construction",)
    return warnings


class Speeds(NamedTuple):
    """Speeds of clips in pixels per frame."""

    top: np.ndarray  # net displacement of the fastest 5 % of pixels, (N,)
    mean: np.ndarray  # net displacement of all pixels, (N,)
    by_pair: np.ndarray  # fastest 5 % of each pair of frames, (N, T - 1)


def clip_speeds(clips: Clips, method: str, flow: Flow) -> Speeds:
    """`speeds` of clips, cached."""
    key = f"optical-flow-{method}-v{Motion.version}-by-clip"
    return _columns(cached(key, clips, lambda: batched(ClipSpeeds(flow), clips.frames, method)))


def speeds(frames: np.ndarray, flow: Flow) -> Speeds:
    """Speeds of clips, uint8 (N, T, 3, H, W); ranks share the work."""
    return _columns(batched(ClipSpeeds(flow), frames, "optical flow"))


def _columns(table: Tensor) -> Speeds:
    columns = table.double().numpy()
    return Speeds(columns[:, 0], columns[:, 1], columns[:, 2:])


class ClipSpeeds(nn.Module):
    """Speeds of clips by optical flow, averaged over windows of up to 8 frames.

    uint8 (B, T, 3, H, W) -> (B, 2 + T - 1): the columns of `Speeds` side by side.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, frames: Tensor) -> Tensor:
        rows = []
        for clip in frames:
            steps = self.flow(clip)
            windows = math.ceil(len(steps) / (WINDOW - 1))
            net = torch.stack([net_speed(x, clip.shape[2:]) for x in steps.tensor_split(windows)])
            means = torch.stack([fastest(net).mean(), net.mean()])
            rows.append(torch.cat([means, fastest(steps.norm(dim=1))]))
        return torch.stack(rows)


def fastest(speed: Tensor) -> Tensor:
    """Mean of the fastest 5 % of pixels, (N,), of speeds (N, h, w)."""
    flat = speed.flatten(1)
    return flat.topk(max(1, round(TOP * flat.shape[1])), 1).values.mean(1)


def noise_floor(clips: Clips, flow: Flow, most: int = 16) -> float:
    """Motion measured on the first `most` clips, frozen and with noise added; the truth is 0."""
    still = [
        controls.noisy(controls.frozen(clip[None, :WINDOW]), index, NOISE)
        for index, clip in enumerate(clips.frames[:most])
    ]
    return float(np.mean(speeds(np.concatenate(still), flow).top))


def dynamic_degree(clips: Clips, by_pair: np.ndarray, flow: Flow) -> np.ndarray | None:
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
        by_pair = speeds(frames, flow).by_pair
    threshold = 6 * min(frames.shape[3:]) / 256
    needed = max(1, round(4 * frames.shape[1] / 16))
    return ((by_pair > threshold).sum(1) >= needed).astype(float)


def _in_domain(clips: Clips) -> bool:
    """True for moving shapes, whose speed is known exactly."""
    size = clips.frames.shape[3:]
    return size == (shapes.SIZE, shapes.SIZE) and shapes.are_captions(clips.prompts)
