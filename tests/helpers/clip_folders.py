"""Write folders of clips for tests: sampled folders and folders of clip files."""

import functools
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from distill_bench.domain import controls
from distill_bench.evaluator import Clips

rendered = functools.cache(controls.rendered)  # many tests write the same clips


def rendered_pairs(first: int, count: int) -> Clips:
    """Clips of 16 frames with keys from `first` on, two per prompt."""
    frames, prompts = controls.rendered(count, first)
    prompts = [prompt for prompt in prompts[: count // 2] for _ in range(2)]
    return Clips(np.repeat(frames, 2, axis=1), prompts, list(range(first, first + count)))


def write_sampled(
    folder: Path, count: int = 12, first: int = 0, frames: np.ndarray | None = None, **row
) -> Path:
    """Write rendered clips, or `frames` with their captions, as the harness samples them."""
    own_frames, prompts = rendered(count, first)
    folder.mkdir(parents=True)
    np.save(folder / "clips.npy", own_frames if frames is None else frames)
    write_lines(
        folder, [{"index": i, "prompt": p, "seed": first + i} for i, p in enumerate(prompts)]
    )
    (folder / "row.json").write_text(json.dumps({"kind": "student"} | row))
    return folder


def write_lines(folder: Path, lines: list[dict]) -> None:
    """Write a manifest.jsonl."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "manifest.jsonl").write_text(text)


def write_manifest(folder: Path, names: list[str], prompts: list[str]) -> None:
    """Write the manifest of a folder of clip files, with seeds that count up."""
    pairs = enumerate(zip(names, prompts, strict=True))
    write_lines(folder, [{"file": n, "prompt": p, "seed": i} for i, (n, p) in pairs])


def save_clip(path: Path, frames: np.ndarray, fps: int = 8) -> None:
    """Write one clip (T, 3, H, W) as the kind of file of its suffix, losslessly if possible."""
    if path.suffix == ".npy":
        np.save(path, frames)
    elif path.suffix in (".gif", ".webp"):
        save_animation(path, frames, 1000 // fps)
    else:
        save_video(path, frames, fps)


def save_video(
    path: Path, frames: np.ndarray, fps: int, shown: Sequence[int] | None = None, **stream_keys: Any
) -> None:
    """Write a clip as lossless H.264 in the container of the suffix.

    Args:
        shown: when each frame is shown, in frames; default: evenly.
        stream_keys: attributes of the stream's codec context.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt = "yuv444p"
        stream.options = {"crf": "0"}
        for key, value in stream_keys.items():
            setattr(stream.codec_context, key, value)
        for index, frame in enumerate(frames.transpose(0, 2, 3, 1)):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if shown is not None:
                picture.pts, picture.time_base = shown[index], Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def save_animation(path: Path, frames: np.ndarray, milliseconds: int | list[int]) -> None:
    """Write a clip as gif or webp with this duration per frame."""
    from PIL import Image

    first, *rest = [Image.fromarray(image) for image in frames.transpose(0, 2, 3, 1)]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0, **lossless)
