"""Reads one clip from a file, with one reader per file type, and writes clips as mp4."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class ClipFile:
    """Frames and frame rate of one file."""

    frames: np.ndarray  # uint8 (T, 3, H, W)
    fps: float | None = None  # None if the file does not state it
    merged: bool = False  # the file stores equal consecutive frames as one, and rounds durations


def read_clip(path: Path) -> ClipFile:
    """Read a file of a type in `READERS`.

    Raises:
        ValueError: if the file is missing, unreadable, damaged or of another type.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} is not a clip; known kinds: {', '.join(READERS)}")
    try:
        return reader(path)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: reading videos needs PyAV: pip install 'distill-bench[video]'"
        ) from error
    # PIL raises SyntaxError for a truncated chunk
    except (OSError, EOFError, ValueError, LookupError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_array(path: Path) -> ClipFile:
    """Read an npy file, which must hold uint8 (T, 3, H, W)."""
    frames = np.load(path, allow_pickle=False)
    if frames.dtype != np.uint8:
        raise ValueError(
            f"its values are {frames.dtype}; a clip is uint8 in 0..255, because the range of other "
            "types is ambiguous"
        )
    if frames.ndim == 4 and frames.shape[1] == 3:
        return ClipFile(frames)
    hint = ""
    if frames.ndim == 5:
        hint = "; a file of several clips must be named clips.npy"
    elif frames.ndim == 4 and frames.shape[3] == 3:
        hint = "; this looks like (T, H, W, 3)"
    elif frames.ndim == 4 and frames.shape[0] == 3:
        hint = "; this looks like (3, T, H, W)"
    raise ValueError(f"its shape is {frames.shape}; a clip is (T, 3, H, W){hint}")


def read_video(path: Path) -> ClipFile:
    """Decode the first video stream with PyAV."""
    import av  # optional: distill-bench[video]

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        rate = container.streams.video[0].average_rate
        frames = []
        for frame in container.decode(video=0):
            if frame.is_corrupt:
                raise ValueError(f"its frame {len(frames)} is damaged")
            frames.append(frame.to_ndarray(format="rgb24"))
    if not frames:
        raise ValueError("it has no frames")
    return ClipFile(np.stack(frames).transpose(0, 3, 1, 2), float(rate) if rate else None)


def read_animation(path: Path) -> ClipFile:
    """Read a gif or webp, repeating each stored frame for as long as it is shown."""
    from PIL import Image, ImageSequence  # slow to import

    frames, milliseconds = [], []
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            frames.append(np.asarray(frame.convert("RGB")))
            milliseconds.append(round(frame.info.get("duration", 0)))
    clip = np.stack(frames).transpose(0, 3, 1, 2)
    if not any(milliseconds):
        return ClipFile(clip, merged=True)
    tick = 10 if path.suffix.lower() == ".gif" else 1  # a gif counts in hundredths of a second
    counts = frame_counts(milliseconds, tick)
    return ClipFile(clip.repeat(counts, 0), 1000 * sum(counts) / sum(milliseconds), merged=True)


def frame_counts(milliseconds: list[int], tick: int) -> list[int]:
    """Number of frames, at one common rate, that each stored frame stands for.

    Durations are rounded to `tick` milliseconds, and encoders spread the remainder: a gif of 24
    frames per second has durations of 40, 40 and 50 ms. Read literally, these mean 100 frames per
    second with many repeats. This function therefore finds the longest frame period that explains
    every duration up to one tick per frame.

    Raises:
        ValueError: if a frame has no duration, or no period explains all durations.
    """
    shortest = min(milliseconds)
    if shortest <= 0:
        raise ValueError("some of its frames have no duration")
    for parts in range(1, 9):
        period = shortest / parts
        counts = [
            parts if duration - shortest <= tick else round(duration / period)
            for duration in milliseconds
        ]
        explained = (
            # this duration and the shortest are both rounded
            abs(duration - count * period) <= tick * (1 + count / parts)
            for duration, count in zip(milliseconds, counts, strict=True)
        )
        if all(explained):
            return counts
    raise ValueError(
        f"its frames last {sorted(set(milliseconds))} milliseconds, which fit no constant rate"
    )


READERS: dict[str, Callable[[Path], ClipFile]] = {
    ".mp4": read_video,
    ".mov": read_video,
    ".mkv": read_video,
    ".webm": read_video,
    ".gif": read_animation,
    ".webp": read_animation,
    ".npy": read_array,
}


def write_video(path: Path, frames: np.ndarray, fps: float) -> bool:
    """Write frames, uint8 (T, 3, H, W) with even H and W, as H.264; False if PyAV is missing."""
    try:
        import av  # optional: distill-bench[video]
    except ModuleNotFoundError:
        return False
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[-2:]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "17"}
        for frame in frames.transpose(0, 2, 3, 1):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return True
