"""The contract of an evaluator: what a file in `eval/` implements, and what it is given and gives."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np


@dataclass(frozen=True)
class Clips:
    """Clips with the prompts and seeds that made them."""

    frames: np.ndarray  # uint8 (N, T, 3, H, W)
    prompts: list[str]
    seeds: list[int]
    fps: float = 8.0
    facts: Mapping[str, np.ndarray] = field(default_factory=dict)  # what is known exactly of their distribution, facts.npz

    def __post_init__(self) -> None:
        f = self.frames
        if f.dtype != np.uint8 or f.ndim != 5 or f.shape[2] != 3:
            raise ValueError(f"clips must be uint8 (N, T, 3, H, W); found {f.dtype} {f.shape}")
        if not len(f) == len(self.prompts) == len(self.seeds):
            raise ValueError(f"{len(f)} clips with {len(self.prompts)} prompts and {len(self.seeds)} seeds")
        if len(f) < 2:
            raise ValueError(f"{len(f)} clips are too few to score: at least 2 are needed")
        if f.shape[1] < 2:
            raise ValueError(f"clips of {f.shape[1]} frame are no video: at least 2 frames are needed")


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
    extractor: str | None = None  # network and digest of its weights


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
        """The scores of the clips; references are `teacher` (same prompts and seeds) and, where there is one, `data`."""
