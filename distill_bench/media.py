"""Folders of clips: the harness's own, and anybody's mp4, gif, webp or npy files with captions.

The harness's is `clips.npy` (uint8, (N, T, 3, H, W)) with `manifest.jsonl` (index, prompt, seed). Of anybody's, each line of
`manifest.jsonl` names a file: {"file": "a.mp4", "prompt": "a red circle", "seed": 0}; without one the clips have no captions.
"""

import math
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from distill_bench.evaluator import Clips
from distill_bench.store import read_json, read_jsonl

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".gif", ".webp", ".npy")
MERGING = (".gif", ".webp")  # equal frames in a row are stored as one: of a still clip there is one, often without its time
MANIFEST, CACHE = "manifest.jsonl", ".features"


def load_clips(folder: Path) -> Clips:
    """The clips of a folder.

    Raises:
        ValueError: if there are none, a file cannot be read, or they do not belong together.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    try:
        if (folder / "clips.npy").is_file():
            frames, prompts, seeds, fps = _own(folder)
        else:
            frames, prompts, seeds, fps = _foreign(folder)
        facts = dict(np.load(folder / "facts.npz", allow_pickle=False)) if (folder / "facts.npz").is_file() else {}
        return Clips(frames, prompts, seeds, fps, facts, folder / CACHE)
    except KeyError as error:
        raise ValueError(f"{folder / MANIFEST}: a line has no {error}") from error
    except ValueError as error:
        raise ValueError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from error


def _own(folder: Path) -> tuple[np.ndarray, list[str], list[int], float]:
    lines = read_jsonl(folder / MANIFEST)
    if not lines:
        raise ValueError(f"no {MANIFEST} in {folder}: clips.npy needs one, a line a clip with index, prompt and seed")
    try:
        frames = np.load(folder / "clips.npy", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{folder / 'clips.npy'} cannot be read: {error}") from error
    if [line["index"] for line in lines] != list(range(len(frames))):
        raise ValueError(f"{folder / MANIFEST} lists {len(lines)} clips, clips.npy holds {len(frames)}")
    fps = float((read_json(folder / "row.json") or {}).get("fps", 8.0))
    return frames, [line["prompt"] for line in lines], [line["seed"] for line in lines], fps


def _foreign(folder: Path) -> tuple[np.ndarray, list[str], list[int], float]:
    lines = read_jsonl(folder / MANIFEST)
    if not lines:
        files = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        lines = [{"file": name, "prompt": ""} for name in files]
    if not lines:
        raise ValueError(f"no clips in {folder}: it needs clips.npy or files of {', '.join(SUFFIXES)}")
    clips, rates = [], []
    console = Console(file=sys.stderr, quiet=not sys.stderr.isatty())
    for line in track(lines, f"reading {folder.name}", console=console, transient=True):
        frames, fps = read_clip(folder / line["file"])
        clips.append(frames)
        rates.append(float(line.get("fps") or fps or 8.0))
    rate, longest = max(rates), max(map(len, clips))
    for i, line in enumerate(lines):
        path, times = folder / line["file"], round(rate / rates[i])
        if path.suffix.lower() in MERGING and (len(clips[i]) == 1 or times > 1):
            clips[i] = clips[i].repeat(longest if len(clips[i]) == 1 else times, 0)
            rates[i] = rate
        if abs(rates[i] - rate) > 0.01:
            raise ValueError(
                f"{path} has {rates[i]:g} frames a second, others {rate:g}: all clips of a folder must have one rate"
            )
        if clips[i].shape != clips[0].shape:
            first = folder / lines[0]["file"]
            raise ValueError(f"{path} is {clips[i].shape}, {first} is {clips[0].shape}: all clips of a folder must be alike")
    return np.stack(clips), [line["prompt"] for line in lines], [line.get("seed", i) for i, line in enumerate(lines)], rate


def read_clip(path: Path) -> tuple[np.ndarray, float | None]:
    """The frames of a file, uint8 (T, 3, H, W), and its frames a second where it says so.

    Raises:
        ValueError: if it cannot be read, or is not what an npy file must be.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}")
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            return _array(np.load(path, allow_pickle=False)), None
        if suffix in MERGING:
            return _animation(path)
        if suffix in SUFFIXES:
            return _video(path)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: reading videos needs PyAV: pip install 'distill-bench[video]'") from error
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    raise ValueError(f"{path} is no clip: known are {', '.join(SUFFIXES)}")


def _array(frames: np.ndarray) -> np.ndarray:
    if frames.dtype != np.uint8:
        raise ValueError(f"its values are {frames.dtype}: a clip is uint8 in 0..255, so that its range is sure")
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(f"its shape is {frames.shape}: a clip is (T, 3, H, W)")
    return frames


def _animation(path: Path) -> tuple[np.ndarray, float | None]:
    """Frames at the rate of the greatest common divisor of their durations: equal frames in a row are stored as a long one."""
    from PIL import Image, ImageSequence

    frames, milliseconds = [], []
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            frames.append(np.asarray(frame.convert("RGB")))
            milliseconds.append(round(frame.info.get("duration", 0)))
    period = math.gcd(*milliseconds)
    if not period:
        return np.stack(frames).transpose(0, 3, 1, 2), None
    whole = np.stack(frames).repeat([each // period for each in milliseconds], 0)
    return whole.transpose(0, 3, 1, 2), 1000 / period


def _video(path: Path) -> tuple[np.ndarray, float | None]:
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        rate = container.streams.video[0].average_rate
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if not frames:
        raise ValueError("it has no frames")
    return np.stack(frames).transpose(0, 3, 1, 2), float(rate) if rate else None
