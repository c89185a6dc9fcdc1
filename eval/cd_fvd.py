"""Content-debiased FVD: Fréchet distances in the features of VideoMAE-v2."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from distill_bench.evaluate.comparison import frechet_scores
from distill_bench.evaluate.extractors import VIDEOMAE_V2, Extractor, load_extractor
from distill_bench.evaluator import Citation, Clips, Evaluator, Score

WEIGHTS = "DISTILL_BENCH_CD_FVD"  # environment variable: the default of `weights`


@dataclass(frozen=True)
class CDFVD(Evaluator):
    """The distances of `fvd` in the features of VideoMAE-v2, fine-tuned on Something-Something-v2.

    I3D's features judge single frames and hardly see whether a motion is right; these see it.
    Values compare only for equal numbers of clips and frames; published ones are of 16 frames.
    """

    paper: ClassVar[Citation] = Citation(
        "2404.12391",
        "On the Content Bias in Fréchet Video Distance",
        "Songwei Ge, Aniruddha Mahapatra, Gaurav Parmar, Jun-Yan Zhu, Jia-Bin Huang",
        2024,
    )
    version: ClassVar[int] = 1
    only_if_named: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (
        "cd_fvd",
        "cd_kvd",
        "cd_fvd_infinity",
        "cd_fvd_over_floor",
        "cd_fvd_data",
        "cd_kvd_data",
        "cd_fvd_infinity_data",
        "cd_fvd_over_floor_data",
    )

    # /path/vit_g_hybrid_pt_1200e_ssv2_ft.pth
    weights: str = field(default_factory=lambda: os.environ.get(WEIGHTS, ""))
    resamples: Annotated[int, Field(ge=2)] = 100  # of the bootstrap

    def reason_to_skip(self, clips: Clips) -> str | None:
        if not self.weights:
            return f"set cd_fvd.weights or {WEIGHTS} to {VIDEOMAE_V2}"
        return self._extractor().reason_to_refuse(clips)

    def extractors(self, clips: Clips) -> frozenset[str]:
        return frozenset({self._extractor().id_for(clips)})

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        extractor = self._extractor()
        return frechet_scores(extractor, clips, references, self.resamples, "cd_fvd", "cd_kvd")

    def _extractor(self) -> Extractor:
        return load_extractor(f"videomae-v2-ssv2:{self.weights}")
