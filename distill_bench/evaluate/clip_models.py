"""TODO: evaluate.clip_models."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from distill_bench.evaluate import encoders
from distill_bench.evaluate.cache import batched, cached, refuse_seen
from distill_bench.evaluator import Clips
from distill_bench.store.files import first_line, sha256


@dataclass(frozen=True)
class ClipModel:
    """A frozen CLIP; `embed` and `embed_text` give unit vectors."""

    id: str
    embed: Callable[
        [Tensor], Tensor
    ]  # uint8 frames (B, 3, H, W), or clips (B, T, 3, H, W) where `whole` -> (B, d)
    embed_text: Callable[[Tensor], Tensor]  # tokens (B, L) -> (B, d)
    tokenize: Callable[[list[str]], Tensor]
    whole: bool = False  # sees clips, not single frames
    seen: frozenset[int] = frozenset()  # digests of the clips that it was trained on

    def similarities(self, clips: Clips) -> tuple[Tensor, Tensor]:
        """100 times the cosine of every clip with every distinct caption, (N, captions), frames averaged; each clip's caption.

        Captions of equal tokens are one: a model that drops words is not asked to tell what it cannot read.

        Raises:
            ValueError: if the clips were in its training, or its cosines are no numbers.
        """
        refuse_seen(self.seen, clips, self.id, "their scores mean nothing")
        kinds, kind = self.tokenize(clips.prompts).unique(dim=0, return_inverse=True)
        with torch.no_grad():
            text = self.embed_text(kinds).float()
        image = cached(
            f"{self.id}-embedding", clips, lambda: batched(self._embedded, clips.frames, self.id)
        )
        cosine = 100 * (image @ text.T)
        cosine = cosine if self.whole else cosine.mean(1)
        if not cosine.isfinite().all():
            raise ValueError(f"{self.id} gave cosines that are not finite")
        return cosine, kind

    def _embedded(self, frames: Tensor) -> Tensor:
        if self.whole:
            return self.embed(frames)
        return self.embed(frames.flatten(0, 1)).reshape(*frames.shape[:2], -1)


@cache
def indomain_clip(whole: bool) -> ClipModel:
    """The shipped CLIP of single frames, which ignores words that no frame shows, or of whole clips."""
    name, words = (
        (encoders.VIDEO_CLIP, encoders.CLIP_WORDS)
        if whole
        else (encoders.FRAME_CLIP, encoders.FRAME_WORDS)
    )
    model, digest, seen = encoders.load_encoder(
        encoders.video_clip() if whole else encoders.frame_clip(), name
    )

    def embed(images: Tensor) -> Tensor:
        x = encoders.scaled(images)
        return model.encode_image(x.transpose(1, 2) if whole else x, normalize=True)

    return ClipModel(
        f"{name}#{digest[:8]}",
        embed,
        lambda tokens: model.encode_text(tokens, normalize=True),
        lambda prompts: encoders.tokenize(prompts, words),
        whole,
        seen,
    )


@cache
def open_clip_model(spec: str) -> ClipModel:
    """A CLIP of open_clip: `local-dir:/folder`, `MODEL:TAG` or `MODEL:/weights/file`; without weights it is an error.

    Weights by file come with no metadata: OpenAI's need a `-quickgelu` model.
    """
    import open_clip

    name, _, weights = spec.partition(":")
    logging.disable(logging.ERROR)  # what open_clip has to say is said below, in one line
    try:
        if name == "local-dir":
            folder = Path(weights)
            files = sorted(
                p
                for p in folder.glob("open_clip_*")
                if p.suffix in {".safetensors", ".bin", ".pt", ".pth"}
            )
            if not (folder / "open_clip_config.json").is_file() or not files:
                raise ValueError("it needs open_clip_config.json and open_clip_model.safetensors")
            model, _, preprocess = open_clip.create_model_and_transforms(
                spec, require_pretrained=True
            )
            tokenizer = open_clip.get_tokenizer(spec)
            digest = hashlib.sha256(
                (_state_digest(model) + sha256(folder / "open_clip_config.json")).encode()
            ).hexdigest()
        else:
            if not weights:
                raise ValueError(
                    "weights are missing: write MODEL:TAG, MODEL:/weights/file or local-dir:/folder"
                )
            model, _, preprocess = open_clip.create_model_and_transforms(
                name, pretrained=weights, require_pretrained=True
            )
            tokenizer = open_clip.get_tokenizer(name)
            digest = _state_digest(model)
    except (
        Exception
    ) as error:  # torch answers a file that is none of its own with errors of many kinds
        raise ValueError(f"no CLIP at {spec!r}: {first_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    model.eval().requires_grad_(False)

    def embed(frames: Tensor) -> Tensor:
        from torchvision.transforms.functional import to_pil_image

        return model.encode_image(
            torch.stack([preprocess(to_pil_image(f)) for f in frames]), normalize=True
        )

    label = Path(weights).name if name == "local-dir" else f"{name}-{Path(weights).stem}"
    return ClipModel(
        f"open_clip-{label}#{digest[:8]}",
        embed,
        lambda t: model.encode_text(t, normalize=True),
        tokenizer,
    )


def _state_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
