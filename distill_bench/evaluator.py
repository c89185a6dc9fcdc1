"""The contract of an evaluator: what a file in `eval/` implements, and what it is given and gives."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

FEW = 256  # clips below which a distance of distributions is mostly bias


@dataclass(frozen=True)
class Clips:
    """Clips with the prompts and seeds that made them; a prompt is "" where nobody knows it."""

    frames: np.ndarray  # uint8 (N, T, 3, H, W), 0..255
    prompts: list[str]
    seeds: list[int]
    fps: float = 8.0
    facts: Mapping[str, np.ndarray] = field(
        default_factory=dict
    )  # what is known exactly of their distribution, facts.npz
    cache: Path | None = None  # folder for what networks make of these clips

    def __post_init__(self) -> None:
        f = self.frames
        if f.dtype != np.uint8:
            raise ValueError(
                f"clips must be uint8 in 0..255; found {f.dtype}: a range of floats cannot be told for sure"
            )
        if f.ndim != 5 or f.shape[2] != 3:
            raise ValueError(f"clips must be (N, T, 3, H, W); found {f.shape}")
        if not len(f) == len(self.prompts) == len(self.seeds):
            raise ValueError(
                f"{len(f)} clips with {len(self.prompts)} prompts and {len(self.seeds)} seeds"
            )
        if len(f) < 2:
            raise ValueError(f"{len(f)} clips are too few to score: at least 2 are needed")
        if f.shape[1] < 2:
            raise ValueError(
                f"clips of {f.shape[1]} frame are no video: at least 2 frames are needed"
            )
        if min(f.shape[3:]) < 4:
            raise ValueError(
                f"frames of {f.shape[3]}x{f.shape[4]} are no pictures: at least 4x4 are needed"
            )

    @cached_property
    def digests(self) -> tuple[int, ...]:
        """`clip_digest` of each clip."""
        return tuple(clip_digest(each) for each in self.frames)

    @cached_property
    def digest(self) -> str:
        """What these frames are, whatever their captions (16 digits)."""
        return hashlib.sha256(repr((self.frames.shape, self.digests)).encode()).hexdigest()[:16]

    @property
    def copies(self) -> int:
        """How many clips are byte for byte another one."""
        return len(self.digests) - len(set(self.digests))


def clip_digest(frames: np.ndarray) -> int:
    """63 bits of the sha256 of one clip's bytes."""
    return int.from_bytes(hashlib.sha256(np.ascontiguousarray(frames)).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class Score:
    """One number of a row of clips; `column` is where it stands in runs.csv."""

    column: str
    value: float
    title: str
    unit: str = ""
    better: Literal["lower", "higher", "one"] | None = None  # "one": the nearer to 1
    headline: bool = False  # stands in the table and the figures
    per_clip: tuple[float, ...] | None = None
    sd: float | None = None  # of sampling clips, where it is not that of a mean
    extractor: str | None = None  # network or method and digest of its weights
    note: str | None = None  # what a reader must know of the column
    warnings: tuple[str, ...] = ()  # what makes this one value doubtful


@dataclass(frozen=True)
class Evaluator(ABC):
    """A metric. Subclasses are final frozen dataclasses, one a file."""

    paper: ClassVar[str]
    version: ClassVar[int]  # raise it when the value changes for the same clips

    def reason_to_skip(self, clips: Clips) -> str | None:
        """Why these clips cannot be scored, or None."""
        return None

    @abstractmethod
    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        """The scores of the clips against the rows of `distill_bench.sample.references.references` that there are.

        `teacher` has the same prompts and seeds, `teacher_other` the same prompts and other seeds, `data` and `data_other` are
        rendered or filmed. A reference is read from disk when it is first asked for.
        """


def same_frames(clips: Clips, reference: Clips, key: str) -> None:
    """ValueError where clips and a reference differ in frames, size or rate."""
    if reference.frames.shape[1:] != clips.frames.shape[1:]:
        found, expected = (
            f"{t} frames of {h}x{w}"
            for t, _, h, w in (reference.frames.shape[1:], clips.frames.shape[1:])
        )
        raise ValueError(
            f"the {key} reference has {found}, the clips have {expected}: they must be alike"
        )
    if abs(reference.fps - clips.fps) > 0.1 * clips.fps:  # a gif rounds its times
        raise ValueError(
            f"the {key} reference plays at {reference.fps:g} frames a second, the clips at {clips.fps:g}: they must be alike "
            "(fps in manifest.jsonl says so where a file does not)"
        )


def in_order_of(reference: Clips, clips: Clips) -> list[int] | None:
    """Indices that bring clips into the reference's order by prompt and seed; None where the prompts are not known to be its own.

    Sets have no order, pairs have: clips that stand in the reference's already, as the harness's do, stay as they are.
    """
    if not all(clips.prompts) or sorted(clips.prompts) != sorted(reference.prompts):
        return None
    keys = [list(zip(each.prompts, each.seeds, strict=True)) for each in (reference, clips)]
    theirs, mine = (sorted(range(len(key)), key=key.__getitem__) for key in keys)
    return [i for _, i in sorted(zip(theirs, mine, strict=True))]


def unpaired(clips: Clips, reference: Clips) -> tuple[str, ...]:
    """A warning for ratios of means where the clips are not of the reference's prompts and seeds, in whatever order."""
    if not all(clips.prompts):
        return ("the clips have no captions: whether the ratio is paired is not known",)
    if sorted(clips.prompts) != sorted(reference.prompts):
        return ("the prompts are not the reference's: the ratio is not paired",)
    mine, theirs = (
        sorted(zip(each.prompts, each.seeds, strict=True)) for each in (clips, reference)
    )
    return ("the seeds are not the reference's",) if mine != theirs else ()


def mean_score(column: str, values: np.ndarray, title: str, **more) -> Score:
    """The mean of one value a clip as a Score."""
    values = np.asarray(values, np.float64)
    return Score(column, float(values.mean()), title, per_clip=tuple(values.tolist()), **more)
