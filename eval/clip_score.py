"""CLIP score: cosine of each clip with its caption, and how often that caption is the nearest."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from distill_bench.domain import shapes
from distill_bench.evaluate.clip_models import ClipModel, indomain_clip, open_clip_model
from distill_bench.evaluator import (
    Citation,
    Clips,
    Evaluator,
    Score,
    mean_score,
    reason_without_captions,
)

MODEL = "DISTILL_BENCH_CLIP"  # environment variable: a model of open_clip
BLIND = "averages single frames: blind to their order, a clip backwards scores the same"
WHOLE = "sees whole clips: their direction and speed"


@dataclass(frozen=True)
class CLIPScore(Evaluator):
    """100 times the cosine of clip and caption, and R@1: how often the nearest caption is its own.

    The cosine is not clamped. A CLIP of single frames is averaged over frames (CLIPSIM: Wu et al.,
    2021) and is blind to their order; clips of moving shapes are also scored by a CLIP of whole
    clips. Cosines of the shipped models (70 to 98) do not compare with those of the literature
    (about 30). For moving shapes, the nearest caption is sought among those that leave as much of
    the motion free as the clip's own.
    """

    paper: ClassVar[Citation] = Citation(
        "2104.08718",
        "CLIPScore: A Reference-free Evaluation Metric for Image Captioning",
        "Jack Hessel, Ari Holtzman, Maxwell Forbes, Ronan Le Bras, Yejin Choi",
        2021,
    )
    version: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = (
        "clip_score",
        "clip_r1",
        "clip_video",
        "clip_video_r1",
    )

    # local-dir:/folder, MODEL:TAG or MODEL:/weights of open_clip; None: the shipped models
    model: str | None = field(default_factory=lambda: os.environ.get(MODEL))

    def reason_to_skip(self, clips: Clips) -> str | None:
        reason = reason_without_captions(clips)
        if reason is not None:
            return reason
        if self.model is not None:
            open_clip_model(self.model)  # raises if it does not load
            return None
        hint = f"set {MODEL} to an open_clip model, e.g. local-dir:/folder"
        frames, _, height, width = clips.frames.shape[1:]
        if (frames, height, width) != (shapes.FRAMES, shapes.SIZE, shapes.SIZE):
            return f"no shipped CLIP takes {frames} frames of {height}x{width}; {hint}"
        try:
            for prompt in clips.prompts:
                shapes.parse(prompt)
        except ValueError as error:
            return f"the shipped CLIP knows moving shapes only ({error}); {hint}"
        return None

    def extractors(self, clips: Clips) -> frozenset[str]:
        return frozenset(model.id for model in self._models())

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        return [score for model in self._models() for score in clip_scores(model, clips)]

    def _models(self) -> list[ClipModel]:
        if self.model is not None:
            return [open_clip_model(self.model)]
        return [indomain_clip(whole=False), indomain_clip(whole=True)]


def clip_scores(model: ClipModel, clips: Clips) -> list[Score]:
    """Cosine and R@1 by one model of frames or of whole clips."""
    columns, label, title, note = ("clip_score", "clip_r1"), "CLIP", "CLIP score (frames)", BLIND
    if model.whole:
        columns, label, title = ("clip_video", "clip_video_r1"), "video CLIP", "video CLIP score"
        note = WHOLE
    cosines, own = model.similarities(clips)  # (N, captions), (N,)
    captions = cosines.shape[1]
    fields = {"better": "higher", "extractor": model.id, "note": note}
    warnings: tuple[str, ...] = ()
    if full := int((model.tokenize(clips.prompts)[:, -1] != 0).sum()):
        warnings += (f"{full} captions fill the model's context and may be cut",)
    cosine = mean_score(
        columns[0],
        cosines.gather(1, own[:, None])[:, 0],
        title,
        headline=not model.whole,
        warnings=warnings,
        **fields,
    )
    if captions == 1:
        warnings += ("there is one caption: every clip's nearest is its own",)
    rivals = model.rivals(clips.prompts, own)
    hits = (cosines.masked_fill(~rivals, -torch.inf).argmax(1) == own).float()
    recall = mean_score(
        columns[1], hits, f"R@1 of {captions} captions, {label}", warnings=warnings, **fields
    )
    return [cosine, recall]
