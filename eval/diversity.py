"""Diversity of the clips of one prompt, coverage of the teacher's clips, and copies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from distill_bench.evaluate.distributions import few_prompts, same_prompt
from distill_bench.evaluate.extractors import load_extractor
from distill_bench.evaluator import (
    FEW_CLIPS,
    Citation,
    Clips,
    Evaluator,
    Score,
    mean_score,
    pairing_warnings,
    require_same_frames,
)

NEIGHBOURS = 5
GRID = 8  # frames are averaged to 8x8 cells, which keeps positions and drops noise
COPY = 1.0  # of 255: clips closer than this look identical
EXTRACTOR = "random-r2p1"  # takes clips of any size and is untrained


@dataclass(frozen=True)
class Diversity(Evaluator):
    """Spread of a prompt's clips as a ratio to the teacher's (1 is best), recall, coverage, copies.

    A student that makes one clip per prompt keeps its prompt fidelity and loses its spread. Recall
    (Kynkäänniemi et al., 2019) and coverage (Naeem et al., 2020) use 5 neighbours in the features
    of the random extractor.
    """

    paper: ClassVar[Citation] = Citation(
        "2002.09797",
        "Reliable Fidelity and Diversity Metrics for Generative Models",
        "Muhammad Ferjad Naeem, Seong Joon Oh, Youngjung Uh, Yunjey Choi, Jaejun Yoo",
        2020,
    )
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = (
        "copies",
        "diversity",
        "diversity_ratio",
        "recall",
        "coverage",
    )

    def extractors(self, clips: Clips) -> frozenset[str]:
        return frozenset({load_extractor(EXTRACTOR).id_for(clips)})

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        cells = coarse(clips)
        note = f"nearer than {COPY:g} of 255"
        scores = [mean_score("copies", copies(cells), "share of copies", better="lower", note=note)]
        spread = same_prompt_spread(cells, clips.prompts)
        if spread is not None:
            title = "spread of a prompt's clips"
            sd = float(spread.std() / len(spread) ** 0.5)
            scores.append(Score("diversity", float(spread.mean()), title, "of 255", sd=sd))
        if "teacher" in references:
            teacher = references["teacher"]
            require_same_frames(clips, teacher, "teacher")
            if spread is not None:
                scores += spread_ratio(clips, spread, teacher)
            scores += neighbour_scores(clips, teacher)
        return scores


def spread_ratio(clips: Clips, spread: np.ndarray, teacher: Clips) -> list[Score]:
    """Ratio of the spread to the teacher's; empty if no prompt of the teacher has two clips."""
    teacher_spread = same_prompt_spread(coarse(teacher), teacher.prompts)
    if teacher_spread is None:
        return []
    if not teacher_spread.mean() > 0:
        raise ValueError(
            "each prompt of the teacher reference has one clip, copied: there is no spread"
        )
    warnings = few_prompts(len(spread)) + pairing_warnings(clips, teacher)
    sd = float(spread.std() / len(spread) ** 0.5)
    return [
        Score(
            "diversity_ratio",
            float(spread.mean() / teacher_spread.mean()),
            "diversity / teacher's",
            better="one",
            headline=True,
            sd=float(sd / teacher_spread.mean()),
            warnings=warnings,
        )
    ]


def neighbour_scores(clips: Clips, teacher: Clips) -> list[Score]:
    """Recall and coverage of the teacher's clips."""
    extractor = load_extractor(EXTRACTOR)
    n, m = len(clips.frames), len(teacher.frames)
    k = min(NEIGHBOURS, n - 1, m - 1)
    recall, coverage = recall_and_coverage(extractor(clips), extractor(teacher), k)
    warnings: tuple[str, ...] = ()
    if n != m:
        warnings += (f"{n} clips against {m} of the teacher: fewer clips lie farther apart",)
    if min(n, m) < FEW_CLIPS:
        warnings += (f"{min(n, m)} clips are few: neighbours want {FEW_CLIPS}",)
    fields = {"better": "higher", "extractor": extractor.id_for(clips), "warnings": warnings}
    return [
        Score("recall", float(recall.mean()), "teacher's clips within reach", **fields),
        Score("coverage", float(coverage.mean()), "teacher's clips with a clip near", **fields),
    ]


def coarse(clips: Clips) -> Tensor:
    """Clips averaged to 8x8 cells per frame, (N, T, 3, 8, 8), 0..255."""
    return torch.stack(
        [adaptive_avg_pool2d(torch.from_numpy(clip).float(), GRID) for clip in clips.frames]
    )


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Root mean square difference of every x (N, ...) to every y (M, ...), (N, M)."""
    return torch.cdist(x.flatten(1).double(), y.flatten(1).double()) / x[0].numel() ** 0.5


def same_prompt_spread(x: Tensor, prompts: list[str]) -> np.ndarray | None:
    """Mean pairwise distance of the clips of each prompt with several clips, (prompts,).

    None if no prompt has several clips. Clips without a prompt ("") are left out.
    """
    spreads = []
    for members in same_prompt(prompts):
        apart = distances(x[members], x[members])
        spreads.append(apart[~torch.eye(len(members), dtype=torch.bool)].mean().item())
    return np.array(spreads) if spreads else None


def copies(x: Tensor) -> np.ndarray:
    """1 for each clip closer than `COPY` to an earlier clip, else 0, (N,)."""
    near = distances(x, x) < COPY
    return near.tril(-1).any(1).double().numpy()


def recall_and_coverage(x: Tensor, y: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Recall and coverage of each y as 1 or 0, (M,) each.

    Recall is 1 if y is no farther from some x than the k-th neighbour of that x. Coverage is 1 if
    some x is no farther from y than the k-th neighbour of y.
    """
    between = torch.cdist(x.double(), y.double())
    recall = (between <= _radius(x, k)[:, None]).any(0)
    coverage = (between <= _radius(y, k)[None]).any(0)
    return recall.double().numpy(), coverage.double().numpy()


def _radius(x: Tensor, k: int) -> Tensor:
    """Distance of each x to its k-th nearest neighbour, (N,)."""
    x = x.double()
    return torch.cdist(x, x).kthvalue(k + 1, dim=1).values  # the nearest is x itself
