"""The contract of an evaluator: base class of the metrics in `eval/`, clips and scores."""

import hashlib
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

FEW_CLIPS = 256  # with fewer clips, a distance between distributions is mostly bias


@dataclass(frozen=True)
class Clips:
    """Clips of one size and frame rate, with the prompt and seed of each. An unknown prompt is "".

    Raises:
        ValueError: if the frames are not uint8 (N, T, 3, H, W) with N, T >= 2 and H, W >= 4, or if
            the number of prompts or seeds is not N.
    """

    frames: np.ndarray  # uint8 (N, T, 3, H, W), 0..255
    prompts: list[str]
    seeds: list[int]
    fps: float = 8.0
    facts: Mapping[str, np.ndarray] = field(default_factory=dict)  # facts.npz: exact knowledge
    cache: Path | None = None  # folder for the features of these clips

    def __post_init__(self) -> None:
        shape = self.frames.shape
        if self.frames.dtype != np.uint8:
            raise ValueError(
                f"clips are {self.frames.dtype}; they must be uint8 in 0..255, "
                "because the range of floats is ambiguous"
            )
        if len(shape) != 5 or shape[2] != 3:
            raise ValueError(f"clips must be (N, T, 3, H, W); found {shape}")
        if not shape[0] == len(self.prompts) == len(self.seeds):
            raise ValueError(
                f"{shape[0]} clips with {len(self.prompts)} prompts and {len(self.seeds)} seeds; "
                "each clip needs one prompt and one seed"
            )
        if shape[0] < 2:
            raise ValueError(f"too few clips to score: {shape[0]}; at least 2 are needed")
        if shape[1] < 2:
            raise ValueError(f"clips have {shape[1]} frame; at least 2 are needed")
        if min(shape[3:]) < 4:
            raise ValueError(f"frames are {shape[3]}x{shape[4]}; at least 4x4 pixels are needed")

    @cached_property
    def digests(self) -> tuple[int, ...]:
        """`clip_digest` of each clip."""
        return tuple(clip_digest(clip) for clip in self.frames)

    @cached_property
    def digest(self) -> str:
        """16 hex digits that identify the frames, independent of prompts and seeds."""
        return hashlib.sha256(repr((self.frames.shape, self.digests)).encode()).hexdigest()[:16]

    @property
    def copies(self) -> int:
        """Number of clips that repeat an earlier clip byte for byte."""
        return len(self.digests) - len(set(self.digests))


def clip_digest(frames: np.ndarray) -> int:
    """63 bits of the sha256 of one clip's bytes."""
    return (
        int.from_bytes(hashlib.sha256(np.ascontiguousarray(frames).data).digest()[:8], "little")
        >> 1
    )


@dataclass(frozen=True)
class Score:
    """One number for a set of clips. `column` is its name in metrics.jsonl and runs.csv."""

    column: str
    value: float
    title: str
    unit: str = ""
    better: Literal["lower", "higher", "one"] | None = None  # "one": closer to 1
    headline: bool = False  # shown in tables and figures
    per_clip: tuple[float, ...] | None = None  # (N,), if the value is a mean over clips
    sd: float | None = None  # standard error over clips, if the value is not a mean
    extractor: str | None = None  # network or method, with the digest of its weights
    note: str | None = None  # a caveat on the column
    warnings: tuple[str, ...] = ()  # reasons to doubt this value


@dataclass(frozen=True)
class Citation:
    """A paper on arXiv, for `paper` of a method or an evaluator. As text it is `arXiv:NUMBER`."""

    arxiv: str  # number without version, e.g. 2405.14867
    title: str
    authors: str  # "Given Family, Given Family"
    year: int  # of the first version

    def __str__(self) -> str:
        return f"arXiv:{self.arxiv}"

    @property
    def key(self) -> str:
        """Key of the entry: family name of the first author, year, first word of the title."""
        family = self.authors.split(",")[0].split()[-1]
        word = re.match(r"[\w-]+", self.title)
        return f"{_ascii(family)}{self.year}{_ascii(word[0] if word else '')}"

    def bibtex(self) -> str:
        """The entry as text. Braces keep the capitals of the title."""
        fields = {
            "title": "{" + re.sub(r"([&%#_$])", r"\\\1", self.title) + "}",
            "author": self.authors.replace(", ", " and "),
            "year": str(self.year),
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
            "url": f"https://arxiv.org/abs/{self.arxiv}",
        }
        lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
        return f"@misc{{{self.key},\n{lines}}}"


def _ascii(word: str) -> str:
    """Lower-case ASCII letters and digits of a word: Székely-Rizzo -> szekelyrizzo."""
    plain = unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", plain.lower())


