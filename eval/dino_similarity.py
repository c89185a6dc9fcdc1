"""Similarity of the clips of one prompt in the features of DINOv3."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from distill_bench.evaluate.distributions import few_prompts, same_prompt
from distill_bench.evaluate.extractors import DINOV3, Extractor, load_extractor
from distill_bench.evaluator import Citation, Clips, Evaluator, Score

WEIGHTS = "DISTILL_BENCH_DINOV3"  # environment variable: the default of `weights`


@dataclass(frozen=True)
class DINOSimilarity(Evaluator):
    """Mean cosine of the clips of one prompt with each other, over prompts; 1: all are alike.

    Lower is more diverse, as for Phased DMD. Noise and broken clips lower it too, so compare with
    the teacher's row. The embedding of a clip is the mean over frames of DINOv3's class token,
    each of length 1.
    """

    paper: ClassVar[Citation] = Citation(
        "2510.27684",
        "Phased DMD: Few-step Distribution Matching Distillation via Score Matching within "
        "Subintervals",
        "Xiangyu Fan, Zesong Qiu, Zhuguanyu Wu, Fanzhou Wang, Zhiqian Lin, Tianxiang Ren, "
        "Dahua Lin, Ruihao Gong, Lei Yang",
        2025,
    )
    version: ClassVar[int] = 1
    only_if_named: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("dino_similarity",)

    # a transformers folder of DINOv3
    weights: str = field(default_factory=lambda: os.environ.get(WEIGHTS, ""))

    def reason_to_skip(self, clips: Clips) -> str | None:
        if not self.weights:
            return f"set dino_similarity.weights or {WEIGHTS} to {DINOV3}"
        if not same_prompt(clips.prompts):
            return "no prompt has two clips to compare; see protocol.clips_per_prompt"
        return self._extractor().reason_to_refuse(clips)

    def extractors(self, clips: Clips) -> frozenset[str]:
        return frozenset({self._extractor().id_for(clips)})

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        extractor = self._extractor()
        similarities = same_prompt_similarity(extractor(clips), clips.prompts)
        return [
            Score(
                "dino_similarity",
                float(similarities.mean()),
                "cosine of a prompt's clips, DINOv3",
                better="lower",
                headline=True,
                sd=float(similarities.std() / len(similarities) ** 0.5),
                extractor=extractor.id_for(clips),
                note="noise lowers it too",
                warnings=few_prompts(len(similarities)),
            )
        ]

    def _extractor(self) -> Extractor:
        return load_extractor(f"dinov3:{self.weights}")


def same_prompt_similarity(features: Tensor, prompts: list[str]) -> np.ndarray:
    """Mean pairwise cosine of the features (N, d) of each prompt with several clips, (prompts,)."""
    unit = normalize(features.double(), dim=1)
    means = []
    for members in same_prompt(prompts):
        cosines = unit[members] @ unit[members].T
        off_diagonal = cosines.sum() - cosines.trace()
        means.append((off_diagonal / (len(members) * (len(members) - 1))).item())
    return np.array(means)
