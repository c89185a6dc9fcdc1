"""Moving shapes: captions, rendering from a key, and the oracle that reads clips back."""

import numpy as np
import pytest

from distill_bench.domain import shapes

FIELDS = ("colour", "shape", "direction", "speed")
EVERY = shapes.all_attributes()


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    return np.stack([shapes.render(a, 7_000 + i) for i, a in enumerate(EVERY)])


def accuracy(clips: np.ndarray) -> np.ndarray:
    """Share of the clips whose attribute is read correctly, one value per field."""
    pairs = zip(shapes.read(clips), EVERY, strict=True)
    return np.mean([[getattr(r, f) == getattr(a, f) for f in FIELDS] for r, a in pairs], axis=0)


def test_captions_are_distinct_and_parse_back():
    captions = [shapes.caption(a) for a in EVERY]
    assert len(set(captions)) == len(EVERY) == 6 * 3 * 4 * 3
    assert [shapes.parse(c) for c in captions] == EVERY


def test_parse_forgives_case_spaces_and_commas():
    expected = shapes.Attributes("red", "circle", "left", "still")
    assert shapes.parse(" A red circle facing left, standing  still ") == expected


def test_parse_refuses_text_that_is_not_a_caption():
    with pytest.raises(ValueError, match="a red dog"):
        shapes.parse("a red dog")


def test_a_clip_depends_only_on_attributes_and_key():
    clip = shapes.render(EVERY[5], 3)
    np.random.seed(0)
    assert clip.shape == (shapes.FRAMES, 3, shapes.SIZE, shapes.SIZE)
    assert clip.dtype == np.uint8
    assert np.array_equal(clip, shapes.render(EVERY[5], 3))
    assert not np.array_equal(clip, shapes.render(EVERY[5], 4))


def test_the_body_stays_in_frame(clips: np.ndarray):
    border = np.concatenate(
        [clips[..., 0, :], clips[..., -1, :], clips[..., 0], clips[..., -1]], -1
    )
    assert border.max() <= 0.6 * 255, "the nose covers at most half of a border pixel"
    assert np.ptp(border, axis=2).max() == 0, "no colour reaches the border"


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_the_oracle_reads_what_was_rendered(clips: np.ndarray, noise: float):
    disturbed = clips + np.random.default_rng(0).normal(0, noise * 255, clips.shape)
    assert accuracy(disturbed.clip(0, 255).round().astype(np.uint8)).min() >= 0.99


@pytest.mark.slow
def test_the_oracle_reads_corrupted_clips_as_they_look(clips: np.ndarray):
    """Rotated, reversed and stopped clips are read as they look, not as their captions say."""

    def agreement(changed: np.ndarray, directions: list[str]) -> float:
        pairs = zip(shapes.read(changed), directions, strict=True)
        return np.mean([read.direction == direction for read, direction in pairs])

    # counter-clockwise, with y growing downwards
    turned = {"left": "down", "down": "right", "right": "up", "up": "left"}
    # not triangles: a turned triangle has its apex at another side
    turnable = [i for i, a in enumerate(EVERY) if a.shape != "triangle"]
    rotated = np.rot90(clips[turnable], axes=(-2, -1)).copy()
    assert agreement(rotated, [turned[EVERY[i].direction] for i in turnable]) >= 0.99
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    moving = [i for i, a in enumerate(EVERY) if a.speed != "still"]
    reversed_clips = clips[moving][:, ::-1]
    assert agreement(reversed_clips, [opposite[EVERY[i].direction] for i in moving]) >= 0.99
    stopped = shapes.read(np.repeat(clips[moving][:, :1], shapes.FRAMES, axis=1))
    assert {r.speed for r in stopped} == {"still"}


def test_speed_is_in_pixels_per_frame(clips: np.ndarray):
    measured = shapes.centroid_speed(clips)
    speeds = np.array([shapes.SPEEDS[a.speed] for a in EVERY])
    assert np.abs(measured - speeds).max() < 0.25
    for speed in shapes.SPEEDS.values():
        assert measured[speeds == speed].mean() == pytest.approx(speed, abs=0.06)


def test_reading_does_not_depend_on_the_batch(clips: np.ndarray):
    assert shapes.read(clips[:8]) == [shapes.read(c[None])[0] for c in clips[:8]]


@pytest.mark.parametrize("level", [0, 128, 255])
def test_clips_without_a_body_are_read_without_an_error(level: int):
    empty = np.full((2, shapes.FRAMES, 3, shapes.SIZE, shapes.SIZE), level, np.uint8)
    assert all(isinstance(r, shapes.Attributes) for r in shapes.read(empty))
    assert shapes.centroid_speed(empty).tolist() == [0, 0]