@dataclass(frozen=True)
class Evaluator(ABC):
    """A metric. Subclasses are final frozen dataclasses, one per file; their fields are settings.

    Must define: `paper`, `version` and `scores`. May define: fields with defaults, which a user
    sets by `--set NAME.FIELD=VALUE`, `reason_to_skip`, and the class variables below. For example:

        @dataclass(frozen=True)
        class Brightness(Evaluator):
            paper: ClassVar[str] = "none"
            version: ClassVar[int] = 1

            def scores(self, clips, references):
                brightness = clips.frames.mean((1, 2, 3, 4))  # one value per clip
                return [mean_score("brightness", brightness, "brightness")]

    Save it as eval/brightness.py, or pass `--evaluators path/to/file.py:Brightness`.
    """

    paper: ClassVar[Citation | str]  # or another source, or "none: ..."
    version: ClassVar[int]  # increase it if the same clips get other values
    # Columns that it may return, by which a sweep checks the scores of its contrasts before its
    # first run; None: not stated.
    columns: ClassVar[tuple[str, ...] | None] = None
    only_if_named: ClassVar[bool] = False  # scores only where a protocol or a command names it
    needs_facts: ClassVar[tuple[str, ...]] = ()  # entries of `Clips.facts`; no score without them

    def reason_to_skip(self, clips: Clips) -> str | None:
        """Reason why these clips cannot be scored, or None; asked before any score is computed.

        A sweep also asks before its first run, with black clips of the right size and prompts.

        Raises:
            ValueError: if weights that the settings name cannot be loaded.
        """
        return None

    def extractors(self, clips: Clips) -> frozenset[str] | None:
        """Values of `Score.extractor` among the scores of such clips; None: not stated.

        Before its first run a sweep compares them with those of stored scores, because no table
        holds scores of two extractors.
        """
        return None

    @abstractmethod
    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        """Score the clips. Return no score if a needed reference is absent.

        Args:
            references: reference clips by kind; any may be absent. `teacher` has the prompts and
                seeds of the clips, `teacher_other` their prompts and other seeds, `data` and
                `data_other` are real clips. A reference is read from disk on first access.

        Raises:
            ValueError: if the clips or a reference cannot be scored; users see the message.
        """


def require_same_frames(clips: Clips, reference: Clips, kind: str) -> None:
    """Raise ValueError if clips and the reference `kind` differ in frame count, size or rate."""
    if reference.frames.shape[1:] != clips.frames.shape[1:]:
        sizes = [
            f"{frames} frames of {height}x{width}"
            for frames, _, height, width in (reference.frames.shape[1:], clips.frames.shape[1:])
        ]
        raise ValueError(
            f"the {kind} reference has {sizes[0]}, the clips have {sizes[1]}; they must agree"
        )
    if abs(reference.fps - clips.fps) > 0.1 * clips.fps:  # gif files round their frame times
        raise ValueError(
            f"the {kind} reference plays at {reference.fps:g} frames per second, the clips at "
            f"{clips.fps:g}; they must agree (if a file states a wrong rate, give fps in "
            "manifest.jsonl)"
        )


def reason_without_captions(clips: Clips) -> str | None:
    """Reason why captions cannot be scored: some clips have none. None if all have one."""
    without = sum(not prompt.strip() for prompt in clips.prompts)
    if not without:
        return None
    return (
        f"{without} of {len(clips.prompts)} clips have no caption; "
        "give each a prompt in manifest.jsonl"
    )


def order_to_match(reference: Clips, clips: Clips) -> list[int] | None:
    """Indices that reorder `clips` to match `reference` by (prompt, seed).

    None if the prompts are unknown or differ. Clips are paired by their rank in sorted order, so
    clips in the order of the reference stay in place even if the seeds differ.
    """
    if not all(clips.prompts) or sorted(clips.prompts) != sorted(reference.prompts):
        return None
    sorted_reference, sorted_clips = (
        sorted(range(len(keys)), key=keys.__getitem__)
        for keys in (_prompts_and_seeds(reference), _prompts_and_seeds(clips))
    )
    return [index for _, index in sorted(zip(sorted_reference, sorted_clips, strict=True))]


def pairing_warnings(clips: Clips, reference: Clips) -> tuple[str, ...]:
    """Warnings for a ratio of means between sets that differ in prompts or seeds, in any order."""
    if not all(clips.prompts):
        return ("the clips have no captions: it is unknown whether the ratio is paired",)
    if sorted(clips.prompts) != sorted(reference.prompts):
        return ("the prompts are not the reference's: the ratio is not paired",)
    if sorted(_prompts_and_seeds(clips)) != sorted(_prompts_and_seeds(reference)):
        return ("the seeds are not the reference's",)
    return ()


def _prompts_and_seeds(clips: Clips) -> list[tuple[str, int]]:
    return list(zip(clips.prompts, clips.seeds, strict=True))


def mean_score(column: str, values: np.ndarray, title: str, **fields: Any) -> Score:
    """Score of the mean of `values`, one per clip (N,); `fields` are further fields of `Score`."""
    values = np.asarray(values, np.float64)
    return Score(column, float(values.mean()), title, per_clip=tuple(values.tolist()), **fields)
