"""Loads a folder of clips: a folder that the harness sampled, or any folder of clip files.

A sampled folder holds `clips.npy` (uint8, (N, T, 3, H, W)) and `manifest.jsonl` with index, prompt
and seed per clip. Any other folder holds one file per clip. Its `manifest.jsonl` is optional and
names each file: {"file": "a.mp4", "prompt": "a red circle", "seed": 0, "fps": 16}, where seed and
fps may be left out. Without a manifest the clips have no captions.

Clips of more than `MAPPED_BYTES` are mapped from the disk, so that memory does not bound their
number.
"""

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Annotated, TypeVar
from zipfile import BadZipFile

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from distill_bench.evaluator import Clips
from distill_bench.sample.clip_files import KINDS, READERS, ClipFile, read_clip
from distill_bench.store.files import read_json, read_text, text_lines, warn_of_unused
from distill_bench.store.progress import tracked

MANIFEST = "manifest.jsonl"
CACHE = ".features"
NAMED = 8  # entries of a folder that are named if they are not scored
# what the harness writes into a folder of clips
OWN_FILES = {MANIFEST, CACHE, "row.json", "facts.npz", "metrics.jsonl", "videos", "protocol.json"}
MAPPED_BYTES = 2**30  # a larger clips.npy, or larger decoded files, stay on disk
DEFAULT_FPS = 8.0  # if neither the manifest nor the file states a rate
Fps = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SampledLine(BaseModel, strict=True):
    """Line of the manifest of a sampled folder."""

    index: int
    prompt: str
    seed: int
    fps: Fps | None = None  # overrides row.json


class FileLine(BaseModel, strict=True):
    """Line of the manifest of a folder of clip files."""

    file: str
    prompt: str
    seed: int | None = None
    fps: Fps | None = None  # overrides the file


Line = TypeVar("Line", SampledLine, FileLine)


def load_clips(folder: Path) -> Clips:
    """Load the clips of a folder.

    Raises:
        ValueError: if there are no clips, a file cannot be read, or clips differ in size or rate.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    try:
        sampled = (folder / "clips.npy").is_file()
        frames, prompts, seeds, fps = (_load_sampled if sampled else _load_files)(folder)
        facts = _facts(folder / "facts.npz")
        return Clips(frames, prompts, seeds, fps, facts, folder / CACHE)
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise ValueError(f"{folder}: {error}") from error


def unscored(folder: Path) -> str | None:
    """Name the entries of a folder of clips that are neither scored nor written by the harness.

    A sub-folder counts as one entry, unless the manifest names a file in it. None: no such entries.
    """
    root = Path(os.path.abspath(folder))
    sampled = (root / "clips.npy").is_file()
    scored = ["clips.npy"] if sampled else [line.file for line in _file_lines(folder)]
    used = {Path(os.path.abspath(root / name)) for name in [*OWN_FILES, *scored]}
    opened = {place for path in used for place in path.parents if place.is_relative_to(root)}
    listed = {path for place in opened for path in place.iterdir()}
    others = sorted(listed - used - opened)
    if not others:
        return None
    count = "1 entry" if len(others) == 1 else f"{len(others)} entries"
    return f"{folder}: {count} not scored: {_names(others, root)}"


def _names(paths: Sequence[Path], root: Path) -> str:
    """Paths below a folder, at most NAMED of them; a folder's name ends with a slash."""
    names = [f"{path.relative_to(root)}{'/' if path.is_dir() else ''}" for path in paths[:NAMED]]
    return ", ".join(names) + (", ..." if len(paths) > NAMED else "")


