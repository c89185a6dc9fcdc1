"""Train the evaluators' networks: a classifier and two CLIPs of the embedded domain.

For networks of whole clips, half of the training clips are reversed and labelled with the velocity
of their motion. Otherwise the networks could read the motion's direction from the nose in a single
frame.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from distill_bench.domain import shapes
from distill_bench.draws import generator
from distill_bench.evaluate.encoders import (
    CLASSIFIER,
    CLIP_WORDS,
    FRAME_CLIP,
    FRAME_WORDS,
    HEADS,
    VECTORS,
    VIDEO_CLIP,
    Classifier,
    frame_clip,
    kind_in_frame,
    scaled,
    tokenize,
    video_clip,
)
from distill_bench.evaluator import clip_digest
from distill_bench.pretrain.fit_autoencoder import render_clips, training_attributes
from distill_bench.store.files import sha256, write_bytes, write_json

# first keys of rendered clips; protocols use smaller ones
TRAIN_KEYS = 1_000_000
HELD_OUT_KEYS = 900_000
BATCH = 64
SPEED_BOUNDS = (shapes.STILL_BELOW, 1.1)  # pixels per frame, between the classes of the speed
VECTOR_WEIGHT = 2.0  # of the vectors' squared error in the classifier's loss
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


@dataclass(frozen=True)
class LabelledClips:
    """Rendered clips with what their captions name and how their bodies move."""

    frames: np.ndarray  # uint8 (N, T, 3, H, W)
    attributes: list[shapes.Attributes]  # N
    velocity: np.ndarray  # (N, 2), pixels per frame
    heading: np.ndarray  # of the nose, unit vectors (N, 2)

    @classmethod
    def rendered(cls, count: int, first_key: int) -> Self:
        """Render `count` clips with keys from `first_key`, a third of each kind of caption."""
        attributes = training_attributes(count, dict.fromkeys(shapes.KINDS, 1))
        frames = render_clips(attributes, first_key)
        motions = [shapes.draw_motion(a, first_key + i) for i, a in enumerate(attributes)]
        heading = np.array([motion.heading for motion in motions])
        return cls(frames, attributes, shapes.velocity(frames), heading)

    def captions(self, backwards: bool) -> list[str]:
        """Captions of the clips played forwards or backwards, in the direction of the motion."""
        moving = np.hypot(*self.velocity.T) > shapes.STILL_BELOW
        turned = [
            replace(a, direction=OPPOSITE[a.direction]) if backwards and m and a.direction else a
            for a, m in zip(self.attributes, moving, strict=True)
        ]
        return [shapes.caption(a) for a in turned]

    def answers(self, backwards: bool) -> dict[str, Tensor]:
        """Target of each head for the clips played forwards or backwards: classes or vectors."""
        speed = np.digitize(np.hypot(*self.velocity.T), SPEED_BOUNDS)
        classes = {
            "colour": [HEADS["colour"].index(a.colour) for a in self.attributes],
            "shape": [HEADS["shape"].index(a.shape) for a in self.attributes],
            "speed": speed,
        }
        vectors = {
            "velocity": -self.velocity if backwards else self.velocity,
            "heading": self.heading,
        }
        return {k: torch.as_tensor(v) for k, v in classes.items()} | {
            k: torch.as_tensor(v, dtype=torch.float32) for k, v in vectors.items()
        }


def train_encoders(out: Path, steps: int, clips: int, seed: int) -> None:
    """Train the three networks on rendered clips; write each with its card."""
    train = LabelledClips.rendered(clips, TRAIN_KEYS)
    held_out = LabelledClips.rendered(648, HELD_OUT_KEYS)
    seen = torch.tensor([clip_digest(clip) for clip in train.frames])
    command = f"distill-bench pretrain --encoders --steps {steps} --clips {clips} --seed {seed}"
    for name, fit, score in (
        (CLASSIFIER, fit_classifier, classifier_quality),
        (VIDEO_CLIP, fit_video_clip, video_retrieval),
        (FRAME_CLIP, fit_frame_clip, frame_retrieval),
    ):
        began = time.monotonic()
        net = fit(train, steps, seed)
        seconds = round(time.monotonic() - began)
        state = {
            k: v.detach().half().contiguous() if v.is_floating_point() else v
            for k, v in net.state_dict().items()
        }
        path = out / f"{name}.safetensors"
        write_bytes(path, save(state | {"trained_on": seen}))
        # judge the rounded weights that are shipped
        net.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        )
        card = {
            "name": name,
            "sha256": sha256(path),
            "command": command,
            "seed": seed,
            "train_seconds": seconds,
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in net.parameters()),
            "train_keys_from": TRAIN_KEYS,
            "held_out_keys_from": HELD_OUT_KEYS,
            "held_out_clips": len(held_out.frames),
            "held_out": score(net.eval(), held_out),
            "licence": "Apache-2.0",
        }
        write_json(path.with_suffix(".json"), card)
        print(json.dumps(card), flush=True)


def fit_classifier(train: LabelledClips, steps: int, seed: int) -> Classifier:
    """Train the classifier: cross entropy of its classes, squared error of its vectors."""
    torch.manual_seed(seed)
    net, draw = Classifier(), generator("classifier", seed)
    both = [train.answers(backwards) for backwards in (False, True)]

    def loss() -> Tensor:
        chosen = torch.randint(len(train.frames), (BATCH,), generator=draw)
        backwards = torch.rand(BATCH, generator=draw) < 0.5
        outputs = net(_batch(train.frames, chosen, backwards))
        total = torch.zeros(())
        for name, output in outputs.items():
            forwards, reverse = both[0][name][chosen], both[1][name][chosen]
            if name in VECTORS:
                target = torch.where(backwards[:, None], reverse, forwards)
                total = total + VECTOR_WEIGHT * nn.functional.mse_loss(output, target)
            else:  # the classes of a clip played backwards are the same
                total = total + nn.functional.cross_entropy(output, forwards)
        return total

    _descend(net, loss, steps, 3e-3)
    standardise(net, train.frames)
    return net


@torch.no_grad()
def standardise(net: Classifier, clips: np.ndarray) -> None:
    """Set the classifier's feature mean and standard deviation, over clips played forwards."""
    net.eval()
    batches = torch.from_numpy(clips).split(BATCH)
    features = torch.cat([net.features(scaled(batch).transpose(1, 2)) for batch in batches])
    net.mean.copy_(features.mean(0))
    net.std.copy_(features.std(0))


