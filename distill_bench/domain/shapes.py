"""Moving shapes: captioned clips whose colour, shape, heading and speed are known exactly.

A clip is 8 frames of 32x32: one anti-aliased body on a dark background. A white nose on its leading
side shows its heading, even if the body stands still. Without this cue, networks learn the sign of
the direction last, because it is a parity of caption, time and position.

Captions come in three kinds. `named` ones fix direction and speed. `direction` ones leave the speed
free: "moving left" includes bodies that stand still with the nose to the left. `free` ones leave
the whole motion free: any heading in [0, 2 pi).
"""

import colorsys
import itertools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

FRAMES, SIZE, FPS = 8, 32, 8
# hues in [0, 1)
COLOURS = {
    "red": 0.0,
    "yellow": 1 / 6,
    "green": 2 / 6,
    "cyan": 3 / 6,
    "blue": 4 / 6,
    "magenta": 5 / 6,
}
SHAPES = ("circle", "square", "triangle")
# (x, y), y pointing down
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"still": 0.0, "slow": 0.6, "fast": 1.8}  # pixels per frame
ADVERBS = {"slow": "slowly", "fast": "quickly"}
# A speed that the caption leaves free is 0 with this probability, else log-uniform in the range.
# At its lower end a body travels 2.8 pixels in a clip, most of a latent cell of mini-wan (4 pixels)
# and many times the jitter of sampled bodies, so that still clips and moving ones are two modes. At
# its upper end a body travels 14 pixels; the largest body has 15.4 pixels of room.
STILL_SHARE = 0.25
FREE_SPEEDS = (0.4, 2.0)  # pixels per frame
STILL_BELOW = FREE_SPEEDS[0] / 2  # pixels per frame; clips of free speed below it count as still
KINDS = ("named", "direction", "free")  # of captions, from all motion named to none
FIELDS = ("colour", "shape", "direction", "speed")  # of attributes
NOSE = 1.6  # radius in pixels
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Attributes:
    """Attributes of a clip, as its caption names them; None where the caption leaves them free.

    A caption that names the speed also names the direction.
    """

    colour: str
    shape: str
    direction: str | None = None
    speed: str | None = None

    @property
    def kind(self) -> str:
        """Kind of the caption, one of KINDS."""
        return "named" if self.speed else "direction" if self.direction else "free"

    def named(self) -> dict[str, str]:
        """The attributes that the caption names, by field."""
        return {k: v for k, v in vars(self).items() if v is not None}


@dataclass(frozen=True)
class Motion:
    """Heading of the nose and speed of a body."""

    heading: tuple[float, float]  # unit vector (x, y), y pointing down
    speed: float  # pixels per frame


def all_attributes(kind: str = "named") -> list[Attributes]:
    """All attributes of one kind of caption: 216 named, 72 direction, 18 free."""
    axes = {"named": (DIRECTIONS, SPEEDS), "direction": (DIRECTIONS,), "free": ()}[kind]
    return [Attributes(*values) for values in itertools.product(COLOURS, SHAPES, *axes)]


def caption(attributes: Attributes) -> str:
    """Caption of a clip.

    named: "a red circle moving left slowly", "a red circle facing left standing still";
    direction: "a red circle moving left"; free: "a red circle".
    """
    a = attributes
    body = f"a {a.colour} {a.shape}"
    if a.direction is None:
        return body
    if a.speed is None:
        return f"{body} moving {a.direction}"
    if a.speed == "still":
        return f"{body} facing {a.direction} standing still"
    return f"{body} moving {a.direction} {ADVERBS[a.speed]}"


_CAPTIONS = {caption(a): a for kind in KINDS for a in all_attributes(kind)}


def parse(text: str) -> Attributes:
    """Attributes named by a caption.

    Raises:
        ValueError: if the text is not a caption of this domain.
    """
    try:
        return _CAPTIONS[re.sub(r"[\s,]+", " ", text.strip().lower())]
    except KeyError:
        raise ValueError(f"not a caption of moving shapes: {text!r}") from None


def are_captions(texts: Iterable[str]) -> bool:
    """True if every text is a caption of this domain."""
    try:
        return all(map(parse, texts))
    except ValueError:
        return False


