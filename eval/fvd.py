"""Fréchet video distance of clips to the teacher's clips and to data, with kernel distances."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from distill_bench.evaluate.comparison import PUBLISHED, compare, frechet_scores
from distill_bench.evaluate.extractors import load_extractor
from distill_bench.evaluator import Citation, Clips, Evaluator, Score

EXTRACTOR = "DISTILL_BENCH_EXTRACTOR"  # environment variable: the first extractor
DEFAULT = "indomain-r2p1-cls"
SECOND = "random-r2p1"  # a second opinion on every set of clips


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
        extractor, second = load_extractor(self.extractor), load_extractor(SECOND)
        scores = frechet_scores(extractor, clips, references, self.resamples, "fvd", "kvd")
        if self.extractor == SECOND:
            return scores
        return scores + [
            pair.score("fvd_random", pair.distance, pair.label)
            for pair in compare(second, clips, references)
        ]
