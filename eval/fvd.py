"""Fréchet video distance of clips to the teacher's clips and to data, with kernel distances."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from distill_bench.evaluate.distances import (
    frechet_distance,
    frechet_infinity,
    frechet_sd,
    infinity_sd,
    kernel_distance,
    kernel_sd,
)
from distill_bench.evaluate.extractors import Extractor, load_extractor
from distill_bench.evaluator import (
    FEW_CLIPS,
    Citation,
    Clips,
    Evaluator,
    Score,
    order_to_match,
    require_same_frames,
)

EXTRACTOR = "DISTILL_BENCH_EXTRACTOR"  # environment variable: the first extractor
DEFAULT = "indomain-r2p1-cls"
SECOND = "random-r2p1"  # a second opinion on every set of clips
PUBLISHED = "i3d-k400-logits-400"  # the only extractor whose distance is called FVD
ROUNDING = 1e-9  # a floor below this share of the features' variance is rounding error
UNPAIRED = "the prompts are unknown or not the reference's: sd, kvd and fvd_infinity are unpaired"


@dataclass(frozen=True)
class FVD(Evaluator):
    """Fréchet and kernel distances to the teacher's clips of the same prompts, and to data.

    Values compare only for one extractor and equal numbers of clips and frames. The distance of an
    extractor other than I3D is called FD[name] and has its own units. KVD is unbiased;
    `fvd_infinity` removes the bias of few clips at the price of a larger spread.
    """

    paper: ClassVar[Citation] = Citation(
        "1812.01717",
        "Towards Accurate Generative Models of Video: A New Metric & Challenges",
        "Thomas Unterthiner, Sjoerd van Steenkiste, Karol Kurach, Raphaël Marinier, Marcin "
        "Michalski, Sylvain Gelly",
        2018,
    )
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = (
        "fvd",
        "kvd",
        "fvd_infinity",
        "fvd_over_floor",
        "fvd_data",
        "kvd_data",
        "fvd_infinity_data",
        "fvd_over_floor_data",
        "fvd_random",
        "fvd_random_data",
    )

    # name[:path]; see distill_bench.evaluate.extractors
    extractor: str = field(default_factory=lambda: os.environ.get(EXTRACTOR, DEFAULT))
    resamples: Annotated[int, Field(ge=2)] = 100  # of the bootstrap

    def reason_to_skip(self, clips: Clips) -> str | None:
        reason = load_extractor(self.extractor).reason_to_refuse(clips)
        if reason is None:
            return None
        return (
            f"{reason}; set {EXTRACTOR}, e.g. to {PUBLISHED}:/path/i3d_torchscript.pt or {SECOND}"
        )

    def extractors(self, clips: Clips) -> frozenset[str]:
        return frozenset(load_extractor(name).id_for(clips) for name in (self.extractor, SECOND))

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        scores: list[Score] = []
        for name in dict.fromkeys((self.extractor, SECOND)):
            extractor = load_extractor(name)
            x = extractor(clips)
            for kind in ("teacher", "data"):
                if kind not in references:
                    continue
                pair = Comparison(extractor, clips, x, references[kind], kind)
                if name != self.extractor:
                    scores.append(pair.score("fvd_random", pair.distance, pair.label))
                    continue
                scores += pair.scores(self.resamples)
                if f"{kind}_other" in references:
                    scores.append(pair.over_floor(references[f"{kind}_other"]))
        return scores


@dataclass(frozen=True)
class Comparison:
    """Clips against one reference, in the features of one extractor."""

    extractor: Extractor
    clips: Clips
    x: Tensor  # features of the clips (N, d)
    reference: Clips
    kind: Literal["teacher", "data"]  # of the reference

    @cached_property
    def y(self) -> Tensor:
        """Features of the reference, (M, d)."""
        return reference_features(self.extractor, self.reference, self.clips, self.kind)

    @cached_property
    def order(self) -> list[int] | None:
        """Order of the clips that pairs them with the reference; None if they cannot be paired."""
        return order_to_match(self.reference, self.clips)

    @property
    def matched_x(self) -> Tensor:
        """Features of the clips in the order of the reference, if they can be paired."""
        return self.x if self.order is None else self.x[self.order]

    @property
    def distance(self) -> float:
        """Fréchet distance of the clips to the reference."""
        return frechet_distance(self.matched_x, self.y)

    @property
    def label(self) -> str:
        return "FVD" if self.extractor.name == PUBLISHED else f"FD[{self.extractor.name}]"

    def scores(self, resamples: int) -> list[Score]:
        """Fréchet, kernel and extrapolated distance, each with its bootstrap spread."""
        x, y, paired = self.matched_x, self.y, self.order is not None
        doubts = () if paired else (UNPAIRED,)
        sd = frechet_sd(x, y, paired, resamples)
        headline = self.kind == "teacher"
        scores = [self.score("fvd", self.distance, self.label, sd, doubts, headline=headline)]
        sd = kernel_sd(x, y, paired, resamples)
        scores.append(self.score("kvd", kernel_distance(x, y, paired), "KVD", sd, doubts))
        if min(len(x), len(y)) >= 4:
            limit = frechet_infinity(x, y, paired)
            sd = infinity_sd(x, y, paired, resamples)
            title = f"{self.label} of infinite clips"
            scores.append(self.score("fvd_infinity", limit, title, sd, doubts))
        return scores

    def over_floor(self, other: Clips) -> Score:
        """Distance divided by the floor, the distance of the reference's other seeds to it.

        Raises:
            ValueError: if the other seeds share a clip with the reference, or the floor is only
                rounding error.
        """
        if set(self.reference.digests) & set(other.digests):
            raise ValueError(
                f"{self.kind}_other holds the same clips as {self.kind}: give clips of other seeds"
            )
        y_other = reference_features(self.extractor, other, self.clips, f"{self.kind}_other")
        distance, floor = frechet_distance(self.x, self.y), frechet_distance(y_other, self.y)
        if not floor > ROUNDING * self.y.double().var(0).sum().item():
            raise ValueError(
                f"the distance of {self.kind}_other to {self.kind} is {floor:.3g}; it must "
                f"be above rounding error, {ROUNDING:g} of the variance of the features"
            )
        return self.score(
            "fvd_over_floor", distance / floor, "over that of other seeds", better="one"
        )

    def score(
        self,
        column: str,
        value: float,
        title: str,
        sd: float | None = None,
        doubts: tuple[str, ...] = (),
        better: Literal["lower", "one"] = "lower",
        headline: bool = False,
    ) -> Score:
        reference = "the teacher's clips" if self.kind == "teacher" else self.kind
        return Score(
            column if self.kind == "teacher" else f"{column}_{self.kind}",
            value,
            f"{title}, to {reference}",
            better=better,
            headline=headline,
            sd=sd,
            extractor=self.extractor.id_for(self.clips),
            warnings=distance_warnings(self.extractor, self.clips, self.reference, self.kind)
            + doubts,
        )


def distance_warnings(
    extractor: Extractor, clips: Clips, reference: Clips, kind: str
) -> tuple[str, ...]:
    """Reasons to doubt a distance between these sets."""
    n, d = min(len(clips.frames), len(reference.frames)), extractor.dim
    wanted = max(FEW_CLIPS, 5 * d)
    warnings = []
    if n < d:
        warnings.append(f"rank-deficient: {n} clips are fewer than the {d} features")
    elif n < wanted:
        warnings.append(f"{n} clips are few: a distance of {d} features wants {wanted}")
    if len(clips.frames) != len(reference.frames):
        warnings.append(
            f"{len(clips.frames)} clips against {len(reference.frames)} of the {kind}: "
            "the bias differs from other rows'"
        )
    if clips.copies:
        warnings.append(
            f"{clips.copies} of {len(clips.frames)} clips are copies: they raise the distance"
        )
    if clips.digest == reference.digest:
        warnings.append("these are the reference's own clips: 0 by construction")
    return tuple(warnings)


def reference_features(extractor: Extractor, reference: Clips, clips: Clips, kind: str) -> Tensor:
    """Features (M, d) of a reference.

    Raises:
        ValueError: if size or rate differ from the clips to score, or the reference has copies.
    """
    require_same_frames(clips, reference, kind)
    if reference.copies:
        raise ValueError(
            f"{reference.copies} of the {len(reference.frames)} clips of the {kind} reference are "
            "copies of others; give distinct clips"
        )
    return extractor(reference)
