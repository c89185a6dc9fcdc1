"""Calibrate the shipped extractors and the optical flow: writes eval/*_calibration.json.

    python tests/benchmarks/calibration.py

Extractors are judged by how far they move under known corruptions, optical flow by clips whose
motion is known. The tests of both evaluators compare the stored numbers with the code.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from distill_bench.domain import controls, shapes
from distill_bench.eval.fvd import DEFAULT, SECOND
from distill_bench.eval.motion import NOISE, motion
from distill_bench.evaluate.distances import frechet_distance
from distill_bench.evaluate.extractors import Extractor, load_extractor
from distill_bench.evaluate.optical_flow import SMALL, Speed, farneback_speed, normal_speed
from distill_bench.evaluator import Clips
from distill_bench.store.files import write_json

EXTRACTORS_FILE = ROOT / "eval" / "fvd_calibration.json"
FLOW_FILE = ROOT / "eval" / "motion_calibration.json"


def extractor_self_test(extractor: Extractor, count: int = 432, nulls: int = 4) -> dict:
    """Distance of corrupted held-out clips as a ratio to that of clean clips, and its z.

    z counts standard deviations of `nulls` clean sets. The shipped classifier must read frozen
    clips above 5, half speed above 2 and shuffled frames above 3.
    """

    def clips(first: int, pace: float = 1.0) -> Clips:
        frames, prompts = controls.rendered(count, first, pace)
        return Clips(frames, prompts, list(range(first, first + count)))

    reference = extractor(clips(0))
    clean = [frechet_distance(extractor(clips(count * (2 + i))), reference) for i in range(nulls)]
    null, sd = float(np.mean(clean)), float(np.std(clean, ddof=1))
    held_out = clips(count)
    corrupted = {
        name: corrupt(held_out.frames, 0) for name, corrupt in controls.CORRUPTIONS.items()
    }
    corrupted["half speed"] = clips(count, 0.5).frames
    corrupted["one colour missing"] = controls.rendered(count, count, without="red")[0]
    ratios = {}
    for name, frames in corrupted.items():
        features = extractor(Clips(frames, held_out.prompts, held_out.seeds))
        distance = frechet_distance(features, reference)
        ratios[name] = {"ratio": round(distance / null, 3), "z": round((distance - null) / sd, 1)}
    return {
        "extractor": f"{extractor.name}#{extractor.sha256}",
        "clips": count,
        "null": round(null, 6),
        "corruptions": ratios,
    }


def texture(
    height: int, width: int, shift: tuple[float, float], frames: int = 3, seed: int = 0
) -> np.ndarray:
    """Clip uint8 (T, 3, H, W) of a smooth random texture, moving by `shift` (x, y) per frame.

    The texture wraps at the edges.
    """
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    white = np.fft.rfft2(rng.normal(size=(3, height, width)))
    spectrum = np.exp(-(fx**2 + fy**2) / (2 * 0.06**2)) * white
    phases = [np.exp(-2j * np.pi * t * (fx * shift[0] + fy * shift[1])) for t in range(frames)]
    clip = np.stack([np.fft.irfft2(spectrum * phase, s=(height, width)) for phase in phases])
    return np.clip(np.rint(127.5 + 40 * clip / clip.std()), 0, 255).astype(np.uint8)


def disc(
    height: int, width: int, radius: float, speed: float, angle: float, frames: int = 3
) -> np.ndarray:
    """Clip uint8 (T, 3, H, W) of an anti-aliased red disc passing the centre; speed in px/frame."""
    along = speed * (np.arange(frames)[:, None, None] - (frames - 1) / 2)
    x = np.arange(width) + 0.5 - width / 2 - along * math.cos(angle)
    y = np.arange(height)[:, None] + 0.5 - height / 2 - along * math.sin(angle)
    cover = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1)[:, None]
    return np.rint(255 * (0.1 + cover * np.array([0.8, 0, 0]).reshape(3, 1, 1))).astype(np.uint8)


def flow_calibration(speed: Speed, size: tuple[int, int]) -> dict:
    """Readings of known motion at a size: shifted textures, discs, still textures under noise."""
    shifts = [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0), (1.5, 1.0)]
    if min(size) > SMALL:
        shifts += [(4.0, 2.0), (8.0, -4.0)]
    textures, discs = [], []
    for shift in shifts:
        top, mean = (values.mean() for values in motion(texture(*size, shift)[None], speed))
        true = round(math.hypot(*shift), 3)
        textures.append(
            {"shift": shift, "true": true, "top": round(top, 3), "mean": round(mean, 3)}
        )
    for radius in (min(size) // 16, min(size) // 8, min(size) // 4):
        for true in (0.5, 1.0, 2.0):
            clips = np.stack([disc(*size, radius, true, angle) for angle in (0.0, 0.4, 0.8)])
            top = round(motion(clips, speed)[0].mean(), 3)
            discs.append({"radius": radius, "true": true, "top": top})
    still = texture(*size, (0.0, 0.0))[None]
    return {
        "size": size,
        "textures": textures,
        "textures_error": relative_error(textures[1:]),
        "discs": discs,
        "discs_error": relative_error(discs),
        "still_under_noise": {
            str(sd): round(motion(controls.noisy(still, 0, sd), speed)[0].mean(), 3)
            for sd in (0.02, 0.05)
        },
    }


def relative_error(rows: list[dict]) -> dict:
    """Mean and largest absolute error of the fastest 5 %, as shares of the true speed."""
    errors = [abs(row["top"] / row["true"] - 1) for row in rows]
    return {"mean": round(float(np.mean(errors)), 4), "largest": round(float(max(errors)), 4)}


def shape_calibration(speed: Speed, count: int = 216) -> dict:
    """Readings of rendered clips of known speed: correlation, slope, noise floor, errors by noise.

    Errors are over every body at 0.25, 0.5, 1 and 2 pixels per frame.
    """
    frames, prompts = controls.rendered(count, 0)
    true = shapes.centroid_speed(frames)
    top = motion(frames, speed)[0].mean(1)
    slope = float((true * top).sum() / (true**2).sum())
    still = np.array(["still" in prompt for prompt in prompts])
    noisy = motion(controls.noisy(frames[still], 0, NOISE), speed)[0]
    bodies = [a for a in shapes.all_attributes() if a.speed == "fast"]
    paced = np.stack(
        [
            shapes.render(body, key, pace / shapes.SPEEDS["fast"])
            for pace in (0.25, 0.5, 1.0, 2.0)
            for key, body in enumerate(bodies)
        ]
    )
    known = shapes.centroid_speed(paced)
    errors = {}
    for sd in (0.0, 0.02, 0.05):
        readings = motion(controls.noisy(paced, 0, sd), speed)[0].mean(1)
        errors[str(sd)] = relative_error(
            [{"true": a, "top": b} for a, b in zip(known, readings, strict=True)]
        )
    return {
        "clips": count,
        "r": round(float(np.corrcoef(true, top)[0, 1]), 4),
        "slope": round(slope, 4),
        "still": round(float(top[still].mean()), 4),
        "still_under_noise": round(float(noisy.mean()), 4),
        "error_by_noise": errors,
    }


def main() -> int:
    """Write both files. Farneback is calibrated only if opencv is installed."""
    flow = {
        "normal-flow": flow_calibration(normal_speed, (32, 32))
        | {"moving_shapes": shape_calibration(normal_speed)},
        f"normal-flow-{SMALL}": flow_calibration(normal_speed, (SMALL, SMALL)),
    }
    if importlib.util.find_spec("cv2") is not None:
        flow["farneback-half"] = flow_calibration(farneback_speed, (480, 832))
    write_json(FLOW_FILE, flow)
    extractors = {name: extractor_self_test(load_extractor(name)) for name in (DEFAULT, SECOND)}
    write_json(EXTRACTORS_FILE, extractors)
    print(json.dumps(flow | extractors, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