def _load_sampled(folder: Path) -> tuple[np.ndarray, list[str], list[int], float]:
    lines = _manifest(folder, SampledLine)
    if not lines:
        raise ValueError(
            f"no {MANIFEST} in {folder}; clips.npy needs one with index, prompt and seed per clip"
        )
    frames = _load_array(folder / "clips.npy")
    if [line.index for line in lines] != list(range(len(frames))):
        raise ValueError(
            f"{folder / MANIFEST} lists {len(lines)} clips, clips.npy holds {len(frames)}; "
            "write one line per clip, with index counting from 0"
        )
    row = read_json(folder / "row.json")
    if row is None:
        if (folder / "row.json").is_file():
            raise ValueError(
                f"{folder / 'row.json'} is not a JSON object; delete it to use fps of {MANIFEST}"
            )
        # only without row.json: the harness's own clips may really be black, and must be scored
        _refuse_unscaled(frames)
    try:
        row_fps = TypeAdapter(Fps).validate_python((row or {}).get("fps", DEFAULT_FPS))
    except ValidationError as error:
        raise ValueError(f"{folder / 'row.json'}: fps: {error.errors()[0]['msg']}") from error
    rates = {line.fps or row_fps for line in lines}
    if len(rates) > 1:
        raise ValueError(
            f"{folder / MANIFEST} gives {min(rates):g} and {max(rates):g} frames per second; all "
            "clips of a folder must have one rate"
        )
    prompts, seeds = [line.prompt for line in lines], [line.seed for line in lines]
    return frames, prompts, seeds, float(rates.pop())


def _load_array(path: Path) -> np.ndarray:
    # copy-on-write, because torch does not accept read-only arrays
    mmap_mode = "c" if path.stat().st_size > MAPPED_BYTES else None
    try:
        frames = np.load(path, allow_pickle=False, mmap_mode=mmap_mode)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if frames.ndim != 5:
        raise ValueError(f"{path} is {frames.shape}; clips.npy must be (N, T, 3, H, W)")
    return frames


def _load_files(folder: Path) -> tuple[np.ndarray, list[str], list[int], float]:
    lines = _file_lines(folder)
    paths = [folder / line.file for line in lines]
    reading = tracked(paths, f"reading {folder.name}")
    on_disk = Spill(folder / CACHE, len(paths))
    read = [replace(clip, frames=on_disk(clip.frames)) for clip in map(read_clip, reading)]
    rates = [line.fps or clip.fps or DEFAULT_FPS for line, clip in zip(lines, read, strict=True)]
    clips, fps = _at_one_rate(paths, read, rates, on_disk)
    del read
    frames = on_disk.stacked(clips)
    if all(path.suffix.lower() == ".npy" for path in paths):  # other kinds are always 0..255
        _refuse_unscaled(frames)
    seeds = [index if line.seed is None else line.seed for index, line in enumerate(lines)]
    return frames, [line.prompt for line in lines], seeds, fps


class Spill:
    """Keeps the arrays of one folder: in memory if they are small, else in an unnamed file.

    The file disappears with the process, however it ends.

    Args:
        folder: for the file; the system's folder of temporary files if it cannot be written.
        count: number of arrays, all about as large as the first.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.file: IO[bytes] | None = None
        self.bytes = 0  # in the file

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """The array, from now on mapped from the file if it is kept there."""
        if self.file is None and array.nbytes * self.count <= MAPPED_BYTES:
            return array
        if self.file is None:
            self.file = self._unnamed_file()
        self.file.write(np.ascontiguousarray(array).data)
        self.file.flush()
        start, self.bytes = self.bytes, self.bytes + array.nbytes
        return np.memmap(self.file, np.uint8, "c", start, array.shape)

    def _unnamed_file(self) -> IO[bytes]:
        try:
            self.folder.mkdir(exist_ok=True)
            return tempfile.TemporaryFile(dir=self.folder)
        except OSError:
            return tempfile.TemporaryFile()

    def stacked(self, arrays: list[np.ndarray]) -> np.ndarray:
        """The arrays, of one shape, as one; empties the list to free them."""
        shape = (len(arrays), *arrays[0].shape)
        if self.bytes == math.prod(shape):  # the file holds exactly these, in this order
            return np.memmap(self.file, np.uint8, "c", shape=shape)
        if math.prod(shape) > MAPPED_BYTES:
            again = Spill(self.folder, len(arrays))
            return again.stacked([again(array) for array in arrays])
        stacked = np.empty(shape, np.uint8)
        for index in reversed(range(len(arrays))):  # frees each clip as it is copied
            stacked[index] = arrays.pop()
        return stacked


def _file_lines(folder: Path) -> list[FileLine]:
    """The manifest's lines, or one line without caption per clip file."""
    files = sorted(path.name for path in folder.iterdir() if _is_clip(path))
    lines = _manifest(folder, FileLine)
    if not lines:
        if not files:
            entries = _names(sorted(folder.iterdir()), folder) or "nothing"
            raise ValueError(
                f"no clips in {folder}; it needs clips.npy or files of kinds {KINDS}; it holds "
                f"{entries}"
            )
        return [FileLine(file=name, prompt="") for name in files]
    counts = Counter(folder / line.file for line in lines)
    path, count = counts.most_common(1)[0]
    if count > 1:
        raise ValueError(f"{folder / MANIFEST} names {path.name} {count} times; name it once")
    missing = [name for name in files if folder / name not in counts]
    if missing:  # silently leaving out a clip would change every score
        raise ValueError(
            f"{folder / MANIFEST} does not name {missing[0]} ({len(missing)} such files); "
            "add it or move it away"
        )
    return lines


