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
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from distill_bench.autoencoder import FrameAutoencoder, frames_to_video, video_to_frames
from distill_bench.domain import controls, shapes
from distill_bench.eval.fvd import DEFAULT, SECOND
from distill_bench.eval.motion import speeds
from distill_bench.evaluate.distances import frechet_distance, frechet_infinity
from distill_bench.evaluate.extractors import Extractor, load_extractor
from distill_bench.evaluate.optical_flow import SMALL, Flow, farneback_flow, lucas_kanade_flow
from distill_bench.evaluator import Clips
from distill_bench.store.files import write_json

EXTRACTORS_FILE = ROOT / "eval" / "fvd_calibration.json"
FLOW_FILE = ROOT / "eval" / "motion_calibration.json"
FLOOR_CLIPS = (64, 144, 216, 256, 432)
SHAPE_SPEEDS = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.2, 1.6, 2.0)  # pixels per frame


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


def extractor_floors(extractor: Extractor, draws: int = 4) -> dict:
    """Distance of clean held-out clips to other clean ones, by captions and number of clips.

    Mean and standard deviation over `draws` pairs of disjoint sets.
    """
    largest = max(FLOOR_CLIPS)
    floors: dict[str, dict] = {}
    for kind in ("named", "free"):
        features = []
        for i in range(2 * draws):
            frames, prompts = controls.rendered(largest, i * largest, kind=kind)
            features.append(extractor(Clips(frames, prompts, list(range(largest)))))
        pairs = list(zip(features[::2], features[1::2], strict=True))
        for count in FLOOR_CLIPS:
            cut = [(x[:count], y[:count]) for x, y in pairs]
            for name, values in {
                "fvd": [frechet_distance(x, y) for x, y in cut],
                "fvd_infinity": [frechet_infinity(x, y, paired=True) for x, y in cut],
            }.items():
                floors.setdefault(f"{name}, {kind}", {})[str(count)] = {
                    "mean": round(float(np.mean(values)), 4),
                    "sd": round(float(np.std(values, ddof=1)), 4),
                }
    return floors


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


def flow_calibration(flow: Flow, size: tuple[int, int]) -> dict:
    """Readings of known motion at a size: shifted textures, discs, still textures under noise."""
    shifts = [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0), (1.5, 1.0)]
    if min(size) > SMALL:
        shifts += [(4.0, 2.0), (8.0, -4.0)]
    textures, discs = [], []
    for shift in shifts:
        read = speeds(texture(*size, shift)[None], flow)
        true = round(math.hypot(*shift), 3)
        top, mean = round(read.top[0], 3), round(read.mean[0], 3)
        textures.append({"shift": shift, "true": true, "top": top, "mean": mean})
    for radius in (min(size) // 16, min(size) // 8, min(size) // 4):
        for true in (0.5, 1.0, 2.0):
            clips = np.stack([disc(*size, radius, true, angle) for angle in (0.0, 0.4, 0.8)])
            top = round(speeds(clips, flow).top.mean(), 3)
            discs.append({"radius": radius, "true": true, "top": top})
    still = texture(*size, (0.0, 0.0))[None]
    return {
        "size": size,
        "textures": textures,
        "textures_error": relative_error(textures[1:]),
        "discs": discs,
        "discs_error": relative_error(discs),
        "still_under_noise": {
            str(sd): round(speeds(controls.noisy(still, 0, sd), flow).top.mean(), 3)
            for sd in (0.02, 0.05)
        },
    }


def relative_error(rows: list[dict]) -> dict:
    """Mean and largest absolute error of the fastest 5 %, as shares of the true speed."""
    errors = [abs(row["top"] / row["true"] - 1) for row in rows]
    return {"mean": round(float(np.mean(errors)), 4), "largest": round(float(max(errors)), 4)}


def moving_shapes(speed: float, count: int = 36) -> np.ndarray:
    """Rendered clips of all colours and shapes at one speed (px/frame), in random headings."""
    free = shapes.all_attributes("free")
    clips = []
    for key in range(count):
        attributes = free[key % len(free)]
        heading = shapes.draw_motion(attributes, key).heading
        clips.append(shapes.render(attributes, key, motion=shapes.Motion(heading, speed)))
    return np.stack(clips)


@torch.no_grad()
def decoded(frames: np.ndarray, noise: float = 0.0) -> np.ndarray:
    """Clips encoded and decoded by mini-wan's autoencoder, with Gaussian noise on the latents."""
    autoencoder = FrameAutoencoder.from_pretrained(ROOT / "distill_bench/assets/mini-wan/vae")
    latents = autoencoder.eval().encode(frames_to_video(torch.from_numpy(frames)))
    latents += noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    return video_to_frames(autoencoder.decode(latents)).numpy()


CONDITIONS = {
    "rendered": lambda frames: frames,
    "5 % of noise": lambda frames: controls.noisy(frames, 0, 0.05),
    "jitter of 0.15 pixels": controls.jittered,
    "decoded from latents": decoded,
    "decoded from latents under 10 % of noise": lambda frames: decoded(frames, 0.1),
}


def shape_calibration(flow: Flow) -> dict:
    """Readings of rendered clips of known speed: response curve and errors by condition, contrast.

    Errors are over single clips from 0.4 px/frame, the slowest free speed.
    """
    curves, errors = {}, {}
    for name, change in CONDITIONS.items():
        curve, rows = {}, []
        for true in SHAPE_SPEEDS:
            read = speeds(change(moving_shapes(true)), flow).top
            curve[str(true)] = {"mean": round(read.mean(), 3), "sd": round(read.std(), 3)}
            if true >= shapes.FREE_SPEEDS[0]:
                rows += [{"true": true, "top": top} for top in read]
        curves[name], errors[name] = curve, relative_error(rows)
    moving = moving_shapes(1.0)
    background = moving[:, :, :, :1, :1].astype(float)
    contrast = {
        str(share): round(
            speeds(
                np.rint(background + share * (moving - background)).astype(np.uint8), flow
            ).top.mean(),
            3,
        )
        for share in (1.0, 0.5, 0.25)
    }
    return {"clips": len(moving), "response": curves, "error": errors, "contrast": contrast}


def flow_calibrations() -> dict:
    """Calibration of every method. Farneback is calibrated only if opencv is installed."""
    flow = {
        "lucas-kanade": flow_calibration(lucas_kanade_flow, (32, 32))
        | {"moving_shapes": shape_calibration(lucas_kanade_flow)},
        f"lucas-kanade-{SMALL}": flow_calibration(lucas_kanade_flow, (SMALL, SMALL)),
    }
    if importlib.util.find_spec("cv2") is not None:
        flow["farneback-half"] = flow_calibration(farneback_flow, (480, 832))
    return flow


def main() -> int:
    """Write both files, the fast one first."""
    flow = flow_calibrations()
    write_json(FLOW_FILE, flow)
    extractors = {name: extractor_self_test(load_extractor(name)) for name in (DEFAULT, SECOND)}
    extractors[DEFAULT]["floors"] = extractor_floors(load_extractor(DEFAULT))
    write_json(EXTRACTORS_FILE, extractors)
    print(json.dumps(flow | extractors, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
