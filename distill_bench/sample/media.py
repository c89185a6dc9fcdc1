"""Folders of clips: the harness's own, and anybody's mp4, gif, webp or npy files with captions.

The harness's is `clips.npy` (uint8, (N, T, 3, H, W)) with `manifest.jsonl` (index, prompt, seed). Of anybody's, each line of
`manifest.jsonl` names a file: {"file": "a.mp4", "prompt": "a red circle", "seed": 0, "fps": 16}, the last two where they are
known; without a manifest the clips have no captions.
"""

import json
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Annotated, TypeVar
from zipfile import BadZipFile

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import track

from distill_bench.evaluator import Clips
from distill_bench.store.files import read_json

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".gif", ".webp", ".npy")
MERGING = (
    ".gif",
    ".webp",
)  # equal frames in a row are stored as one: of a still clip there is one, often without its time
TICK = {".gif": 10, ".webp": 1}  # milliseconds to which they round how long a frame is shown
MAPPED = 2**30  # bytes of clips from which on they stay on disk
MANIFEST, CACHE = "manifest.jsonl", ".features"
Line = TypeVar("Line", bound=BaseModel)
Fps = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class OwnLine(BaseModel, strict=True):
    """A line of the harness's manifest."""

    index: int
    prompt: str
    seed: int
    fps: Fps | None = None  # over what row.json says


class FileLine(BaseModel, strict=True):
    """A line of anybody's manifest."""

    file: str
    prompt: str
    seed: int | None = None
    fps: Fps | None = None  # over what the file says


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
        return Clips(frames, prompts, seeds, fps, _facts(folder / "facts.npz"), folder / CACHE)
    except ValueError as error:
        raise ValueError(
            str(error) if str(folder) in str(error) else f"{folder}: {error}"
        ) from error