def draw_motion(attributes: Attributes, key: int) -> Motion:
    """Motion of the clip of these attributes and key: named by the caption, or drawn."""
    rng = np.random.Generator(np.random.Philox(key=[key, 0x307104]))
    turn, moves, rank = rng.uniform(size=3)
    heading = (math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn))
    if attributes.direction is not None:
        heading = DIRECTIONS[attributes.direction]
    if attributes.speed is not None:
        return Motion(heading, SPEEDS[attributes.speed])
    slowest, fastest = FREE_SPEEDS
    return Motion(heading, 0.0 if moves < STILL_SHARE else slowest * (fastest / slowest) ** rank)


def render(
    attributes: Attributes, key: int, pace: float = 1.0, motion: Motion | None = None
) -> np.ndarray:
    """The clip of these attributes and key, uint8 (T, 3, H, W).

    Args:
        key: seeds position, size, brightness and background, the 5 % by which a named speed
            varies, and the motion that the caption leaves free.
        pace: speed relative to the caption's.
        motion: replaces the motion that the caption names or leaves free.
    """
    rng = np.random.Generator(np.random.Philox(key=[key, 0x5A4E5]))
    radius = rng.uniform(5.0, 6.2)
    background = rng.uniform(0.05, 0.15)
    value = rng.uniform(0.85, 1.0)
    variation = rng.uniform(0.95, 1.05)
    if motion is not None or attributes.speed is None:
        variation = 1.0
    motion = motion or draw_motion(attributes, key)
    heading = np.array(motion.heading, float)
    step = heading * motion.speed * pace * variation
    margin = radius + NOSE + 0.5
    travel = step * (FRAMES - 1)
    low, high = margin - np.minimum(travel, 0), SIZE - margin - np.maximum(travel, 0)
    start = low + (high - low) * rng.uniform(size=2)
    grid = (np.arange(SIZE * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    yy, xx = np.meshgrid(grid, grid, indexing="ij")
    rgb = np.array(colorsys.hsv_to_rgb(COLOURS[attributes.colour], 1.0, value))
    frames = np.empty((FRAMES, SIZE, SIZE, 3))
    for t in range(FRAMES):
        x, y = start + step * t
        body = _cover(_inside(attributes.shape, xx - x, yy - y, radius))
        tip = np.hypot(xx - x - heading[0] * radius, yy - y - heading[1] * radius)
        nose = _cover(tip < NOSE)
        frame = np.full((SIZE, SIZE, 3), background)
        frame += body[..., None] * (rgb - frame)
        frame += nose[..., None] * (1.0 - frame)
        frames[t] = frame
    return np.rint(frames * 255).astype(np.uint8).transpose(0, 3, 1, 2)


def read(clips: np.ndarray) -> list[Attributes]:
    """Read the attributes off clips, uint8 (N, T, 3, H, W): all of them, in the words of captions.

    Headings become the nearest direction and speeds the nearest named one. A clip without a body
    gets arbitrary attributes.
    """
    mask, rgb = _body(clips)
    centre = _centroid(mask)  # (N, T, 2) x, y
    hue = _hue(
        (rgb * mask[:, :, None]).sum((1, 3, 4)) / np.maximum(mask.sum((1, 2, 3))[:, None], 1e-6)
    )
    names = list(COLOURS)
    colours = np.rint(hue * 6).astype(int) % 6
    shape = _shape(mask, centre)
    white = _whiteness(clips)
    nose = _centroid(white) - centre
    nose = np.where((white.sum((2, 3)) > 0.5)[..., None], nose, 0).mean(1)
    speed = centroid_speed(clips)
    moved = centre[:, -1] - centre[:, 0]
    speeds = np.where(speed < 0.25, 0, np.where(speed < 1.1, 1, 2))
    # the direction of motion, or of the nose if the body stands still
    towards = np.where((speeds > 0)[:, None], moved, nose)
    axes = np.array(list(DIRECTIONS.values()), float)
    directions = (towards @ axes.T).argmax(1)
    return [
        Attributes(names[c], SHAPES[s], list(DIRECTIONS)[d], list(SPEEDS)[v])
        for c, s, d, v in zip(colours, shape, directions, speeds, strict=True)
    ]


def velocity(clips: np.ndarray) -> np.ndarray:
    """Velocity (x, y) of the body in pixels per frame, y pointing down, (N, 2).

    The slope of a line fitted to its centroids; 0 for a clip without a body.
    """
    centre = _centroid(_body(clips)[0])
    t = np.arange(clips.shape[1]) - (clips.shape[1] - 1) / 2
    return (centre * t[:, None]).sum(1) / (t**2).sum()


def centroid_speed(clips: np.ndarray) -> np.ndarray:
    """Speed of the body in pixels per frame, (N,): the length of its `velocity`."""
    return np.hypot(*velocity(clips).T)


def _inside(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    if shape == "circle":
        return np.hypot(x, y) < radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < radius * 0.9
    return (y < radius * 0.75) & (abs(x) * 1.75 < y + radius)  # apex above


def _cover(mask: np.ndarray) -> np.ndarray:
    s = SUPERSAMPLING
    return mask.reshape(SIZE, s, SIZE, s).mean((1, 3))


def _rgb(clips: np.ndarray) -> np.ndarray:
    return clips.astype(np.float32) / 255


def _body(clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Soft mask of the coloured body, (N, T, H, W) in [0, 1], and the clip in floats."""
    rgb = _rgb(clips)
    chroma = rgb.max(2) - rgb.min(2)
    mask = np.clip((chroma - 0.3) / 0.4, 0, 1)
    return mask, rgb


def _whiteness(clips: np.ndarray) -> np.ndarray:
    return np.clip((_rgb(clips).min(2) - 0.45) / 0.3, 0, 1)


def _centroid(mask: np.ndarray) -> np.ndarray:
    axis = np.arange(mask.shape[-1]) + 0.5
    total = np.maximum(mask.sum((2, 3)), 1e-6)
    x, y = (mask.sum(2) @ axis) / total, (mask.sum(3) @ axis) / total
    empty = mask.sum((2, 3)) < 1e-3
    return np.where(empty[..., None], mask.shape[-1] / 2, np.stack([x, y], -1))


def _hue(rgb: np.ndarray) -> np.ndarray:
    return np.array([colorsys.rgb_to_hsv(*np.clip(c, 0, 1))[0] for c in rgb.astype(float)])


def _shape(mask: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Index in SHAPES (N,) of the rendered template that overlaps best, over all frames."""
    axis = np.arange(mask.shape[-1], dtype=np.float32) + 0.5
    x = abs(axis[None, None, None, :] - centre[..., 0, None, None].astype(np.float32))
    y = axis[None, None, :, None] - centre[..., 1, None, None].astype(np.float32)
    size = np.einsum("ntij,ntij->n", mask, mask)
    mask = mask.astype(np.float32)
    best = np.full((len(mask), len(SHAPES)), -np.inf)
    for dy in (-0.8, 0.0, 0.8):
        for s, shape in enumerate(SHAPES):
            depth = _depth(shape, x, y - np.float32(dy))
            for radius in np.arange(4.4, 6.81, 0.2):
                # coverage with edges one pixel wide
                soft = np.clip(depth(np.float32(radius)) + np.float32(0.5), 0, 1)
                overlap = np.einsum("ntij,ntij->n", mask, soft)
                area = np.einsum("ntij,ntij->n", soft, soft)
                best[:, s] = np.maximum(best[:, s], overlap / np.sqrt(size * area + 1e-9))
    return best.argmax(1)


def _depth(shape: str, x: np.ndarray, y: np.ndarray) -> Callable[[np.float32], np.ndarray]:
    """Depth of the points (|x|, y) inside a shape, in pixels, as a function of its radius."""
    if shape == "circle":
        distance = np.sqrt(x**2 + y**2)
        return lambda radius: radius - distance
    if shape == "square":
        distance = np.maximum(x, abs(y))
        return lambda radius: radius * np.float32(0.9) - distance
    apex = y - x * np.float32(1.75)
    return lambda radius: np.minimum(radius * np.float32(0.75) - y, (apex + radius) / 2)
