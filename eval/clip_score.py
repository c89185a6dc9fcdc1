"""CLIP score: cosine of clips with their captions, and whether the caption can be told from the others."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from distill_bench.domain import shapes
from distill_bench.evaluate.clip_models import ClipModel, indomain_clip, open_clip_model
from distill_bench.evaluator import Clips, Evaluator, Score, mean_score

MODEL = "DISTILL_BENCH_CLIP"
BLIND = "averages single frames: blind to their order, a clip backwards scores the same"


@dataclass(frozen=True)
class CLIPScore(Evaluator):
    """100 times the cosine of clip and caption, not clamped, and R@1: the share of clips whose nearest caption is their own.

    A CLIP of single frames is averaged over frames (CLIPSIM: Wu et al., 2021) and blind to their order. Where the captions are of
    moving shapes, a CLIP of whole clips stands beside it. Cosines of the shipped models (about 95) and of the literature's
    (about 30) do not compare.
    """

    paper: ClassVar[str] = "arXiv:2104.08718"
    version: ClassVar[int] = 1

    # local-dir:/folder, MODEL:TAG or MODEL:/weights of open_clip; None: the shipped ones
    model: str | None = field(default_factory=lambda: os.environ.get(MODEL))

    def reason_to_skip(self, clips: Clips) -> str | None:
        nameless = sum(not prompt.strip() for prompt in clips.prompts)
        if nameless:
            return f"{nameless} of {len(clips.prompts)} clips have no caption: name them in manifest.jsonl"
        if self.model is not None:
            return None
        frames, _, height, width = clips.frames.shape[1:]
        hint = f"set {MODEL} to an open_clip model, for instance local-dir:/folder"
        if (frames, height, width) != (shapes.FRAMES, shapes.SIZE, shapes.SIZE):
            return f"no shipped CLIP knows {frames} frames of {height}x{width}: {hint}"
        try:
            for prompt in clips.prompts:
                shapes.parse(prompt)
        except ValueError as error:
            return f"the shipped CLIP knows moving shapes only ({error}): {hint}"
        return None

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        if self.model is not None:
            return _scores(open_clip_model(self.model), clips, "clip", BLIND, True)
        whole = "sees whole clips: their direction and speed"
        return _scores(indomain_clip(False), clips, "clip", BLIND, True) + _scores(
            indomain_clip(True), clips, "clip_video", whole
        )


def _scores(
    model: ClipModel, clips: Clips, name: str, note: str, headline: bool = False
) -> list[Score]:
    own, hits, captions = cosines(model, clips)
    cut = int((model.tokenize(clips.prompts)[:, -1] != 0).sum())
    warnings = (f"{cut} captions fill the model's context and may be cut",) if cut else ()
    only = ("there is one caption: every clip's nearest is its own",) if captions == 1 else ()
    about = {"better": "higher", "extractor": model.id, "note": note, "warnings": warnings}
    kind = "video CLIP" if model.whole else "CLIP"
    title = f"{kind} score" + ("" if model.whole else " (frames)")
    return [
        mean_score(
            "clip_score" if name == "clip" else name, own, title, headline=headline, **about
        ),
        mean_score(
            f"{name}_r1",
            hits,
            f"R@1 of {captions} captions, {kind}",
            **about | {"warnings": warnings + only},
        ),
    ]


def cosines(model: ClipModel, clips: Clips) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Of each clip 100 times its cosine with its caption and whether that is its largest (1 or 0); the number of captions."""
    cosine, kind = model.similarities(clips)
    own = cosine.gather(1, kind[:, None])[:, 0]
    return own, (cosine.argmax(1) == kind).float(), cosine.shape[1]
