"""Clips against the teacher's clips and data, in the features of one extractor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from distill_bench.evaluate.distances import (
    frechet_distance,
    frechet_infinity,
    frechet_sd,
    infinity_sd,
    kernel_distance,
    kernel_sd,
)
from distill_bench.evaluate.extractors import Extractor
from distill_bench.evaluator import FEW_CLIPS, Clips, Score, order_to_match, require_same_frames

PUBLISHED = "i3d-k400-logits-400"  # the only extractor whose distance is called FVD
NAMES = {PUBLISHED: "FVD", "videomae-v2-ssv2": "CD-FVD"}  # of Fréchet distances, by extractor
ROUNDING = 1e-9  # a floor below this share of the features' variance is rounding error
UNPAIRED = "the prompts are unknown or not the reference's: sd, kvd and fvd_infinity are unpaired"


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
        return NAMES.get(self.extractor.name, f"FD[{self.extractor.name}]")

    def scores(self, resamples: int, frechet: str, kernel: str) -> list[Score]:
        """Fréchet, kernel and extrapolated distance, each with its bootstrap spread.

        Args:
            frechet, kernel: columns of the first two.
        """
        x, y, paired = self.matched_x, self.y, self.order is not None
        doubts = () if paired else (UNPAIRED,)
        sd = frechet_sd(x, y, paired, resamples)
        headline = self.kind == "teacher"
        scores = [self.score(frechet, self.distance, self.label, sd, doubts, headline=headline)]
        sd = kernel_sd(x, y, paired, resamples)
        title = NAMES.get(self.extractor.name, "FVD").replace("FVD", "KVD")
        scores.append(self.score(kernel, kernel_distance(x, y, paired), title, sd, doubts))
        if min(len(x), len(y)) >= 4:
            limit = frechet_infinity(x, y, paired)
            sd = infinity_sd(x, y, paired, resamples)
            title = f"{self.label} of infinite clips"
            scores.append(self.score(f"{frechet}_infinity", limit, title, sd, doubts))
        return scores

    def over_floor(self, other: Clips, column: str) -> Score:
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
        return self.score(column, distance / floor, "over that of other seeds", better="one")

    def score(
        self,
        column: str,
        value: float,
        title: str,
        sd: float | None = None,
        doubts: tuple[str, ...] = (),
        better: Literal["lower", "one"] = "lower",
        headline: bool = False,
        note: str | None = None,
        wants_many: bool = True,
    ) -> Score:
        """Score of this comparison; `wants_many` warns if the clips are few for the features."""
        reference = "the teacher's clips" if self.kind == "teacher" else self.kind
        few = few_clips(self.extractor.dim, self.clips, self.reference) if wants_many else ()
        return Score(
            column if self.kind == "teacher" else f"{column}_{self.kind}",
            value,
            f"{title}, to {reference}",
            better=better,
            headline=headline,
            sd=sd,
            extractor=self.extractor.id_for(self.clips),
            note=note,
            warnings=few + set_warnings(self.clips, self.reference, self.kind) + doubts,
        )


def compare(
    extractor: Extractor, clips: Clips, references: Mapping[str, Clips]
) -> Iterator[Comparison]:
    """Clips against each of the references `teacher` and `data` that is there."""
    x = extractor(clips)
    kinds: tuple[Literal["teacher", "data"], ...] = ("teacher", "data")
    for kind in kinds:
        if kind in references:
            yield Comparison(extractor, clips, x, references[kind], kind)


def frechet_scores(
    extractor: Extractor,
    clips: Clips,
    references: Mapping[str, Clips],
    resamples: int,
    frechet: str,
    kernel: str,
) -> list[Score]:
    """Scores of `Comparison.scores`, and the distance over its floor, for each reference."""
    scores: list[Score] = []
    for pair in compare(extractor, clips, references):
        scores += pair.scores(resamples, frechet, kernel)
        if f"{pair.kind}_other" in references:
            other = references[f"{pair.kind}_other"]
            scores.append(pair.over_floor(other, f"{frechet}_over_floor"))
    return scores


def few_clips(features: int, clips: Clips, reference: Clips) -> tuple[str, ...]:
    """Warning if the clips are few for a distance of this number of features."""
    n, wanted = min(len(clips.frames), len(reference.frames)), max(FEW_CLIPS, 5 * features)
    if n < features:
        return (f"rank-deficient: {n} clips are fewer than the {features} features",)
    if n < wanted:
        return (f"{n} clips are few: a distance of {features} features wants {wanted}",)
    return ()


def set_warnings(clips: Clips, reference: Clips, kind: str) -> tuple[str, ...]:
    """Reasons in the sets themselves to doubt any distance between them."""
    warnings = []
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
