"""Attribute accuracy: share of clips that show all that their captions name."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from distill_bench.domain import shapes
from distill_bench.evaluator import Citation, Clips, Evaluator, Score, mean_score


@dataclass(frozen=True)
class AttributeAccuracy(Evaluator):
    """Share of clips whose attributes all match the caption, as far as the caption names them.

    The idea is that of T2I-CompBench, but attributes are computed exactly instead of being read by
    a network. This is possible because clips of the embedded domain show rendered shapes.
    """

    paper: ClassVar[Citation] = Citation(
        "2307.06350",
        "T2I-CompBench: A Comprehensive Benchmark for Open-world Compositional Text-to-image "
        "Generation",
        "Kaiyi Huang, Kaiyue Sun, Enze Xie, Zhenguo Li, Xihui Liu",
        2023,
    )
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = (
        "attribute_accuracy",
        *(f"attribute_{key}" for key in shapes.FIELDS),
        "attribute_histogram",
    )

    def reason_to_skip(self, clips: Clips) -> str | None:
        height, width = clips.frames.shape[3:]
        if (height, width) != (shapes.SIZE, shapes.SIZE):
            return f"moving shapes are {shapes.SIZE}x{shapes.SIZE}; the clips are {height}x{width}"
        try:
            for prompt in clips.prompts:
                shapes.parse(prompt)
        except ValueError as error:
            return str(error)
        return None

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        asked = [shapes.parse(prompt).named() for prompt in clips.prompts]
        shown = [
            {key: getattr(attributes, key) for key in named}
            for named, attributes in zip(asked, shapes.read(clips.frames), strict=True)
        ]
        pairs = list(zip(asked, shown, strict=True))
        all_right = [float(a == b) for a, b in pairs]
        title = "all attributes right"
        scores = [
            mean_score("attribute_accuracy", all_right, title, better="higher", headline=True)
        ]
        distances = {}
        for key in shapes.FIELDS:
            values = [(a[key], b[key]) for a, b in pairs if key in a]
            if values:
                scores.append(_share_right(key, values, len(pairs)))
                distances[key] = histogram_distance(*map(list, zip(*values, strict=True)))
        scores.append(
            Score(
                "attribute_histogram",
                sum(distances.values()) / len(distances),
                "distance of what is shown from what is asked",
                better="lower",
                note=f"total variation of the histograms, mean over {', '.join(distances)}",
            )
        )
        return scores


def _share_right(key: str, values: list[tuple[str, str]], clips: int) -> Score:
    """Share of equal pairs (asked, shown), over the clips whose captions name `key`."""
    right = [float(asked == shown) for asked, shown in values]
    score = mean_score(f"attribute_{key}", right, f"{key} right", better="higher")
    if len(right) == clips:
        return score
    return dataclasses.replace(
        score,
        per_clip=None,
        sd=math.sqrt(score.value * (1 - score.value) / len(right)),
        note=f"over the {len(right)} of {clips} clips whose captions name the {key}",
    )


def histogram_distance(asked: list[str], shown: list[str]) -> float:
    """Total variation of two equally long lists: the share of values that must change."""
    return sum(abs(asked.count(v) - shown.count(v)) for v in {*asked, *shown}) / (2 * len(asked))