def fit_frame_clip(train: LabelledClips, steps: int, seed: int) -> nn.Module:
    """Train the frame CLIP; each batch has every caption of one kind once."""
    torch.manual_seed(seed)
    net, draw = frame_clip(), generator("frame_clip", seed)
    tokens = tokenize([shapes.caption(a) for a in train.attributes], FRAME_WORDS)
    groups = batch_groups(tokens, [kind_in_frame(a) for a in train.attributes])

    def images() -> tuple[Tensor, Tensor]:
        chosen, texts = draw_batch(groups, len(tokens), draw)
        at = torch.randint(shapes.FRAMES, (len(chosen),), generator=draw)
        return scaled(torch.from_numpy(train.frames[chosen.numpy(), at.numpy()])), texts

    return _fit_contrast(net, images, steps)


def fit_video_clip(train: LabelledClips, steps: int, seed: int) -> nn.Module:
    """Train the video CLIP on clips played forwards and backwards.

    The captions of a batch are distinct and of one kind, so that no clip fits two of them: one
    with a free motion may look as a caption that names its motion asks.
    """
    torch.manual_seed(seed)
    net, draw = video_clip(), generator("video_clip", seed)
    count = len(train.frames)
    tokens = tokenize([*train.captions(False), *train.captions(True)], CLIP_WORDS)
    groups = batch_groups(tokens, [a.kind for a in train.attributes] * 2)

    def images() -> tuple[Tensor, Tensor]:
        chosen, texts = draw_batch(groups, BATCH + BATCH // 2, draw)
        # indices from `count` on are clips played backwards
        return _batch(train.frames, chosen % count, chosen >= count), texts

    return _fit_contrast(net, images, steps)


@dataclass(frozen=True)
class CaptionGroup:
    """Distinct captions of one kind, tokens (captions, L), and the indices of their clips."""

    captions: Tensor
    members: list[Tensor]


def batch_groups(tokens: Tensor, kinds: list[str]) -> list[CaptionGroup]:
    """Groups of the clips whose captions (N, L) are of one kind."""
    groups = []
    for kind in dict.fromkeys(kinds):
        index = torch.tensor([i for i, k in enumerate(kinds) if k == kind])
        captions, own = tokens[index].unique(dim=0, return_inverse=True)
        members = [index[own == c] for c in range(len(captions))]
        groups.append(CaptionGroup(captions, members))
    return groups


def draw_batch(
    groups: list[CaptionGroup], limit: int, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Clips (B,) of distinct captions (B, L) of one group, at most `limit`."""
    group = groups[torch.randint(len(groups), (1,), generator=draw)]
    captions = torch.randperm(len(group.captions), generator=draw)[:limit]
    members = [group.members[c] for c in captions]
    chosen = [m[torch.randint(len(m), (1,), generator=draw)[0]] for m in members]
    return torch.stack(chosen), group.captions[captions]


def _batch(clips: np.ndarray, chosen: Tensor, backwards: Tensor) -> Tensor:
    """Chosen clips (B, 3, T, H, W) in [-1, 1], some of them reversed."""
    x = scaled(torch.from_numpy(clips[chosen.numpy()])).transpose(1, 2)
    return torch.where(backwards[:, None, None, None, None], x.flip(2), x)


def _fit_contrast(
    net: nn.Module, images: Callable[[], tuple[Tensor, Tensor]], steps: int
) -> nn.Module:
    import open_clip  # slow to import

    contrast = open_clip.ClipLoss()

    def loss() -> Tensor:
        image, tokens = images()
        return contrast(
            net.encode_image(image, normalize=True),
            net.encode_text(tokens, normalize=True),
            net.logit_scale.exp(),
        )

    def clamp() -> None:
        with torch.no_grad():
            net.logit_scale.clamp_(max=math.log(100))

    _descend(net, loss, steps, 3e-3, clamp)
    return net


def _descend(
    net: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    lr: float,
    after: Callable[[], None] = lambda: None,
) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    net.train()
    for step in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        after()
        if step % 100 == 0 or step == steps - 1:
            print(f"{type(net).__name__} step {step}: loss {value.item():.3f}", flush=True)


@torch.no_grad()
def classifier_quality(net: Classifier, clips: LabelledClips) -> dict[str, float]:
    """Accuracy of each class and root mean square error of each vector, for both directions."""
    result = {}
    count = len(clips.frames)
    for backwards in (False, True):
        right = clips.answers(backwards)
        flags = torch.full((count,), backwards)
        parts = [net(_batch(clips.frames, i, flags[i])) for i in torch.arange(count).split(BATCH)]
        for name, target in right.items():
            output = torch.cat([part[name] for part in parts])
            if name in VECTORS:
                value = (output - target).square().sum(1).mean().sqrt()
            else:
                value = (output.argmax(1) == target).float().mean()
            key = f"{name}_rmse" if name in VECTORS else name
            result[f"{key}_backwards" if backwards else key] = round(value.item(), 4)
    return result


def frame_retrieval(net: nn.Module, clips: LabelledClips) -> dict[str, float]:
    """`retrieval` by middle frames, for captions with a direction and for the others."""
    result = {}
    kinds = np.array([kind_in_frame(a) for a in clips.attributes])
    for name in ("direction", "free"):
        chosen = kinds == name
        named = [a for a, c in zip(clips.attributes, chosen, strict=True) if c]
        tokens = tokenize([shapes.caption(a) for a in named], FRAME_WORDS)
        frames = torch.from_numpy(clips.frames[chosen, shapes.FRAMES // 2])
        result |= {f"{k}_{name}": v for k, v in retrieval(net, scaled(frames), tokens).items()}
    return result


def video_retrieval(net: nn.Module, clips: LabelledClips) -> dict[str, float]:
    """`retrieval` by clips, per kind; also R@1 of reversed clips for their forward captions.

    The latter is best at 0, over moving clips with a named direction.
    """
    result = {}
    kinds = np.array([a.kind for a in clips.attributes])
    moving = np.hypot(*clips.velocity.T) > shapes.STILL_BELOW
    texts = clips.captions(False)
    for kind in shapes.KINDS:

        def retrieved(chosen: np.ndarray, backwards: bool) -> dict[str, float]:
            x = scaled(torch.from_numpy(clips.frames[chosen])).transpose(1, 2)
            tokens = tokenize([t for t, c in zip(texts, chosen, strict=True) if c], CLIP_WORDS)
            return retrieval(net, x.flip(2) if backwards else x, tokens)

        result |= {f"{k}_{kind}": v for k, v in retrieved(kinds == kind, False).items()}
        if kind != "free":
            reverse = retrieved((kinds == kind) & moving, True)
            result[f"r1_backwards_{kind}"] = reverse["r1"]
    return result


@torch.no_grad()
def retrieval(net: nn.Module, images: Tensor, tokens: Tensor) -> dict[str, float]:
    """R@1 (share of images nearest to their own caption), and 100 times the mean own cosine."""
    kinds, kind = tokens.unique(dim=0, return_inverse=True)
    image = torch.cat([net.encode_image(part, normalize=True) for part in images.split(BATCH)])
    cosine = image @ net.encode_text(kinds, normalize=True).T
    own = cosine.gather(1, kind[:, None]).mean().item()
    r1 = (cosine.argmax(1) == kind).float().mean().item()
    return {"captions": len(kinds), "r1": round(r1, 4), "cosine_x100": round(100 * own, 2)}
