"""Writes a folder of clips: in resumable batches, shared between ranks, all or nothing.

A folder holds `clips.npy` (uint8, (N, T, 3, H, W)), `manifest.jsonl` (index, prompt, seed),
`row.json` (kind, fps) and, if the source has them, `facts.npz` and `videos/*.mp4`. Finished batches
are kept in `.parts-<name>` beside the folder, so a stopped process loses only one batch. Batches,
and so the bits of the clips, do not depend on the number of ranks or on interruptions.
"""

import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from distill_bench.networks.ranks import ranks
from distill_bench.sample.clip_files import write_video

PATIENCE_SECONDS = 60.0  # rank 0 waits this long for a new batch, then makes one itself


@dataclass(frozen=True)
class ClipSource:
    """Makes clips by index."""

    frames: Callable[[int, int], np.ndarray]  # (first, end) -> uint8 (end - first, T, 3, H, W)
    batch_size: int  # clips per batch; a clip's bits depend on it
    videos: bool = False  # also write mp4 files
    facts: Mapping[str, np.ndarray] = field(default_factory=dict)  # `Pipeline.facts`: facts.npz


def write_folder(
    folder: Path,
    source: ClipSource,
    prompts: list[str],
    seeds: list[int],
    row: Mapping,
) -> None:
    """Write a folder of clips; every rank of the launch must call it.

    Each rank makes its share of the batches. Rank 0 waits for the others, makes batches that do not
    arrive, and assembles the folder. A folder that another process finished meanwhile is kept.

    Args:
        row: contents of row.json, with `kind` and `fps`.
    """
    here = ranks()
    parts = Parts(folder, source, len(prompts), row["fps"])
    started = time.monotonic()
    for first in parts.firsts[here.rank :: here.world]:
        parts.make(first)
    if not here.first:
        return
    batch_seconds = (time.monotonic() - started) * here.world / len(parts.firsts)
    parts.complete(patience_seconds=max(PATIENCE_SECONDS, 3 * batch_seconds))
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    try:
        parts.assemble(temporary)
        lines = [
            {"index": index, "prompt": prompt, "seed": seed}
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        manifest = "".join(json.dumps(line) + "\n" for line in lines)
        (temporary / "manifest.jsonl").write_text(manifest, encoding="utf-8")
        if source.facts:
            np.savez(temporary / "facts.npz", **source.facts)
        (temporary / "row.json").write_text(json.dumps(row) + "\n", encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            if not is_written(folder):  # someone removed its clips; they are scored again
                shutil.rmtree(folder)
                temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(parts.folder, ignore_errors=True)


class Parts:
    """Finished batches of a folder's clips, one npy file per batch, in a temporary folder."""

    def __init__(self, target: Path, source: ClipSource, count: int, fps: float) -> None:
        self.target = target  # the final folder
        self.folder = target.with_name(f".parts-{target.name}")
        self.source = source
        self.count = count
        self.fps = fps
        self.firsts = list(range(0, count, source.batch_size))  # index of each batch's first clip

    def make(self, first: int) -> None:
        """Make the batch that starts at clip `first`, unless it or the whole folder exists."""
        path = self._path(first)
        if path.is_file() or is_written(self.target):
            return
        frames = self.source.frames(first, min(first + self.source.batch_size, self.count))
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.source.videos:
            for index, clip in enumerate(frames, first):
                write_video(self.folder / f"{index:06d}.mp4", clip, self.fps)
        temporary = self.folder / f".{path.name}.{secrets.token_hex(4)}"
        try:
            with temporary.open("wb") as file:
                np.save(file, frames)
            temporary.replace(path)
        except FileNotFoundError:
            if not is_written(self.target):  # otherwise another process removed the parts
                raise

    def complete(self, patience_seconds: float) -> None:
        """Wait until all batches exist; make one whenever none arrives for `patience_seconds`."""
        missing_before, since = 0, time.monotonic()
        while missing := [first for first in self.firsts if not self._path(first).is_file()]:
            if len(missing) != missing_before:
                missing_before, since = len(missing), time.monotonic()
            if time.monotonic() - since > patience_seconds:
                self.make(missing[-1])  # from the back, because other ranks work from the front
            else:
                time.sleep(0.2)

    def assemble(self, out: Path) -> None:
        """Write clips.npy batch by batch to bound memory, and move the videos."""
        first_batch = np.load(self._path(0), mmap_mode="r")
        shape = (self.count, *first_batch.shape[1:])
        clips = np.lib.format.open_memmap(out / "clips.npy", mode="w+", dtype=np.uint8, shape=shape)
        for first in self.firsts:
            batch = np.load(self._path(first))
            clips[first : first + len(batch)] = batch
        clips.flush()
        if videos := sorted(self.folder.glob("*.mp4")):
            (out / "videos").mkdir()
            for path in videos:
                path.rename(out / "videos" / path.name)

    def _path(self, first: int) -> Path:
        return self.folder / f"{first:06d}.npy"


def is_written(folder: Path) -> bool:
    """True if the folder has its clips; a folder appears only when it is complete."""
    return (folder / "clips.npy").is_file()
