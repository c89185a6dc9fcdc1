"""Fidelity of the picture: saturation, contrast and sharpness against the teacher's clips, where guidance shows first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from distill_bench.evaluator import Clips, Evaluator, Score, mean_score, same_frames, unpaired


@dataclass(frozen=True)
class Fidelity(Evaluator):
    """Colourfulness, contrast and sharpness of the frames over the teacher's; 1 is right.

    Distribution matching with much guidance drives saturation and contrast up, a collapsing student loses or explodes both,
    and regression blurs. Plain statistics of pixels: no network to mistrust.
    """

    paper: ClassVar[str] = "arXiv:2404.04465"
    version: ClassVar[int] = 1

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        mine = statistics(clips.frames)
        result = [
            mean_score(name, values, title, unit="of 255")
            for (name, title), values in zip(TITLES, mine, strict=True)
        ]
        if "teacher" in references:
            teacher = references["teacher"]
            same_frames(clips, teacher, "teacher")
            for (name, title), values, theirs in zip(
                TITLES, mine, statistics(teacher.frames), strict=True
            ):
                if not theirs.mean() > 0:
                    raise ValueError(
                        f"the {name} of the teacher reference is 0: there is no ratio to it"
                    )
                about = {"better": "one", "warnings": unpaired(clips, teacher)}
                result.append(
                    mean_score(
                        f"{name}_ratio", values / theirs.mean(), f"{title} / teacher's", **about
                    )
                )
        return result


TITLES = (("saturation", "saturation"), ("contrast", "contrast"), ("sharpness", "sharpness"))


def statistics(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of clips (N, T, 3, H, W) uint8, (N,) each, of 255.

    Mean of largest minus smallest channel; standard deviation of the brightness over the pixels of a frame; mean absolute
    Laplacian of the brightness.
    """
    found = []
    for each in frames:
        clip = each.astype(
            np.float32
        )  # one at a time: all of a folder would take four times its memory
        grey = clip.mean(1)
        laplacian = (
            4 * grey[:, 1:-1, 1:-1]
            - grey[:, :-2, 1:-1]
            - grey[:, 2:, 1:-1]
            - grey[:, 1:-1, :-2]
            - grey[:, 1:-1, 2:]
        )
        saturation = (clip.max(1) - clip.min(1)).mean()
        found.append((saturation, grey.std((1, 2)).mean(), np.abs(laplacian).mean()))
    saturation, contrast, sharpness = np.array(found, np.float64).T
    return saturation, contrast, sharpness