def _is_clip(path: Path) -> bool:
    """True for a file that is scored without a manifest; hidden ones are remains of macOS."""
    return path.is_file() and path.suffix.lower() in READERS and not path.name.startswith(".")


def _at_one_rate(
    paths: list[Path],
    clips: list[ClipFile],
    rates: list[float],
    keep: Callable[[np.ndarray], np.ndarray],
) -> tuple[list[np.ndarray], float]:
    """Frames of every clip at one rate, and the rate.

    Exact rates win over rounded rates. Files that merge equal frames get these frames back by
    repetition: such a file stores a still clip as one frame, often without a duration.

    Raises:
        ValueError: if rates or shapes differ.
    """
    exact = [rate for rate, clip in zip(rates, clips, strict=True) if not clip.merged]
    fps = max(exact or rates)
    longest = max(len(clip.frames) for clip in clips)
    result: list[np.ndarray] = []
    for path, clip, rate in zip(paths, clips, rates, strict=True):
        frames, repeats = clip.frames, round(fps / rate)
        if clip.merged and (len(frames) == 1 or repeats > 1):
            frames = keep(frames.repeat(longest if len(frames) == 1 else repeats, 0))
            rate = fps
        if abs(rate - fps) > (0.1 * fps if clip.merged else 0.01):
            raise ValueError(
                f"{path} has {rate:g} frames per second, others {fps:g}; all clips of a folder "
                f"must have one rate (if a file states a wrong rate, give fps in {MANIFEST})"
            )
        result.append(frames)
        if frames.shape != result[0].shape:
            raise ValueError(
                f"{path} is {frames.shape}, {paths[0]} is {result[0].shape}; all clips of a folder "
                "must have one shape"
            )
    return result, fps


def _manifest(folder: Path, kind: type[Line]) -> list[Line]:
    """Lines of the manifest; [] if there is no file.

    Raises:
        ValueError: for an invalid line, because skipping it would silently drop a clip.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return []
    try:
        texts = text_lines(read_text(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    lines = [
        _line(f"{path}, line {number}", text, kind)
        for number, text in enumerate(texts, 1)
        if text.strip()
    ]
    if not lines:
        raise ValueError(f"{path} is empty; it needs one line per clip")
    entries = (json.loads(text) for text in texts if text.strip())
    warn_of_unused(path, entries, [*kind.model_fields])
    return lines


def _line(place: str, text: str, kind: type[Line]) -> Line:
    try:
        line = kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise ValueError(f"{place}: the line has no {key!r}") from error
        raise ValueError(f"{place}: {key or text[:40]!r}: {first['msg']}") from error
    for key in json.loads(text).keys() - kind.model_fields.keys():
        if key.lower() in kind.model_fields:
            raise ValueError(f"{place}: unknown key {key!r}; write {key.lower()!r}")
    return line


def _facts(path: Path) -> dict[str, np.ndarray]:
    try:
        return dict(np.load(path, allow_pickle=False)) if path.is_file() else {}
    except (ValueError, EOFError, OSError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _refuse_unscaled(frames: np.ndarray) -> None:
    """Raise ValueError for clips of floats in 0..1 cast to bytes, which leaves only 0 and 1."""
    if frames.size and frames.max() <= 1:
        raise ValueError("no value of the clips is above 1; they must be 0..255, not 0..1")
