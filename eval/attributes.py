"""Attribute accuracy: share of clips with the captioned colour, shape, direction and speed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

from distill_bench.domain import shapes
from distill_bench.evaluator import Clips, Evaluator, Score, mean_score


@dataclass(frozen=True)
class AttributeAccuracy(Evaluator):
    """Share of clips whose attributes all match the caption.

    The idea is that of T2I-CompBench, but attributes are computed exactly instead of being read by
    a network. This is possible because clips of the embedded domain show rendered shapes.
    """

    paper: ClassVar[str] = "arXiv:2307.06350"
    version: ClassVar[int] = 1

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
        asked = [asdict(shapes.parse(prompt)) for prompt in clips.prompts]
        shown = [asdict(attributes) for attributes in shapes.read(clips.frames)]
        pairs = list(zip(asked, shown, strict=True))
        all_right = [float(a == b) for a, b in pairs]
        title = "all attributes right"
        scores = [
            mean_score("attribute_accuracy", all_right, title, better="higher", headline=True)
        ]
        distances = {}
        for key in asked[0]:
            right = [float(a[key] == b[key]) for a, b in pairs]
            scores.append(mean_score(f"attribute_{key}", right, f"{key} right", better="higher"))
            distances[key] = histogram_distance([a[key] for a in asked], [b[key] for b in shown])
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


def histogram_distance(asked: list[str], shown: list[str]) -> float:
    """Total variation of two equally long lists: the share of values that must change."""
    return sum(abs(asked.count(v) - shown.count(v)) for v in {*asked, *shown}) / (2 * len(asked))
