"""Reads one clip from a file, with one reader per file type, and writes clips as mp4."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av import VideoFrame


# of containers and elementary streams that PyAV reads
VIDEO_SUFFIXES = (
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
    ".vob", ".wmv", ".asf", ".flv", ".f4v", ".ogv", ".ogg", ".3gp", ".3g2", ".qt", ".mj2",
    ".mxf", ".nut", ".dv", ".y4m", ".ivf", ".obu", ".rm", ".rmvb", ".divx", ".swf", ".h264",
    ".264", ".h265", ".265", ".hevc", ".mjpeg", ".mjpg", ".m1v", ".m2v", ".mpv", ".av1", ".gxf",
    ".wtv", ".amv", ".nsv", ".roq", ".smk", ".bik", ".mk3d", ".psp", ".mpe", ".apng", ".vc1",
)  # fmt: skip
KINDS = "mp4, avi, mkv, webm and other videos, gif, webp, npy"
NO_TIMESTAMPS = 0x80  # AVFMT_NOTIMESTAMPS of FFmpeg


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
        raise ValueError(f"{path} is not a clip; known kinds: {KINDS}")
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
    """Decode a video with PyAV, turned as a player shows it.

    Raises:
        ValueError: if the file does not hold one video stream, or the stream is damaged, of no
            constant rate, turned by another angle than a multiple of 90 degrees, transparent, or of
            pixels that are not square.
    """
    import av  # optional: distill-bench[video]

    with av.open(str(path)) as container:
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & cover]
        if len(streams) != 1:
            raise ValueError(f"it has {len(streams) or 'no'} video streams; a clip has one")
        (stream,) = streams
        frames, times, matrices = [], [], set()
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ValueError(f"its frame {len(frames)} is damaged")
            if any(component.is_alpha for component in frame.format.components):
                _refuse_transparent(frame.to_ndarray(format="rgba")[..., 3].min())
            frames.append(frame.to_ndarray(format="rgb24"))
            times.append((frame.pts, frame.duration))
            matrices.add(_display_matrix(frame))
        if not frames:
            raise ValueError("it has no frames")
        _refuse_wide_pixels(stream.sample_aspect_ratio)
        rate = stream.average_rate
        fps = frame_rate(times, stream.time_base, None if rate is None else float(rate))
        if container.format.flags & NO_TIMESTAMPS:  # raw H.264, for instance: a made-up rate
            fps = None
    if len(matrices) > 1:
        raise ValueError("its frames are turned by different angles")
    clip = np.stack(frames).transpose(0, 3, 1, 2)
    return ClipFile(oriented(clip, matrices.pop()), fps)


def frame_rate(
    times: Sequence[tuple[int | None, int | None]], tick: Fraction | None, stated: float | None
) -> float | None:
    """Frames per second, if all frames are shown equally long.

    Timestamps may deviate from a constant rate by a twentieth of a frame, or, because containers
    round them, by a tick that is shorter than a quarter of a frame.

    Args:
        times: timestamp and duration of each frame, in ticks; None or 0 if unknown.
        tick: seconds.
        stated: frames per second that the file states, or None; kept if the timestamps agree.

    Raises:
        ValueError: if the timestamps fit no constant rate.
    """
    known = [(index, pts) for index, (pts, _) in enumerate(times) if pts is not None]
    if len(known) < 2 or not tick:
        return stated
    (first, start), (last, end) = known[0], known[-1]
    period = (end - start) / (last - first)
    tolerance = max(period / 20, min(1.01, period / 4))
    late = [pts - start - period * (index - first) for index, pts in known]
    held = times[-1][1] or 0  # the last frame has no successor, but may state its duration
    if period <= 0 or max(map(abs, late)) > tolerance or held > 1.5 * period:
        steps = [after - pts for (_, pts), (_, after) in pairwise(known)]
        steps += [held] if held > 1.5 * period else []
        milliseconds = [float(1000 * step * tick) for step in (min(steps), max(steps))]
        raise ValueError(
            f"its frames last {milliseconds[0]:.4g} to {milliseconds[1]:.4g} milliseconds; a clip "
            "has a constant rate: re-encode it with one (ffmpeg -r RATE)"
        )
    measured = float(1 / (period * tick))
    rounding = 0.01 + 1.01 / (end - start)
    agrees = stated is not None and abs(stated / measured - 1) <= rounding
    return stated if agrees else measured


def oriented(clip: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Turn and flip frames (T, 3, H, W) as a display matrix says.

    Args:
        matrix: a, b, c, d of ISO/IEC 14496-12, 6.2.2: the pixel in column p and row q is shown in
            column a p + c q and row b p + d q.

    Raises:
        ValueError: if the matrix is not a turn by a multiple of 90 degrees or a flip.
    """
    a, b, c, d = matrix
    straight = b == c == 0 and abs(a) == abs(d) > 0
    sideways = a == d == 0 and abs(b) == abs(c) > 0
    if not (straight or sideways):
        raise ValueError(
            f"its display matrix {matrix} is not a turn by a multiple of 90 degrees; re-encode it"
        )
    if sideways:
        clip = clip.swapaxes(2, 3)
    flipped = [axis for axis, sign in ((2, b + d), (3, a + c)) if sign < 0]
    return np.ascontiguousarray(np.flip(clip, flipped))


def _display_matrix(frame: "VideoFrame") -> tuple[int, int, int, int]:
    """a, b, c, d of a frame's display matrix, see `oriented`; of the identity if it has none."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
            return a, b, c, d
    return 1, 0, 0, 1


def _refuse_wide_pixels(aspect: Fraction | None) -> None:
    """Raise ValueError for pixels whose width and height differ by more than 5 %.

    Smaller differences come from resizing to whole pixels.
    """
    if aspect and not 0.95 < aspect < 1.05:
        raise ValueError(
            f"its pixels are not square, but {aspect.numerator}:{aspect.denominator}; re-encode it "
            "with square pixels (ffmpeg -vf scale=WIDTH:HEIGHT,setsar=1)"
        )


def _refuse_transparent(lowest: int) -> None:
    """Raise ValueError if the lowest alpha of a frame is below 255."""
    if lowest < 255:
        raise ValueError("it has transparent pixels, whose colour is undefined; put it on a ground")


def read_animation(path: Path) -> ClipFile:
    """Read a gif or webp, repeating each stored frame for as long as it is shown."""
    from PIL import Image, ImageOps, ImageSequence  # slow to import

    frames, milliseconds = [], []
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            _refuse_transparent(frame.convert("RGBA").getchannel("A").getextrema()[0])
            frames.append(np.asarray(ImageOps.exif_transpose(frame).convert("RGB")))
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
    **dict.fromkeys(VIDEO_SUFFIXES, read_video),
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
