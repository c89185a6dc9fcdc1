"""CLIP score: cosine of the clip's frames with its caption, and whether the caption can be told from the others."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from distill_bench import shapes
from distill_bench.evaluator import Clips, Evaluator, Score
from distill_bench.features import ClipModel, load_frame_clip, load_open_clip

WEIGHTS = "DISTILL_BENCH_CLIP"
BATCH = 256  # frames a forward


@dataclass(frozen=True)
class CLIPScore(Evaluator):
    """100 times the cosine of frame and caption, mean over frames (CLIPSIM: Wu et al., 2021), not clamped; and R@1.

    The model is open_clip's: the shipped in-domain one for captions of moving shapes, or a local folder. Cosines of the two
    scales (about 95 and about 30) do not compare. Averaging over frames is blind to the order of the frames.
    """

    paper: ClassVar[str] = "arXiv:2104.08718"
    version: ClassVar[int] = 1

    weights: str | None = field(
        default_factory=lambda: os.environ.get(WEIGHTS)
    )  # a local open_clip folder; None: the in-domain one

    def reason_to_skip(self, clips: Clips) -> str | None:
        if self.weights is not None:
            return None
        if clips.frames.shape[3:] != (shapes.SIZE, shapes.SIZE):
            height, width = clips.frames.shape[3:]
            return f"no shipped CLIP knows frames of {height}x{width}: set {WEIGHTS} to a local open_clip folder"
        try:
            for prompt in clips.prompts:
                shapes.parse(prompt)
        except ValueError as error:
            return f"the shipped CLIP knows moving shapes only ({error}): set {WEIGHTS} to a local open_clip folder"
        return None

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        model = load_frame_clip() if self.weights is None else load_open_clip(Path(self.weights))
        own, hits, captions = similarities(model, clips)
        title = f"R@1 of {captions} captions"
        return [
            Score("clip_score", _mean(own), "CLIP score", "", "higher", True, tuple(own), extractor=model.id),
            Score("clip_r1", _mean(hits), title, "", "higher", False, tuple(hits), extractor=model.id),
        ]


@torch.no_grad()
def similarities(model: ClipModel, clips: Clips) -> tuple[list[float], list[float], int]:
    """Of each clip 100 times its cosine with its caption and whether that is its largest (1 or 0); the number of captions.

    Captions of equal tokens are one caption: a model that drops words is not asked to tell what it cannot read.
    """
    n, frames = clips.frames.shape[:2]
    kinds, kind = model.tokenize(clips.prompts).unique(dim=0, return_inverse=True)
    text = model.encode_tokens(kinds)
    flat = torch.from_numpy(clips.frames.reshape(-1, *clips.frames.shape[2:]))
    image = torch.cat([model.encode_frames(flat[i : i + BATCH]) for i in range(0, len(flat), BATCH)])
    cosine = 100 * (image.float() @ text.float().T).reshape(n, frames, -1).mean(1)
    if not cosine.isfinite().all():
        raise ValueError(f"{model.id} gave cosines that are not finite")
    own = cosine.gather(1, kind[:, None])[:, 0]
    return own.tolist(), (cosine.argmax(1) == kind).float().tolist(), len(kinds)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
