"""TODO: sample.folder."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill_bench.networks.ranks import ranks
from distill_bench.sample.media import write_video

PATIENCE = 60.0  # seconds without a clip of the other ranks before the first one makes theirs: or three times its own


@dataclass(frozen=True)
class ClipSource:
    """How the clips of a row are made: `frames(first, end)` are those of these indices, uint8 (N, T, 3, H, W)."""

    frames: Callable[[int, int], np.ndarray]
    together: int  # clips that are drawn at once
    videos: bool = False  # beside the frames


def write_folder(
    folder: Path,
    row: ClipSource,
    prompts: list[str],
    seeds: list[int],
    about: dict,
    facts: Mapping = {},
) -> None:  # noqa: B006
    """Write a folder of clips; who comes second finds it done. `facts` are exact arrays beside the frames.

    Every rank makes its share, the first one puts them together; it makes the others' too where they do not come.
    """
    here = ranks()
    parts = folder.with_name(f".parts-{folder.name}")
    firsts = list(range(0, len(prompts), row.together))
    began = time.monotonic()
    for first in firsts[here.rank :: here.world]:
        _make_part(folder, parts, row, first, len(prompts), about["fps"])
    if not here.first:
        return
    seen, since = 0, time.monotonic()
    patience = max(PATIENCE, 3 * (since - began) * here.world / len(firsts))
    while missing := [first for first in firsts if not _part(parts, first).is_file()]:
        if len(missing) != seen:
            seen, since = len(missing), time.monotonic()
        if time.monotonic() - since > patience:
            _make_part(folder, parts, row, missing[-1], len(prompts), about["fps"])
        else:
            time.sleep(0.2)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    try:
        _join([_part(parts, first) for first in firsts], temporary / "clips.npy", len(prompts))
        if videos := sorted(parts.glob("*.mp4")):
            (temporary / "videos").mkdir()
            for path in videos:
                path.rename(temporary / "videos" / path.name)
        lines = [
            {"index": i, "prompt": p, "seed": s}
            for i, (p, s) in enumerate(zip(prompts, seeds, strict=True))
        ]
        (temporary / "manifest.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
        if facts:
            np.savez(temporary / "facts.npz", **facts)
        (temporary / "row.json").write_text(json.dumps(about) + "\n")
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "clips.npy").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(parts, ignore_errors=True)


def _part(parts: Path, first: int) -> Path:
    return parts / f"{first:06d}.npy"


def _make_part(folder: Path, parts: Path, row: ClipSource, first: int, n: int, fps: float) -> None:
    """Make the clips from `first` on that are drawn together, unless they are there."""
    path = _part(parts, first)
    if path.is_file() or (folder / "clips.npy").is_file():
        return
    frames = row.frames(first, min(first + row.together, n))
    parts.mkdir(parents=True, exist_ok=True)
    if row.videos:
        for index, clip in enumerate(frames, first):
            write_video(parts / f"{index:06d}.mp4", clip, fps)
    temporary = parts / f".{path.name}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            np.save(file, frames)
        temporary.replace(path)
    except FileNotFoundError:
        if not (folder / "clips.npy").is_file():  # else somebody was faster, and has tidied up
            raise


def _join(paths: list[Path], out: Path, n: int) -> None:
    """One file of many, clip by clip: all of them at size fit no memory."""
    shape = (n, *np.load(paths[0], mmap_mode="r").shape[1:])
    clips, at = np.lib.format.open_memmap(out, mode="w+", dtype=np.uint8, shape=shape), 0
    for path in paths:
        part = np.load(path)
        clips[at : at + len(part)] = part
        at += len(part)
    clips.flush()
