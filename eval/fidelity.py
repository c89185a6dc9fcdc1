"""Saturation, contrast and sharpness of the frames against those of the teacher's clips."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from distill_bench.evaluator import (
    Clips,
    Evaluator,
    Score,
    mean_score,
    pairing_warnings,
    require_same_frames,
)


@dataclass(frozen=True)
class Fidelity(Evaluator):
    """Saturation, contrast and sharpness of the frames, and their ratios to the teacher's.

    A ratio of 1 is best. Distribution matching with strong guidance raises saturation and contrast,
    a collapsing student loses or inflates both, and regression blurs. These are pixel statistics,
    computed without a network.
    """

    paper: ClassVar[str] = "none: statistics of pixels"
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = (
        "saturation",
        "contrast",
        "sharpness",
        "saturation_ratio",
        "contrast_ratio",
        "sharpness_ratio",
    )

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        statistics = frame_statistics(clips.frames)
        scores = {
            name: mean_score(name, values, name, unit="of 255")
            for name, values in statistics.items()
        }
        if "teacher" not in references:
            return list(scores.values())
        teacher = references["teacher"]
        require_same_frames(clips, teacher, "teacher")
        warnings = pairing_warnings(clips, teacher)
        for name, teacher_values in frame_statistics(teacher.frames).items():
            if not teacher_values.mean() > 0:  # e.g. the saturation of grey clips
                warning = f"the {name} of the teacher reference is 0: no ratio to it exists"
                scores[name] = replace(scores[name], warnings=(warning,))
                continue
            ratio = statistics[name] / teacher_values.mean()
            title, column = f"{name} / teacher's", f"{name}_ratio"
            scores[column] = mean_score(column, ratio, title, better="one", warnings=warnings)
        return list(scores.values())


def frame_statistics(frames: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of clips uint8 (N, T, 3, H, W), each (N,), in units of 255.

    saturation: mean of the largest minus the smallest channel. contrast: standard deviation of the
    brightness over the pixels of a frame. sharpness: mean absolute Laplacian of the brightness.
    """
    rows = []
    for clip in frames:  # one at a time: float32 takes four times the memory of uint8
        clip = clip.astype(np.float32)
        grey = clip.mean(1)
        laplacian = (
            4 * grey[:, 1:-1, 1:-1]
            - grey[:, :-2, 1:-1]
            - grey[:, 2:, 1:-1]
            - grey[:, 1:-1, :-2]
            - grey[:, 1:-1, 2:]
        )
        saturation = (clip.max(1) - clip.min(1)).mean()
        rows.append((saturation, grey.std((1, 2)).mean(), np.abs(laplacian).mean()))
    saturation, contrast, sharpness = np.array(rows, np.float64).T
    return {"saturation": saturation, "contrast": contrast, "sharpness": sharpness}
