"""JEDi: kernel distance in the features of V-JEPA, for few clips."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from distill_bench.evaluate.comparison import Comparison, compare
from distill_bench.evaluate.distances import (
    biased_kernel_distance,
    kernel_distance,
    kernel_sd,
    quadratic_kernel,
)
from distill_bench.evaluate.extractors import VJEPA_SSV2, Extractor, load_extractor
from distill_bench.evaluator import Citation, Clips, Evaluator, Score

WEIGHTS = "DISTILL_BENCH_VJEPA"  # environment variable: the default of `weights`
SCALE = 100.0  # videojedi@1.1.0, JEDi.py
UNPAIRED = "the prompts are unknown or not the reference's: jedi and sd are unpaired"
BIASED = "as the package videojedi has it: falls with the number of clips"


@dataclass(frozen=True)
class JEDi(Evaluator):
    """100 times the squared MMD with the kernel (x.y / d)^2 in the features of V-JEPA's SSv2 probe.

    `jedi` is the unbiased estimate: equal distributions give 0 on average at any number of clips,
    single values may be negative. `jedi_biased` is the estimate of the package videojedi, to
    compare with published values of equal numbers of clips.
    """

    paper: ClassVar[Citation] = Citation(
        "2410.05203",
        "Beyond FVD: Enhanced Evaluation Metrics for Video Generation Quality",
        "Ge Ya Luo, Gian Mario Favero, Zhi Hao Luo, Alexia Jolicoeur-Martineau, Christopher Pal",
        2024,
    )
    version: ClassVar[int] = 1
    only_if_named: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("jedi", "jedi_biased", "jedi_data", "jedi_biased_data")

    # folder of vith16.pth.tar and ssv2-probe.pth.tar
    weights: str = field(default_factory=lambda: os.environ.get(WEIGHTS, ""))
    resamples: Annotated[int, Field(ge=2)] = 100  # of the bootstrap

    def reason_to_skip(self, clips: Clips) -> str | None:
        if not self.weights:
            return f"set jedi.weights or {WEIGHTS} to {VJEPA_SSV2}"
        return self._extractor().reason_to_refuse(clips)

    def extractors(self, clips: Clips) -> frozenset[str]:
        return frozenset({self._extractor().id_for(clips)})

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        pairs = compare(self._extractor(), clips, references)
        return [score for pair in pairs for score in distances(pair, self.resamples)]

    def _extractor(self) -> Extractor:
        return load_extractor(f"vjepa-ssv2:{self.weights}")


def distances(pair: Comparison, resamples: int) -> list[Score]:
    """Unbiased distance with its bootstrap spread, and the biased one."""
    x, y, paired = pair.matched_x, pair.y, pair.order is not None
    unbiased = kernel_distance(x, y, paired, quadratic_kernel)
    biased = biased_kernel_distance(x, y, quadratic_kernel)
    return [
        pair.score(
            "jedi",
            SCALE * unbiased,
            "JEDi",
            SCALE * kernel_sd(x, y, paired, resamples, quadratic_kernel),
            () if paired else (UNPAIRED,),
            headline=pair.kind == "teacher",
            wants_many=False,
        ),
        pair.score("jedi_biased", SCALE * biased, "JEDi, biased", note=BIASED, wants_many=False),
    ]
