"""Diversity: whether clips of one prompt differ as the teacher's do, cover what the teacher makes, and are no copies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from distill_bench.evaluate.extractors import load_extractor
from distill_bench.evaluator import FEW, Clips, Evaluator, Score, mean_score, same_frames, unpaired

NEIGHBOURS = 5
GRID = 8  # cells a side to which frames are averaged: where things are, not what noise is on them
COPY = 1.0  # of 255: clips nearer than this are copies for the eye
EXTRACTOR = "random-r2p1"  # takes clips of any size and was trained on nothing


@dataclass(frozen=True)
class Diversity(Evaluator):
    """Spread of the clips of one prompt over the teacher's (1 is right), recall and coverage of the teacher's clips, copies.

    A student that falls back on one clip a prompt keeps its prompt fidelity and loses this. Recall after Kynkäänniemi et al.
    (2019) and coverage after Naeem et al. (2020), 5 neighbours, on features of the random extractor.
    """

    paper: ClassVar[str] = "arXiv:2002.09797"
    version: ClassVar[int] = 1

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        mine = coarse(clips)
        result = [
            mean_score(
                "copies",
                copies(mine),
                "share of copies",
                better="lower",
                note=f"nearer than {COPY:g} of 255",
            )
        ]
        own = same_prompt_spread(mine, clips.prompts)
        if own is not None:
            sd = float(own.std() / len(own) ** 0.5)
            result.append(
                Score("diversity", float(own.mean()), "spread of a prompt's clips", "of 255", sd=sd)
            )
        if "teacher" in references:
            teacher = references["teacher"]
            same_frames(clips, teacher, "teacher")
            theirs = same_prompt_spread(coarse(teacher), teacher.prompts)
            if own is not None and theirs is not None:
                if not theirs.mean() > 0:
                    raise ValueError(
                        "the teacher reference has one clip a prompt, copied: there is no spread to compare to"
                    )
                value, sd = float(own.mean() / theirs.mean()), float(sd / theirs.mean())
                doubts = few_prompts(own) + unpaired(clips, teacher)
                result.append(
                    Score(
                        "diversity_ratio",
                        value,
                        "diversity / teacher's",
                        "",
                        "one",
                        True,
                        sd=sd,
                        warnings=doubts,
                    )
                )
            extractor = load_extractor(EXTRACTOR)
            label, k = (
                extractor.id_for(clips),
                min(NEIGHBOURS, len(clips.frames) - 1, len(teacher.frames) - 1),
            )
            recall, coverage = recall_and_coverage(extractor(clips), extractor(teacher), k)
            about = {
                "better": "higher",
                "extractor": label,
                "warnings": few_neighbours(len(clips.frames), len(teacher.frames)),
            }
            result += [
                Score("recall", float(recall.mean()), "teacher's clips within reach", **about),
                Score(
                    "coverage", float(coverage.mean()), "teacher's clips with a clip near", **about
                ),
            ]
        return result


def coarse(clips: Clips) -> Tensor:
    """Clips averaged to 8x8 cells a frame, (N, T, 3, 8, 8), 0..255."""
    return torch.stack(
        [adaptive_avg_pool2d(torch.from_numpy(f).float(), GRID) for f in clips.frames]
    )


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Root mean square difference of every x (N, ...) to every y (M, ...), (N, M)."""
    return torch.cdist(x.flatten(1).double(), y.flatten(1).double()) / x[0].numel() ** 0.5


def same_prompt_spread(x: Tensor, prompts: list[str]) -> np.ndarray | None:
    """Mean distance between the clips of each known prompt that has two or more, (prompts,); None where no prompt has."""
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if prompt:
            groups.setdefault(prompt, []).append(i)
    spreads = []
    for members in groups.values():
        if len(members) > 1:
            apart = distances(x[members], x[members])
            spreads.append(apart[~torch.eye(len(members), dtype=torch.bool)].mean().item())
    return np.array(spreads) if spreads else None


def few_prompts(spreads: np.ndarray) -> tuple[str, ...]:
    """A warning where few prompts have more than one clip."""
    return (f"only {len(spreads)} prompts have more than one clip",) if len(spreads) < 30 else ()


def few_neighbours(clips: int, teacher: int) -> tuple[str, ...]:
    """Warnings where recall and coverage say more of how many clips there are than of where they lie."""
    found = []
    if clips != teacher:
        found.append(
            f"{clips} clips against {teacher} of the teacher: fewer clips lie farther apart"
        )
    if min(clips, teacher) < FEW:
        found.append(f"{min(clips, teacher)} clips are few: neighbours want {FEW}")
    return tuple(found)


def copies(x: Tensor) -> np.ndarray:
    """1 of each clip that has an earlier clip nearer than `COPY`, else 0, (N,)."""
    near = distances(x, x) < COPY
    return near.tril(-1).any(1).double().numpy()


def recall_and_coverage(x: Tensor, y: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each y whether it lies within some x's k-th neighbour (recall), and whether some x lies within its own (coverage)."""
    between, radius_x, radius_y = torch.cdist(x.double(), y.double()), _radius(x, k), _radius(y, k)
    recall = (between <= radius_x[:, None]).any(0)
    coverage = (between <= radius_y[None]).any(0)
    return recall.double().numpy(), coverage.double().numpy()


def _radius(x: Tensor, k: int) -> Tensor:
    """Distance of each x to its k-th nearest other, (N,)."""
    x = x.double()
    return torch.cdist(x, x).kthvalue(k + 1, dim=1).values  # the nearest is itself
