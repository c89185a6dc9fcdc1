"""Corrupted clips: controls that evaluators must rank below the originals.

Frames are uint8 (N, T, 3, H, W).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from distill_bench.domain import shapes

# (frames, seed) -> damaged frames, both uint8 (N, T, 3, H, W)
Damage = Callable[[np.ndarray, int], np.ndarray]


def frozen(frames: np.ndarray, seed: int = 0) -> np.ndarray:
    """Clips that repeat their middle frame."""
    middle = frames.shape[1] // 2
    return np.repeat(frames[:, middle : middle + 1], frames.shape[1], 1)


def shuffled(frames: np.ndarray, seed: int = 0) -> np.ndarray:
    """Frames of each clip in a random order other than the original."""
    rng = np.random.default_rng(seed)
    clips = np.empty_like(frames)
    original = np.arange(frames.shape[1])
    for i, clip in enumerate(frames):
        order = original
        while len(original) > 1 and (order == original).all():
            order = rng.permutation(len(original))
        clips[i] = clip[order]
    return clips


def backwards(frames: np.ndarray, seed: int = 0) -> np.ndarray:
    """Clips played in reverse."""
    return np.ascontiguousarray(frames[:, ::-1])


def uniform_noise(frames: np.ndarray, seed: int = 0) -> np.ndarray:
    """Uniform noise in the shape of the clips."""
    return np.random.default_rng(seed).integers(0, 256, frames.shape, dtype=np.uint8)


def noisy(frames: np.ndarray, seed: int = 0, sd: float = 0.1) -> np.ndarray:
    """Clips with Gaussian noise of standard deviation `sd`, a fraction of the value range."""
    noise = np.random.default_rng(seed).normal(0, 255 * sd, frames.shape)
    return np.clip(np.rint(frames + noise), 0, 255).astype(np.uint8)


def blurred(frames: np.ndarray, seed: int = 0, sigma: float = 1.5) -> np.ndarray:
    """Clips with a Gaussian blur of `sigma` pixels in each frame."""
    from scipy.ndimage import gaussian_filter  # only few controls need scipy

    soft = gaussian_filter(frames.astype(np.float32), (0, 0, 0, sigma, sigma), mode="nearest")
    return np.clip(np.rint(soft), 0, 255).astype(np.uint8)


def slowed(frames: np.ndarray, seed: int = 0, factor: float = 0.5) -> np.ndarray:
    """Clips played at `factor` of their speed around the middle of the clip, by blending frames.

    Blending softens the edges of what moves. On the embedded domain, `rendered` at a lower pace
    slows clips without this.
    """
    last = frames.shape[1] - 1
    time = last / 2 + factor * (np.arange(last + 1) - last / 2)
    before = np.minimum(time.astype(int), max(last - 1, 0))
    share = (time - before)[:, None, None, None]
    return np.stack(
        [
            np.rint((1 - share) * clip[before] + share * clip[before + 1]).astype(np.uint8)
            for clip in frames
        ]
    )


def stilled(frames: np.ndarray, seed: int = 0, share: float = 0.25) -> np.ndarray:
    """Clips of which a random share repeat their middle frame."""
    chosen = random_share(len(frames), seed, share)
    clips = frames.copy()
    clips[chosen] = frozen(frames[chosen])
    return clips


def random_share(count: int, seed: int = 0, share: float = 0.25) -> np.ndarray:
    """Indices of a random share of `count` clips."""
    return np.random.default_rng(seed).permutation(count)[: round(share * count)]


def jittered(frames: np.ndarray, seed: int = 0, sd: float = 0.15) -> np.ndarray:
    """Clips whose frames are displaced by Gaussian offsets of `sd` pixels, as sampled clips are."""
    offsets = np.random.default_rng(seed).normal(0, sd, (*frames.shape[:2], 2))
    return _displaced(frames, offsets)


def equalised(frames: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Clips of moving shapes whose bodies all have the mean speed of the clips of their prompt.

    The frames of a clip are displaced along its heading, so that the mean speed of a prompt stays
    and its spread vanishes. A body that stands still moves towards its nose.
    """
    velocity = shapes.velocity(frames)
    speed = np.hypot(*velocity.T)
    mean = prompt_means(speed, prompts)
    noses = np.array([shapes.DIRECTIONS[str(a.direction)] for a in shapes.read(frames)])
    still = (speed < shapes.STILL_BELOW)[:, None]
    heading = np.where(still, noses, velocity / np.maximum(speed, 1e-6)[:, None])
    drift = (mean[:, None] * heading - velocity)[:, None, ::-1]  # (N, 1, 2): y, x
    time = np.arange(frames.shape[1]) - (frames.shape[1] - 1) / 2
    return _displaced(frames, drift * time[:, None])


def prompt_means(values: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """For each clip (N,), the mean of the values (N,) of the clips of its prompt."""
    names = np.array(prompts)
    return np.array([values[names == name].mean() for name in prompts])


def _displaced(frames: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Clips whose frames are displaced by offsets (N, T, 2), in pixels down and to the right."""
    from scipy.ndimage import shift  # only few controls need scipy

    moved = np.empty_like(frames)
    for clip, frame in np.ndindex(*frames.shape[:2]):
        offset = (0, *offsets[clip, frame])
        soft = shift(frames[clip, frame].astype(np.float32), offset, order=1, mode="nearest")
        moved[clip, frame] = np.rint(soft)
    return moved


# reference rows that are made from the teacher's clips of any domain; a teacher may make them in
# another way, and add to them (`distill_bench.teachers.kinds.Pipeline.controls`)
CONTROL_ROWS: dict[str, Damage] = {
    "frozen": frozen,
    "slowed": slowed,
    "stilled": stilled,
    "jittered": jittered,
    "shuffled": shuffled,
    "noise": uniform_noise,
}

CORRUPTIONS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "frozen": frozen,
    "shuffled": shuffled,
    "backwards": backwards,
    "jitter": jittered,
    "noise": noisy,
    "blur": blurred,
}


def rendered(
    count: int,
    first: int,
    pace: float = 1.0,
    without: str | None = None,
    kind: str = "named",
    equalised: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """Rendered clips (N, T, 3, H, W) and their captions, cycling through all captions of a kind.

    Args:
        count: number of clips, N.
        first: key of the first clip; the others follow.
        pace: speed relative to the caption's.
        without: a colour that captions name but no clip shows, to simulate a lost mode; these
            clips are rendered in the other colours.
        kind: kind of the captions, one of shapes.KINDS.
        equalised: give all clips of a caption their mean speed. No mean of speeds changes.
    """
    every = shapes.all_attributes(kind)
    captioned = [every[i % len(every)] for i in range(count)]
    others = [colour for colour in shapes.COLOURS if colour != without]
    shown = [
        dataclasses.replace(a, colour=others[i % len(others)]) if a.colour == without else a
        for i, a in enumerate(captioned)
    ]
    motions: list[shapes.Motion | None] = [None] * count
    if equalised:
        drawn = [shapes.draw_motion(a, first + i) for i, a in enumerate(captioned)]
        speeds = np.array([motion.speed for motion in drawn])
        means = [speeds[i % len(every) :: len(every)].mean() for i in range(count)]
        motions = [shapes.Motion(m.heading, mean) for m, mean in zip(drawn, means, strict=True)]
    frames = np.stack(
        [
            shapes.render(a, first + i, pace, motion)
            for i, (a, motion) in enumerate(zip(shown, motions, strict=True))
        ]
    )
    return frames, [shapes.caption(a) for a in captioned]