def _facts(path: Path) -> dict[str, np.ndarray]:
    try:
        return dict(np.load(path, allow_pickle=False)) if path.is_file() else {}
    except (ValueError, EOFError, OSError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _manifest(folder: Path, kind: type[Line]) -> list[Line]:
    """The lines of a manifest, none where there is no file; a line that is torn or wrong would drop a clip, and is an error."""
    path, found = folder / MANIFEST, []
    if not path.is_file():
        return []
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            found.append(kind.model_validate_json(text))
            for key in json.loads(text).keys() - kind.model_fields.keys():
                if key.lower() in kind.model_fields:
                    raise ValueError(f"{path}, line {number}: {key!r} is written {key.lower()!r}")
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            what = (
                f"the line has no {key!r}"
                if first["type"] == "missing"
                else f"{key or text[:40]!r}: {first['msg']}"
            )
            raise ValueError(f"{path}, line {number}: {what}") from error
    if not found:
        raise ValueError(f"{path} is empty: it needs a line a clip")
    return found


def _own(folder: Path) -> tuple[np.ndarray, list[str], list[int], float]:
    lines = _manifest(folder, OwnLine)
    if not lines:
        raise ValueError(
            f"no {MANIFEST} in {folder}: clips.npy needs one, a line a clip with index, prompt and seed"
        )
    try:
        path = folder / "clips.npy"
        mapped = (
            path.stat().st_size > MAPPED
        )  # as a copy on write: torch takes no array that it may not change
        frames = np.load(path, allow_pickle=False, mmap_mode="c" if mapped else None)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{folder / 'clips.npy'} cannot be read: {error}") from error
    if frames.ndim != 5:
        raise ValueError(f"{path} is {frames.shape}: clips.npy is (N, T, 3, H, W)")
    if [line.index for line in lines] != list(range(len(frames))):
        raise ValueError(
            f"{folder / MANIFEST} lists {len(lines)} clips, clips.npy holds {len(frames)}"
        )
    row = read_json(folder / "row.json")
    if row is None and (folder / "row.json").is_file():
        raise ValueError(
            f"{folder / 'row.json'} is no JSON object: delete it, then fps of {MANIFEST} holds"
        )
    if (
        row is None
    ):  # else `sample` decoded them, and a student that went black is to be scored as one
        _refuse_dark(frames)
    try:
        own = TypeAdapter(Fps).validate_python((row or {}).get("fps", 8.0))
    except ValidationError as error:
        raise ValueError(f"{folder / 'row.json'}: fps: {error.errors()[0]['msg']}") from error
    rates = {line.fps or own for line in lines}
    if len(rates) > 1:
        raise ValueError(
            f"{folder / MANIFEST} gives {min(rates):g} and {max(rates):g} frames a second: clips of one rate only"
        )
    return (
        frames,
        [line.prompt for line in lines],
        [line.seed for line in lines],
        float(rates.pop()),
    )


def _foreign(folder: Path) -> tuple[np.ndarray, list[str], list[int], float]:
    lines = _manifest(folder, FileLine)
    files = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if lines:
        counts = Counter(folder / line.file for line in lines)
        path, most = counts.most_common(1)[0]
        if most > 1:
            raise ValueError(f"{folder / MANIFEST} names {path.name} {most} times")
        left_out = [name for name in files if folder / name not in counts]
        if left_out:  # a clip without a caption would drop out unseen
            raise ValueError(
                f"{folder / MANIFEST} does not name {left_out[0]} ({len(left_out)} such files): add it or move it away"
            )
    lines = lines or [FileLine(file=name, prompt="") for name in files]
    if not lines:
        raise ValueError(
            f"no clips in {folder}: it needs clips.npy or files of {', '.join(SUFFIXES)}"
        )
    clips, rates = [], []
    console = Console(file=sys.stderr, quiet=not sys.stderr.isatty())
    for line in track(lines, f"reading {folder.name}", console=console, transient=True):
        frames, fps = read_clip(folder / line.file)
        clips.append(frames)
        rates.append(line.fps or fps or 8.0)
    merging = [Path(line.file).suffix.lower() in MERGING for line in lines]
    exact = [rate for rate, rounded in zip(rates, merging, strict=True) if not rounded]
    rate, longest = max(exact or rates), max(map(len, clips))
    for i, line in enumerate(lines):
        path, times = folder / line.file, round(rate / rates[i])
        if merging[i] and (len(clips[i]) == 1 or times > 1):
            clips[i] = clips[i].repeat(longest if len(clips[i]) == 1 else times, 0)
            rates[i] = rate
        if abs(rates[i] - rate) > (
            0.1 * rate if merging[i] else 0.01
        ):  # times of the merging kinds are rounded
            raise ValueError(
                f"{path} has {rates[i]:g} frames a second, others {rate:g}: all clips of a folder must have one rate; where a "
                f"file says it wrongly, its line in {MANIFEST} may say fps"
            )
        if clips[i].shape != clips[0].shape:
            first = folder / lines[0].file
            raise ValueError(
                f"{path} is {clips[i].shape}, {first} is {clips[0].shape}: all clips of a folder must be alike"
            )
    frames = np.empty((len(clips), *clips[0].shape), np.uint8)
    for i in reversed(range(len(clips))):  # so that memory holds the clips once
        frames[i] = clips.pop()
    if all(
        line.file.lower().endswith(".npy") for line in lines
    ):  # nothing else can hold another range
        _refuse_dark(frames)
    return (
        frames,
        [line.prompt for line in lines],
        [i if line.seed is None else line.seed for i, line in enumerate(lines)],
        rate,
    )


def _refuse_dark(frames: np.ndarray) -> None:
    """ValueError for bytes that look like floats of 0..1 cast, which gives 0 and 1."""
    if frames.size and frames.max() <= 1:
        raise ValueError("no value of the clips is above 1: they must be 0..255, not 0..1")


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
        raise ValueError(
            f"{path}: reading videos needs PyAV: pip install 'distill-bench[video]'"
        ) from error
    except (
        OSError,
        EOFError,
        ValueError,
        LookupError,
        SyntaxError,
    ) as error:  # PIL's for a torn chunk is a SyntaxError
        raise ValueError(f"{path} cannot be read: {error}") from error
    raise ValueError(f"{path} is no clip: known are {', '.join(SUFFIXES)}")


def _array(frames: np.ndarray) -> np.ndarray:
    if frames.dtype != np.uint8:
        raise ValueError(
            f"its values are {frames.dtype}: a clip is uint8 in 0..255, so that its range is sure"
        )
    if frames.ndim != 4 or frames.shape[1] != 3:
        whole = ", and many in one file are clips.npy" if frames.ndim == 5 else ""
        if frames.ndim == 4 and 3 in (frames.shape[0], frames.shape[3]):
            whole = "; this looks like " + (
                "(T, H, W, 3)" if frames.shape[3] == 3 else "(3, T, H, W)"
            )
        raise ValueError(f"its shape is {frames.shape}: a clip is (T, 3, H, W){whole}")
    return frames


def _animation(path: Path) -> tuple[np.ndarray, float | None]:
    """Frames at one rate, each as often as it is shown: equal frames in a row are stored as a long one."""
    from PIL import Image, ImageSequence

    frames, milliseconds = [], []
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            frames.append(np.asarray(frame.convert("RGB")))
            milliseconds.append(round(frame.info.get("duration", 0)))
    whole = np.stack(frames).transpose(0, 3, 1, 2)
    if not any(milliseconds):
        return whole, None
    counts = frame_counts(milliseconds, TICK[path.suffix.lower()])
    return whole.repeat(counts, 0), 1000 * sum(counts) / sum(milliseconds)


def frame_counts(milliseconds: list[int], tick: int) -> list[int]:
    """How many frames of one rate each stored frame is.

    Times are rounded to a tick, and encoders spread what is left: 24 frames a second in a gif are 40, 40, 50 milliseconds. Taken
    at their word they would be a hundred frames a second that stand still three times of four. So the longest period is taken
    that explains every time to a tick a frame.

    Raises:
        ValueError: if a frame has no time, or no period explains them.
    """
    shortest = min(milliseconds)
    if shortest <= 0:
        raise ValueError("some of its frames have no duration")
    for parts in range(1, 9):
        period = shortest / parts
        counts = [
            parts if each - shortest <= tick else round(each / period) for each in milliseconds
        ]
        slack = [
            tick * (1 + count / parts) for count in counts
        ]  # of the time itself, and of the shortest
        if all(
            abs(t - c * period) <= s for t, c, s in zip(milliseconds, counts, slack, strict=True)
        ):
            return counts
    raise ValueError(
        f"its frames are shown for {sorted(set(milliseconds))} milliseconds: they have no one rate"
    )


def _video(path: Path) -> tuple[np.ndarray, float | None]:
    import av

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
    return np.stack(frames).transpose(0, 3, 1, 2), float(rate) if rate else None


def write_video(path: Path, frames: np.ndarray, fps: float) -> bool:
    """Write frames, uint8 (T, 3, H, W) of even sizes, as H.264; False where PyAV is not installed."""
    try:
        import av
    except ModuleNotFoundError:
        return False
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[-2:]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "17"}
        for frame in frames.transpose(0, 2, 3, 1):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                )
            )
        container.mux(stream.encode())
    return True
