"""Clips of the page: every row on the same prompts and sampling seeds."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill_bench.report.read_store import StoredRun
from distill_bench.report.results import Results
from distill_bench.report.rows import Row
from distill_bench.sample.reference_kinds import TEACHER
from distill_bench.store.files import read_json, read_jsonl

PROMPTS = 4
CLIP_PIXELS = 128  # longest side of a clip in the page


@dataclass(frozen=True)
class StoredClips:
    """Newest samples of a run or a reference."""

    frames: np.ndarray  # (N, T, 3, H, W) uint8, memory-mapped
    manifest: list[dict[str, Any]]  # prompt and sampling seed of each clip
    fps: float

    def same_prompts(self, other: "StoredClips") -> bool:
        """Return whether both sets have the same prompts and sampling seeds, in the same order."""
        return self.prompts() == other.prompts()

    def prompts(self) -> list[tuple[str, int | None]]:
        """Prompt and sampling seed of every clip."""
        return [(line["prompt"], line.get("seed")) for line in self.manifest]


@dataclass(frozen=True)
class Wall:
    """Clips to embed.

    Attributes:
        prompts: text and sampling seed of each prompt.
        tiles: label of each row with its clip per prompt, as data URIs.
        frames: frames per clip.
        seconds: duration of a clip.
    """

    prompts: list[tuple[str, int | None]]
    tiles: list[tuple[str, list[str]]]
    frames: int
    seconds: float


def wall(results: Results, stored: Mapping[str, StoredRun]) -> Wall | None:
    """Choose clips of every row for the same PROMPTS prompts, from its first finished run.

    The prompts are ordered from most to least motion in the teacher's clips. References sampled
    with other seeds are left out.

    Args:
        stored: run id -> run or reference in the store.

    Returns:
        The wall; None if no row has clips.
    """
    clips = {row.label: _first_clips(row, stored) for row in results.rows}
    students = [clips[row.label] for row in results.students if clips[row.label]]
    known = [*students, *filter(None, clips.values())]
    if not known:
        return None
    shared = known[0]
    rows = [row for row in results.rows if _has_prompts(clips[row.label], shared)]
    leading = next((row for row in rows if row.role == TEACHER), rows[0])
    chosen = _spread_by_motion(clips[leading.label])
    tiles = [(row.label, [_data_uri(clips[row.label].frames[i]) for i in chosen]) for row in rows]
    frames = shared.frames.shape[1]
    prompts = [(shared.manifest[i]["prompt"], shared.manifest[i].get("seed")) for i in chosen]
    return Wall(prompts, tiles, frames, frames / shared.fps)


def _has_prompts(clips: StoredClips | None, shared: StoredClips) -> bool:
    return clips is not None and clips.same_prompts(shared)


def _first_clips(row: Row, stored: Mapping[str, StoredRun]) -> StoredClips | None:
    """Clips of the first finished run of a row that still has its clips."""
    loaded = (_load_clips(stored[run_id].folder) for run_id in row.scored["run_id"])
    return next(filter(None, loaded), None)


def _load_clips(folder: Path) -> StoredClips | None:
    """Load the newest samples of a run or reference."""
    samples = [path for path in (folder / "samples").glob("*") if path.name.isdigit()]
    samples.sort(key=lambda path: int(path.name), reverse=True)
    for place in [*samples, folder]:
        if (place / "clips.npy").is_file() and (place / "manifest.jsonl").is_file():
            frames = np.load(place / "clips.npy", mmap_mode="r")
            manifest = list(read_jsonl(place / "manifest.jsonl"))
            return StoredClips(
                frames, manifest, (read_json(place / "row.json") or {}).get("fps", 8)
            )
    return None


def _spread_by_motion(clips: StoredClips) -> list[int]:
    """Indices of PROMPTS clips with different prompts, from most to least motion."""
    first: dict[str, int] = {}
    for i, line in enumerate(clips.manifest):
        first.setdefault(line["prompt"], i)
    ordered = sorted(first.values(), key=lambda i: -_motion(clips.frames[i]))
    count = min(PROMPTS, len(ordered))
    return [ordered[round(i)] for i in np.linspace(0, len(ordered) - 1, count)]


def _motion(clip: np.ndarray) -> float:
    """Mean absolute change of a clip's pixels (T, 3, H, W) from frame to frame."""
    return float(np.abs(np.diff(clip.astype(np.int16), axis=0)).mean()) if len(clip) > 1 else 0.0


def _data_uri(clip: np.ndarray) -> str:
    """Encode a clip (T, 3, H, W) uint8 as one WebP of its frames side by side; the page plays it.

    Clips of at most CLIP_PIXELS are stored lossless at full size.
    """
    frames: Sequence[Image.Image] = [
        Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))) for frame in clip
    ]
    lossless = max(frames[0].size) <= CLIP_PIXELS
    for frame in frames:
        frame.thumbnail((CLIP_PIXELS, CLIP_PIXELS))
    width, height = frames[0].size
    strip = Image.new("RGB", (width * len(frames), height))
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * width, 0))
    webp = io.BytesIO()
    strip.save(webp, "WEBP", lossless=lossless, quality=80 if lossless else 70, method=4)
    return "data:image/webp;base64," + base64.b64encode(webp.getvalue()).decode()
