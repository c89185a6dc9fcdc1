"""CLIP models for the CLIP score: the two shipped with the package, and any model of open_clip."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from distill_bench.domain import shapes
from distill_bench.evaluate import encoders
from distill_bench.evaluate.cache import batched, cached, refuse_training_clips
from distill_bench.evaluate.device import FittingBatches, Preprocessed, placed
from distill_bench.evaluator import Clips
from distill_bench.store.failures import first_line
from distill_bench.store.files import sha256

CAPTIONS = 1024  # per forward pass


@dataclass(frozen=True)
class ClipModel:
    """Frozen CLIP of single frames or, if `whole`, of whole clips; embeddings are unit vectors."""

    id: str
    embed: nn.Module  # uint8 (B, 3, H, W), or (B, T, 3, H, W) if whole -> (B, d)
    embed_text: nn.Module  # tokens (B, L) -> (B, d)
    tokenize: Callable[[list[str]], Tensor]  # -> (B, L)
    whole: bool = False
    seen: frozenset[int] = frozenset()  # digests of its training clips
    # Kind of a caption. A clip may fit captions of several kinds, as "a red circle" and "a red
    # circle moving left", so its nearest caption is sought among those of its own kind.
    kind_of: Callable[[str], str] = lambda prompt: ""

    def similarities(self, clips: Clips) -> tuple[Tensor, Tensor]:
        """Cosine similarity (times 100) of every clip with every distinct caption.

        Captions with equal tokens are merged: a model that drops words cannot tell them apart.

        Returns:
            Cosines (N, captions), averaged over frames, and the index (N,) of each clip's caption.

        Raises:
            ValueError: if the model was trained on one of the clips, or its cosines are not finite.
        """
        refuse_training_clips(self.seen, clips, self.id, "their scores mean nothing")
        captions, own = self.tokenize(clips.prompts).unique(dim=0, return_inverse=True)
        text = self.embedded_captions(captions)
        by_frame = self.embed if self.whole else Preprocessed(embedded_frames, self.embed)
        key = f"{self.id}-embedding"
        image = cached(key, clips, lambda: batched(by_frame, clips.frames, self.id))
        cosines = 100 * (image @ text.T)
        if not self.whole:
            cosines = cosines.mean(1)
        if not cosines.isfinite().all():
            raise ValueError(f"{self.id} gave cosines that are not finite")
        return cosines, own

    def embedded_captions(self, captions: Tensor) -> Tensor:
        """Embeddings (captions, d) of tokens (captions, L), on the processor."""
        with placed(self.embed_text, self.id) as device, torch.no_grad():
            return FittingBatches(self.id, CAPTIONS)(
                lambda tokens: self.embed_text(tokens.to(device)).float().cpu(), captions
            )

    def rivals(self, prompts: list[str], own: Tensor) -> Tensor:
        """Captions that are of the kind of each clip's own one, bool (N, captions)."""
        names = [self.kind_of(prompt) for prompt in prompts]
        kind = torch.tensor([names.index(name) for name in names])
        kind_of_caption = torch.zeros(int(own.max()) + 1, dtype=torch.long).scatter(0, own, kind)
        return kind[:, None] == kind_of_caption


def embedded_frames(embed: nn.Module, frames: Tensor) -> Tensor:
    """Embeddings (B, T, d) of every frame of clips (B, T, 3, H, W)."""
    return embed(frames.flatten(0, 1)).reshape(*frames.shape[:2], -1)


@cache
def indomain_clip(whole: bool) -> ClipModel:
    """Load the shipped CLIP of whole clips, or of single frames.

    The frame CLIP ignores caption words that no single frame can show, such as speeds.
    """
    name, words, make = encoders.FRAME_CLIP, encoders.FRAME_WORDS, encoders.frame_clip
    if whole:
        name, words, make = encoders.VIDEO_CLIP, encoders.CLIP_WORDS, encoders.video_clip

    def kind_of(prompt: str) -> str:
        attributes = shapes.parse(prompt)
        return attributes.kind if whole else encoders.kind_in_frame(attributes)

    model, digest, seen = encoders.load_encoder(make(), name)

    def embed(model: nn.Module, images: Tensor) -> Tensor:
        x = encoders.scaled(images)
        return model.encode_image(x.transpose(1, 2) if whole else x, normalize=True)

    return ClipModel(
        f"{name}#{digest[:8]}",
        Preprocessed(embed, model),
        Preprocessed(embed_text, model),
        lambda prompts: encoders.tokenize(prompts, words),
        whole,
        seen,
        kind_of,
    )


@cache
def open_clip_model(spec: str) -> ClipModel:
    """Load a CLIP of open_clip given as `local-dir:/folder`, `MODEL:TAG` or `MODEL:/weights/file`.

    A weights file carries no configuration: OpenAI's weights need a `-quickgelu` model.

    Raises:
        ValueError: if the model or its weights cannot be loaded. Random weights are refused.
    """
    name, _, weights = spec.partition(":")
    logging.disable(logging.ERROR)  # the error below says the same
    try:
        load = _load_folder if name == "local-dir" else _load_named
        model, preprocess, tokenizer, digest = load(name, weights)
    except Exception as error:  # torch raises many kinds of error for a foreign file
        raise ValueError(f"no CLIP at {spec!r}: {first_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    model.eval().requires_grad_(False)

    def embed(model: nn.Module, frames: Tensor) -> Tensor:
        from torchvision.transforms.functional import to_pil_image  # slow to import

        images = torch.stack([preprocess(to_pil_image(frame)) for frame in frames.cpu()])
        return model.encode_image(images.to(frames.device), normalize=True)

    label = Path(weights).name if name == "local-dir" else f"{name}-{Path(weights).stem}"
    return ClipModel(
        f"open_clip-{label}#{digest[:8]}",
        Preprocessed(embed, model),
        Preprocessed(embed_text, model),
        tokenizer,
    )


def embed_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Unit vectors (B, d) of tokens (B, L)."""
    return model.encode_text(tokens, normalize=True)


def _load_folder(name: str, weights: str) -> tuple[nn.Module, Callable, Callable, str]:
    import open_clip  # slow to import

    folder = Path(weights)
    config = folder / "open_clip_config.json"
    suffixes = {".safetensors", ".bin", ".pt", ".pth"}
    has_weights = any(path.suffix in suffixes for path in folder.glob("open_clip_*"))
    if not config.is_file() or not has_weights:
        raise ValueError("the folder needs open_clip_config.json and open_clip_model.safetensors")
    spec = f"{name}:{weights}"
    model, _, preprocess = open_clip.create_model_and_transforms(spec, require_pretrained=True)
    digest = hashlib.sha256((_state_digest(model) + sha256(config)).encode()).hexdigest()
    return model, preprocess, open_clip.get_tokenizer(spec), digest


def _load_named(name: str, weights: str) -> tuple[nn.Module, Callable, Callable, str]:
    import open_clip  # slow to import

    if not weights:
        raise ValueError(
            "weights are missing; write MODEL:TAG, MODEL:/weights/file or local-dir:/folder"
        )
    model, _, preprocess = open_clip.create_model_and_transforms(
        name, pretrained=weights, require_pretrained=True
    )
    return model, preprocess, open_clip.get_tokenizer(name), _state_digest(model)


def _state_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
