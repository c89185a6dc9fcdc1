"""Motion: how many pixels a frame clips move, against the teacher's clips of the same prompts and seeds.

    python -m distill_bench.eval.motion

calibrates every method on clips of known motion and writes motion.json beside this file.
"""

import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from distill_bench.domain import controls, shapes
from distill_bench.evaluate.cache import batched, cached
from distill_bench.evaluator import (
    Clips,
    Evaluator,
    Score,
    in_order_of,
    mean_score,
    same_frames,
    unpaired,
)
from distill_bench.store.files import first_line, sha256, write_json

RAFT = "DISTILL_BENCH_RAFT"
SMALL = 64  # pixels of the shorter side up to which normal flow is used
TOP = 0.05  # share of pixels that counts as the fastest: VBench's dynamic degree
NOISE = 0.02  # of the range: what is added to still clips to read the noise floor
CALIBRATION = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Motion(Evaluator):
    """Mean optical flow of each pair's fastest 5 % of pixels (VBench's statistic), of all pixels, and against the teacher.

    Normal flow up to 64 pixels, Farneback's at half resolution above, torchvision's RAFT by path. More motion is not better:
    noise and shuffled frames move a lot, so the ratio to the teacher is to be near 1.
    """

    paper: ClassVar[str] = "arXiv:2311.17982"
    version: ClassVar[int] = 1

    raft: str | None = field(
        default_factory=lambda: os.environ.get(RAFT)
    )  # weights of raft_small or raft_large; None: no RAFT

    def reason_to_skip(self, clips: Clips) -> str | None:
        if self.raft is None and _large(clips.frames) and importlib.util.find_spec("cv2") is None:
            return f"optical flow of frames above {SMALL} pixels needs opencv: pip install 'distill-bench[optical-flow]'"
        return None

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        how, speed = method_for(clips.frames, self.raft)
        about = {"extractor": how}
        tops, means = pair_speeds(clips, how, speed)
        top = tops.mean(1)
        second = (
            100 * clips.fps / math.hypot(*clips.frames.shape[3:])
        )  # % of the diagonal a second of a pixel a frame
        flicker = [np.abs(np.diff(f.astype(np.int16), axis=0)).mean() for f in clips.frames]
        floor = noise_floor(clips, speed)
        result = [
            mean_score("motion", top, "motion, fastest 5 %", unit="px/frame", **about),
            mean_score(
                "motion_mean", means.mean(1), "motion, all pixels", unit="px/frame", **about
            ),
            mean_score(
                "motion_diagonals",
                second * top,
                "motion, fastest 5 %",
                unit="% of the diagonal/s",
                **about,
            ),
            Score("motion_floor", floor, "motion read off still noisy frames", "px/frame", **about),
            mean_score("flicker", flicker, "change between frames", unit="of 255"),
        ]
        dynamic = dynamic_degree(clips, tops, speed)
        if dynamic is not None:
            result.append(mean_score("dynamic_degree", dynamic, f"dynamic degree[{how}]", **about))
        if _in_domain(clips):
            true = shapes.centroid_speed(clips.frames)
            result.append(
                mean_score("motion_true", true, "speed of the body (oracle)", unit="px/frame")
            )
        if "teacher" in references:
            teacher = references["teacher"]
            same_frames(clips, teacher, "teacher")
            theirs = pair_speeds(teacher, how, speed)[0].mean(1)
            whole, order = float(theirs.mean()), in_order_of(clips, teacher)
            if not whole > 0:
                raise ValueError("the teacher reference does not move: there is no ratio to it")
            warnings = unpaired(clips, teacher)
            if whole < noise_floor(teacher, speed):
                warnings += (f"the reference moves {whole:.3g} px/frame, below its noise floor",)
            about |= {"better": "one", "headline": True, "warnings": warnings}
            each = top / whole if order is None else ratio_by_clip(top, theirs[order])
            result.append(mean_score("motion_ratio", each, "motion / teacher's", **about))
        return result


Speed = Callable[
    [np.ndarray], Tensor
]  # one clip uint8 (T, 3, H, W) -> pixels a frame (T - 1, h, w)


