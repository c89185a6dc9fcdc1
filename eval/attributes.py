"""Attribute accuracy: whether the clips show the colour, shape, direction and speed that their captions name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

from distill_bench.domain import shapes
from distill_bench.evaluator import Clips, Evaluator, Score, mean_score


@dataclass(frozen=True)
class AttributeAccuracy(Evaluator):
    """Share of clips whose every attribute is read as captioned; the reader is arithmetic, not a network.

    The idea of T2I-CompBench with exact answers: the embedded domain is rendered, so what is right is known.
    """

    paper: ClassVar[str] = "arXiv:2307.06350"
    version: ClassVar[int] = 1

    def reason_to_skip(self, clips: Clips) -> str | None:
        if clips.frames.shape[3:] != (shapes.SIZE, shapes.SIZE):
            height, width = clips.frames.shape[3:]
            return f"moving shapes are {shapes.SIZE}x{shapes.SIZE}; the clips are {height}x{width}"
        try:
            for prompt in clips.prompts:
                shapes.parse(prompt)
        except ValueError as error:
            return str(error)
        return None

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        said = [asdict(shapes.parse(p)) for p in clips.prompts]
        shown = [asdict(a) for a in shapes.read(clips.frames)]
        right = {
            k: [float(a[k] == b[k]) for a, b in zip(said, shown, strict=True)] for k in said[0]
        }
        every = [float(a == b) for a, b in zip(said, shown, strict=True)]
        distances = {
            k: histogram_distance([a[k] for a in said], [b[k] for b in shown]) for k in said[0]
        }
        return [
            mean_score(
                "attribute_accuracy", every, "all attributes right", better="higher", headline=True
            ),
            *(
                mean_score(f"attribute_{k}", each, f"{k} right", better="higher")
                for k, each in right.items()
            ),
            Score(
                "attribute_histogram",
                sum(distances.values()) / len(distances),
                "distance of what is shown from what is asked",
                better="lower",
                note=f"total variation of the histograms, mean over {', '.join(distances)}",
            ),
        ]


def histogram_distance(asked: list[str], shown: list[str]) -> float:
    """Total variation between two histograms of the same length: the share that would have to change."""
    return sum(abs(asked.count(v) - shown.count(v)) for v in {*asked, *shown}) / (2 * len(asked))
