"""Train the evaluators' networks: a classifier and two CLIPs of the embedded domain.

For networks of whole clips, half of the training clips are reversed and labelled with the direction
of their motion. Otherwise the networks could read the direction from the nose in a single frame.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

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
    VIDEO_CLIP,
    Classifier,
    frame_clip,
    scaled,
    tokenize,
    video_clip,
)
from distill_bench.evaluator import clip_digest
from distill_bench.store.files import sha256, write_bytes, write_json

# first keys of rendered clips; protocols use smaller ones
TRAIN_KEYS = 1_000_000
HELD_OUT_KEYS = 900_000
BATCH = 64
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def train_encoders(out: Path, steps: int, clips: int, seed: int) -> None:
    """Train the three networks on rendered clips; write each with its card."""
    train, labels = rendered_clips(clips, TRAIN_KEYS)
    held_out, held_labels = rendered_clips(432, HELD_OUT_KEYS)
    seen = torch.tensor([clip_digest(clip) for clip in train])
    command = f"distill-bench pretrain --encoders --steps {steps} --clips {clips} --seed {seed}"
    for name, fit, score in (
        (CLASSIFIER, fit_classifier, classifier_accuracy),
        (VIDEO_CLIP, fit_video_clip, video_retrieval),
        (FRAME_CLIP, fit_frame_clip, frame_retrieval),
    ):
        began = time.monotonic()
        net = fit(train, labels, steps, seed)
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
            "held_out_clips": len(held_out),
            "held_out_accuracy": score(net.eval(), held_out, held_labels),
            "licence": "Apache-2.0",
        }
        write_json(path.with_suffix(".json"), card)
        print(json.dumps(card), flush=True)


def rendered_clips(count: int, first_key: int) -> tuple[np.ndarray, list[shapes.Attributes]]:
    """Render `count` labelled clips, cycling through all attributes, with keys from `first_key`."""
    attributes = shapes.all_attributes()
    labels = [attributes[i % len(attributes)] for i in range(count)]
    return np.stack([shapes.render(a, first_key + i) for i, a in enumerate(labels)]), labels


def answers(labels: list[shapes.Attributes], backwards: bool) -> dict[str, Tensor]:
    """Target classes (N,) of each head, for clips played forwards or backwards."""
    rows = [asdict(a) | {"heading": a.direction, "course": _course(a, backwards)} for a in labels]
    return {k: torch.tensor([values.index(row[k]) for row in rows]) for k, values in HEADS.items()}


def _course(a: shapes.Attributes, backwards: bool) -> str:
    if a.speed == "still":
        return "none"
    return OPPOSITE[a.direction] if backwards else a.direction


def captions(labels: list[shapes.Attributes], backwards: bool) -> list[str]:
    """Captions of clips played forwards or backwards; the direction is that of the motion."""
    turned = [
        replace(a, direction=OPPOSITE[a.direction]) if backwards and a.speed != "still" else a
        for a in labels
    ]
    return [shapes.caption(a) for a in turned]


def fit_classifier(
    clips: np.ndarray, labels: list[shapes.Attributes], steps: int, seed: int
) -> Classifier:
    """Train the classifier on the summed cross entropy of its heads."""
    torch.manual_seed(seed)
    net, draw = Classifier(), generator("classifier", seed)
    both = [answers(labels, backwards) for backwards in (False, True)]

    def loss() -> Tensor:
        chosen = torch.randint(len(clips), (BATCH,), generator=draw)
        backwards = torch.rand(BATCH, generator=draw) < 0.5
        logits = net(_batch(clips, chosen, backwards))
        right = {k: torch.where(backwards, both[1][k][chosen], both[0][k][chosen]) for k in HEADS}
        return sum(nn.functional.cross_entropy(logits[k], right[k]) for k in HEADS)

    _descend(net, loss, steps, 3e-3)
    standardise(net, clips)
    return net


@torch.no_grad()
def standardise(net: Classifier, clips: np.ndarray) -> None:
    """Set the classifier's feature mean and standard deviation, over clips played forwards."""
    net.eval()
    batches = torch.from_numpy(clips).split(BATCH)
    features = torch.cat([net.features(scaled(batch).transpose(1, 2)) for batch in batches])
    net.mean.copy_(features.mean(0))
    net.std.copy_(features.std(0))