def method_for(frames: np.ndarray, raft: str | None) -> tuple[str, Speed]:
    """The name of the method for frames of this size, and the method."""
    if raft is not None:
        return raft_speed(Path(raft))
    return ("farneback-half", farneback_speed) if _large(frames) else ("normal-flow", normal_speed)


def ratio_by_clip(values: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """A value a clip (N,) whose mean is the ratio of two means and whose spread is that ratio's, clips of both drawn together.

    The ratio's linearisation: how fast a prompt is moves both means and not their ratio. One value alone is no clip's ratio.
    """
    ratio = values.mean() / theirs.mean()
    return ratio + (values - ratio * theirs) / theirs.mean()


def pair_speeds(clips: Clips, how: str, speed: Speed) -> tuple[np.ndarray, np.ndarray]:
    """`motion` of clips, from their cache where it is there; ranks share the clips."""

    def some(frames: Tensor) -> Tensor:
        return torch.from_numpy(np.stack(motion(frames.numpy(), speed), 1))

    key = f"optical-flow-{how}-v{Motion.version}-by-clip"
    tops, means = cached(key, clips, lambda: batched(some, clips.frames, how)).double().unbind(1)
    return tops.numpy(), means.numpy()


def motion(frames: np.ndarray, speed: Speed) -> tuple[np.ndarray, np.ndarray]:
    """Pixels a frame of each pair of frames of clips (N, T, 3, H, W) uint8: (N, T - 1), of the fastest 5 % and of all."""
    tops, means = [], []
    for clip in frames:
        flat = speed(clip).flatten(1)
        tops.append(flat.topk(max(1, round(TOP * flat.shape[1])), 1).values.mean(1))
        means.append(flat.mean(1))
    return torch.stack(tops).double().numpy(), torch.stack(means).double().numpy()


def noise_floor(clips: Clips, speed: Speed, most: int = 64) -> float:
    """What the method reads off `most` of the clips standing still under noise of 2 % of the range, where the truth is 0."""
    still = controls.noisy(controls.frozen(clips.frames[:most, :2]), 0, NOISE)
    return float(motion(still, speed)[0].mean())


def dynamic_degree(clips: Clips, tops: np.ndarray, speed: Speed) -> np.ndarray | None:
    """Whether each clip is dynamic after VBench (dynamic_degree.py@45e79ec), with the method at hand for its RAFT.

    Frames are taken 8 a second; a clip is dynamic if at least round(4 n / 16) of its pairs have a top 5 % above
    6 min(H, W) / 256 pixels. None below 3 frames: VBench then needs 0 pairs and calls every clip dynamic.
    """
    step = max(1, round(clips.fps / 8))
    frames = clips.frames[:, ::step]
    if frames.shape[1] < 3:
        return None
    tops = tops if step == 1 else motion(frames, speed)[0]
    threshold, needed = 6 * min(frames.shape[3:]) / 256, max(1, round(4 * frames.shape[1] / 16))
    return ((tops > threshold).sum(1) >= needed).astype(float)


def normal_speed(clip: np.ndarray, epsilon: float = 4e-3) -> Tensor:
    """Normal optical flow |I_t| |grad I| / (|grad I|^2 + epsilon) of a blurred clip, (T - 1, H, W), colours summed.

    Only the motion along the gradient is seen; it reads low above 3 pixels a frame, and on textures and small bodies at any speed
    (motion.json). Values in [0, 1]: epsilon keeps noise down.
    """
    x = _blurred(torch.from_numpy(clip).float() / 255)
    change = x[1:] - x[:-1]
    middle = pad((x[1:] + x[:-1]) / 2, (1, 1, 1, 1), mode="replicate")
    gx = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
    gy = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    steepness = gx.square() + gy.square()
    return (change.abs() * steepness.sqrt()).sum(1) / (steepness.sum(1) + epsilon)


def _blurred(x: Tensor) -> Tensor:
    """Gaussian blur of one pixel, edges repeated."""
    kernel = torch.exp(-0.5 * torch.arange(-3, 4).float() ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 7)
    x = pad(x, (3, 3, 3, 3), mode="replicate")
    return conv2d(conv2d(x, kernel[..., None, :], groups=3), kernel[..., :, None], groups=3)


def farneback_speed(clip: np.ndarray) -> Tensor:
    """Farneback's optical flow at half resolution (4 levels, window 21, 5 rounds): pixels of the full one, (T - 1, H/2, W/2)."""
    import cv2

    grey = [
        cv2.cvtColor(np.ascontiguousarray(f.transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY) for f in clip
    ]
    half = [cv2.resize(g, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for g in grey]
    flows = [
        cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 4, 21, 5, 7, 1.5, 0)
        for a, b in zip(half[:-1], half[1:], strict=True)
    ]
    return 2 * torch.from_numpy(np.stack(flows)).norm(dim=-1)


def raft_speed(path: Path) -> tuple[str, Speed]:
    """Name with digest and method of torchvision's RAFT with the weights of a file (raft_small or raft_large by their keys)."""
    from torchvision.models.optical_flow import raft_large, raft_small

    if not path.is_file():
        raise ValueError(
            f"no weights at {path}: RAFT needs torchvision's raft_small_*.pth or raft_large_*.pth"
        )
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except (
        Exception
    ) as error:  # torch answers a file that is none of its own with errors of many kinds
        raise ValueError(f"{path} holds no weights: {first_line(error)}") from error
    for name, make in (("raft-small", raft_small), ("raft-large", raft_large)):
        net = make(weights=None)
        if net.state_dict().keys() == state.keys():
            net.load_state_dict(state)
            net.eval().requires_grad_(False)
            return f"{name}#{sha256(path)[:8]}", partial(_raft, net)
    raise ValueError(f"{path} holds neither torchvision's raft_small nor its raft_large")


@torch.no_grad()
def _raft(net: torch.nn.Module, clip: np.ndarray) -> Tensor:
    x = torch.from_numpy(clip).float() / 127.5 - 1
    height, width = x.shape[2:]
    if min(height, width) < 128:
        raise ValueError(f"RAFT needs frames of 128x128 or more; found {height}x{width}")
    x = interpolate(x, (height // 8 * 8, width // 8 * 8), mode="bilinear", align_corners=False)
    flow = torch.cat(
        [net(a[None], b[None])[-1] for a, b in zip(x[:-1], x[1:], strict=True)]
    )  # (T - 1, 2, H, W) x, y
    return (
        flow * torch.tensor([width / x.shape[3], height / x.shape[2]]).reshape(1, 2, 1, 1)
    ).norm(dim=1)


def _large(frames: np.ndarray) -> bool:
    return min(frames.shape[-2:]) > SMALL


def _in_domain(clips: Clips) -> bool:
    try:
        return clips.frames.shape[3:] == (shapes.SIZE, shapes.SIZE) and all(
            map(shapes.parse, clips.prompts)
        )
    except ValueError:
        return False


# Calibration


def texture(
    height: int, width: int, shift: tuple[float, float], frames: int = 3, seed: int = 0
) -> np.ndarray:
    """A clip uint8 (T, 3, H, W) of a smooth random texture that moves by `shift` (x, y) pixels a frame, wrapped at the edges."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    spectrum = np.exp(-(fx**2 + fy**2) / (2 * 0.06**2)) * np.fft.rfft2(
        rng.normal(size=(3, height, width))
    )
    moved = [
        np.fft.irfft2(
            spectrum * np.exp(-2j * np.pi * t * (fx * shift[0] + fy * shift[1])), s=(height, width)
        )
        for t in range(frames)
    ]
    clip = np.stack(moved)
    return np.clip(np.rint(127.5 + 40 * clip / clip.std()), 0, 255).astype(np.uint8)


def disc(
    height: int, width: int, radius: float, speed: float, angle: float, frames: int = 3
) -> np.ndarray:
    """A clip uint8 (T, 3, H, W) of an anti-aliased red disc that passes the middle at `speed` pixels a frame."""
    along = speed * (np.arange(frames)[:, None, None] - (frames - 1) / 2)
    x = np.arange(width) + 0.5 - width / 2 - along * math.cos(angle)
    y = np.arange(height)[:, None] + 0.5 - height / 2 - along * math.sin(angle)
    cover = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1)[:, None]
    return np.rint(255 * (0.1 + cover * np.array([0.8, 0, 0]).reshape(3, 1, 1))).astype(np.uint8)


def calibration(speed: Speed, size: tuple[int, int]) -> dict:
    """What a method reads off known motion at a size: textures shifted as a whole, discs, and still textures under noise."""
    shifts = [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0), (1.5, 1.0)] + (
        [(4.0, 2.0), (8.0, -4.0)] if min(size) > SMALL else []
    )
    rows, discs = [], []
    for shift in shifts:
        top, mean = (each.mean() for each in motion(texture(*size, shift)[None], speed))
        rows.append(
            {
                "shift": shift,
                "true": round(math.hypot(*shift), 3),
                "top": round(top, 3),
                "mean": round(mean, 3),
            }
        )
    for radius in (min(size) // 16, min(size) // 8, min(size) // 4):
        for true in (0.5, 1.0, 2.0):
            clips = np.stack([disc(*size, radius, true, angle) for angle in (0.0, 0.4, 0.8)])
            discs.append(
                {"radius": radius, "true": true, "top": round(motion(clips, speed)[0].mean(), 3)}
            )
    still = texture(*size, (0.0, 0.0))[None]
    noise = {
        str(sd): round(motion(controls.noisy(still, 0, sd), speed)[0].mean(), 3)
        for sd in (0.02, 0.05)
    }
    read = {
        "textures": rows,
        "textures_error": _error(rows[1:]),
        "discs": discs,
        "discs_error": _error(discs),
    }
    return {"size": size, **read, "still_under_noise": noise}


def _error(rows: list[dict]) -> dict:
    """Mean and largest absolute error of the fastest 5 %, as shares of the true speed."""
    off = [abs(row["top"] / row["true"] - 1) for row in rows]
    return {"mean": round(float(np.mean(off)), 4), "largest": round(float(max(off)), 4)}


def shape_calibration(speed: Speed, count: int = 216) -> dict:
    """What a method reads off rendered clips whose speed is known: correlation, slope, the noise floor and errors by noise.

    The errors are of every body at 0.25, 0.5, 1 and 2 pixels a frame.
    """
    frames, prompts = controls.rendered(count, 0)
    true = shapes.centroid_speed(frames)
    top = motion(frames, speed)[0].mean(1)
    slope = float((true * top).sum() / (true**2).sum())
    still = np.array(["still" in prompt for prompt in prompts])
    noisy = motion(controls.noisy(frames[still], 0, NOISE), speed)[0]
    bodies = [a for a in shapes.all_attributes() if a.speed == "fast"]
    paces = [(i, a, pace) for pace in (0.25, 0.5, 1.0, 2.0) for i, a in enumerate(bodies)]
    paced = np.stack([shapes.render(a, i, pace / shapes.SPEEDS["fast"]) for i, a, pace in paces])
    known = shapes.centroid_speed(paced)
    errors = {}
    for sd in (0.0, 0.02, 0.05):
        read = motion(controls.noisy(paced, 0, sd), speed)[0].mean(1)
        errors[str(sd)] = _error([{"true": a, "top": b} for a, b in zip(known, read, strict=True)])
    return {
        "clips": count,
        "r": round(float(np.corrcoef(true, top)[0, 1]), 4),
        "slope": round(slope, 4),
        "still": round(float(top[still].mean()), 4),
        "still_under_noise": round(float(noisy.mean()), 4),
        "error_by_noise": errors,
    }


def main() -> int:
    """Write the calibration of the methods that need no weights, normal flow's at the sizes of its domain and of its limit."""
    result = {
        "normal-flow": calibration(normal_speed, (32, 32))
        | {"moving_shapes": shape_calibration(normal_speed)},
        f"normal-flow-{SMALL}": calibration(normal_speed, (SMALL, SMALL)),
    }
    if importlib.util.find_spec("cv2") is not None:
        result["farneback-half"] = calibration(farneback_speed, (480, 832))
    write_json(CALIBRATION, result)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
