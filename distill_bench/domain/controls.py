"""Clips that are wrong in a known way: what evaluators are held against, and the control rows of every table."""

import dataclasses
from collections.abc import Callable

import numpy as np

from distill_bench.domain import shapes


def frozen(frames: np.ndarray, seed: int = 0) -> np.ndarray:
    """Every clip's middle frame, standing still; frames uint8 (N, T, 3, H, W) here and below."""
    middle = frames.shape[1] // 2
    return np.repeat(frames[:, middle : middle + 1], frames.shape[1], 1)


def shuffled(frames: np.ndarray, seed: int = 0) -> np.ndarray:
    """The frames of every clip in a random order that is not the true one."""
    rng = np.random.default_rng(seed)
    result = np.empty_like(frames)
    order = np.arange(frames.shape[1])
    for i, clip in enumerate(frames):
        drawn = order
        while len(order) > 1 and (drawn == order).all():
            drawn = rng.permutation(len(order))
        result[i] = clip[drawn]
    return result


def backwards(frames: np.ndarray, seed: int = 0) -> np.ndarray:
    """Every clip from its end to its beginning."""
    return np.ascontiguousarray(frames[:, ::-1])


def noisy(frames: np.ndarray, seed: int = 0, sd: float = 0.1) -> np.ndarray:
    """Gaussian noise added, `sd` of the range."""
    noise = np.random.default_rng(seed).normal(0, 255 * sd, frames.shape)
    return np.clip(np.rint(frames + noise), 0, 255).astype(np.uint8)


def blurred(frames: np.ndarray, seed: int = 0, sigma: float = 1.5) -> np.ndarray:
    """Every frame under a Gaussian blur of `sigma` pixels."""
    from scipy.ndimage import gaussian_filter

    soft = gaussian_filter(frames.astype(np.float32), (0, 0, 0, sigma, sigma), mode="nearest")
    return np.clip(np.rint(soft), 0, 255).astype(np.uint8)


CORRUPTIONS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "frozen": frozen,
    "shuffled": shuffled,
    "backwards": backwards,
    "noise": noisy,
    "blur": blurred,
}


def rendered(
    count: int, first: int, pace: float = 1.0, without: str | None = None
) -> tuple[np.ndarray, list[str]]:
    """`count` rendered clips with captions, through all attributes in turn, of keys from `first` on.

    Args:
        pace: speed over that of the caption.
        without: a colour that is shown as another one, though captions name it: a mode that is missing.
    """
    everything = shapes.all_attributes()
    said = [everything[i % len(everything)] for i in range(count)]
    others = [c for c in shapes.COLOURS if c != without]
    shown = [
        dataclasses.replace(a, colour=others[i % len(others)]) if a.colour == without else a
        for i, a in enumerate(said)
    ]
    frames = np.stack([shapes.render(a, first + i, pace) for i, a in enumerate(shown)])
    return frames, [shapes.caption(a) for a in said]