def fit_frame_clip(
    clips: np.ndarray, labels: list[shapes.Attributes], steps: int, seed: int
) -> nn.Module:
    """Train the frame CLIP; each batch has every caption once, so there are no false negatives."""
    torch.manual_seed(seed)
    net, draw = frame_clip(), generator("frame_clip", seed)
    kinds, members = _kinds(tokenize([shapes.caption(a) for a in labels], FRAME_WORDS))

    def images() -> tuple[Tensor, Tensor]:
        chosen = _one_of_each(members, draw)
        at = torch.randint(clips.shape[1], (len(chosen),), generator=draw)
        return scaled(torch.from_numpy(clips[chosen.numpy(), at.numpy()])), kinds

    return _fit_contrast(net, images, steps)


def fit_video_clip(
    clips: np.ndarray, labels: list[shapes.Attributes], steps: int, seed: int
) -> nn.Module:
    """Train the video CLIP on clips played forwards and backwards, each caption once per batch."""
    torch.manual_seed(seed)
    net, draw = video_clip(), generator("video_clip", seed)
    tokens = tokenize(
        [c for backwards in (False, True) for c in captions(labels, backwards)], CLIP_WORDS
    )
    kinds, members = _kinds(tokens)  # indices from len(clips) on are reversed clips

    def images() -> tuple[Tensor, Tensor]:
        batch = torch.randperm(len(kinds), generator=draw)[: BATCH + BATCH // 2]
        chosen = _one_of_each([members[k] for k in batch], draw)
        return _batch(clips, chosen % len(clips), chosen >= len(clips)), kinds[batch]

    return _fit_contrast(net, images, steps)


def _kinds(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Distinct captions (captions, L), and the indices of the clips of each caption."""
    kinds, kind = tokens.unique(dim=0, return_inverse=True)
    return kinds, [(kind == k).nonzero()[:, 0] for k in range(len(kinds))]


def _one_of_each(members: list[Tensor], draw: torch.Generator) -> Tensor:
    return torch.stack([m[torch.randint(len(m), (1,), generator=draw)[0]] for m in members])


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
def classifier_accuracy(
    net: Classifier, clips: np.ndarray, labels: list[shapes.Attributes]
) -> dict[str, float]:
    """Accuracy of each head on clips played forwards and backwards."""
    result = {}
    for backwards in (False, True):
        right = answers(labels, backwards)
        flags = torch.full((BATCH,), backwards)
        parts = [
            net(_batch(clips, i, flags[: len(i)])) for i in torch.arange(len(clips)).split(BATCH)
        ]
        for k in HEADS:
            accuracy = (
                (torch.cat([p[k] for p in parts]).argmax(1) == right[k]).float().mean().item()
            )
            result[f"{k}_backwards" if backwards else k] = round(accuracy, 4)
    return result


def frame_retrieval(
    net: nn.Module, clips: np.ndarray, labels: list[shapes.Attributes]
) -> dict[str, float]:
    """`retrieval` by middle frames."""
    tokens = tokenize([shapes.caption(a) for a in labels], FRAME_WORDS)
    return retrieval(net, scaled(torch.from_numpy(clips[:, clips.shape[1] // 2])), tokens)


def video_retrieval(
    net: nn.Module, clips: np.ndarray, labels: list[shapes.Attributes]
) -> dict[str, float]:
    """`retrieval` by clips; also R@1 of reversed clips for their forward captions (0 is best)."""
    x = scaled(torch.from_numpy(clips)).transpose(1, 2)
    tokens = tokenize([shapes.caption(a) for a in labels], CLIP_WORDS)
    moving = torch.tensor([a.speed != "still" for a in labels])
    return retrieval(net, x, tokens) | {
        "r1_backwards": retrieval(net, x[moving].flip(2), tokens[moving])["r1"]
    }


@torch.no_grad()
def retrieval(net: nn.Module, images: Tensor, tokens: Tensor) -> dict[str, float]:
    """R@1 (share of images nearest to their own caption), and 100 times the mean own cosine."""
    kinds, kind = tokens.unique(dim=0, return_inverse=True)
    image = torch.cat([net.encode_image(part, normalize=True) for part in images.split(BATCH)])
    cosine = image @ net.encode_text(kinds, normalize=True).T
    own = cosine.gather(1, kind[:, None]).mean().item()
    r1 = (cosine.argmax(1) == kind).float().mean().item()
    return {"captions": len(kinds), "r1": round(r1, 4), "cosine_x100": round(100 * own, 2)}
