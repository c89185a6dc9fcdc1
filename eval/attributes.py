"""Attribute accuracy: whether the clips show the colour, shape, direction and speed that their captions name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

from distill_bench import shapes
from distill_bench.evaluator import Clips, Evaluator, Score


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
        right = {f"attribute_{k}": [float(a[k] == b[k]) for a, b in zip(said, shown, strict=True)] for k in said[0]}
        right = {"attribute_accuracy": [float(a == b) for a, b in zip(said, shown, strict=True)]} | right
        return [
            Score(
                column,
                sum(each) / len(each),
                "all attributes right" if column == "attribute_accuracy" else f"{column.removeprefix('attribute_')} right",
                better="higher",
                headline=column == "attribute_accuracy",
                per_clip=tuple(each),
            )
            for column, each in right.items()
        ]
