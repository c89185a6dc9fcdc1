"""Moving shapes: captions, rendering from a key, and the oracle that reads clips back."""

import hashlib

import numpy as np
import pytest

from distill_bench.domain import shapes

EVERY = shapes.all_attributes()


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    return np.stack([shapes.render(a, 7_000 + i) for i, a in enumerate(EVERY)])


def accuracy(clips: np.ndarray) -> np.ndarray:
    """Share of the clips whose attribute is read correctly, one value per field."""
    pairs = zip(shapes.read(clips), EVERY, strict=True)
    return np.mean(
        [[getattr(r, f) == getattr(a, f) for f in shapes.FIELDS] for r, a in pairs], axis=0
    )


def test_captions_are_distinct_and_parse_back():
    captions = [shapes.caption(a) for a in EVERY]
    assert len(set(captions)) == len(EVERY) == 6 * 3 * 4 * 3
    assert [shapes.parse(c) for c in captions] == EVERY


def test_parse_forgives_case_spaces_and_commas():
    expected = shapes.Attributes("red", "circle", "left", "still")
    assert shapes.parse(" A red circle facing left, standing  still ") == expected


def test_parse_refuses_text_that_is_not_a_caption():
    for text in ("a red dog", "a red circle moving", "a red circle standing still"):
        with pytest.raises(ValueError, match=text):
            shapes.parse(text)


def test_captions_leave_speed_or_all_motion_free():
    direction, free = shapes.all_attributes("direction"), shapes.all_attributes("free")
    assert (len(direction), len(free)) == (72, 18)
    parsed = shapes.parse("a red circle moving left")
    assert (parsed.kind, parsed.direction, parsed.speed) == ("direction", "left", None)
    assert shapes.parse("a red circle").named() == {"colour": "red", "shape": "circle"}
    for kind in shapes.KINDS:
        every = shapes.all_attributes(kind)
        assert [shapes.parse(shapes.caption(a)) for a in every] == every
        assert {a.kind for a in every} == {kind}


def test_named_clips_do_not_change():
    """Clips of earlier runs and references are rendered again from their captions and seeds."""
    every = np.stack([shapes.render(a, i) for i, a in enumerate(EVERY)])
    digest = "b0df75394c777f46028b3eeda91c7d7500815aa4799e08aac69fa545f551e913"
    assert hashlib.sha256(every.tobytes()).hexdigest() == digest


def test_free_motion_has_its_documented_distribution():
    free = shapes.Attributes("red", "circle")
    motions = [shapes.draw_motion(free, key) for key in range(4000)]
    speeds = np.array([motion.speed for motion in motions])
    moving = speeds[speeds > 0]
    assert np.mean(speeds == 0) == pytest.approx(shapes.STILL_SHARE, abs=0.02)
    low, high = np.log(shapes.FREE_SPEEDS)
    # Kolmogorov-Smirnov distance to the uniform distribution, far above its 1 % quantile 0.03
    ranks = np.sort((np.log(moving) - low) / (high - low))
    assert np.abs(ranks - np.linspace(0, 1, len(ranks))).max() < 0.04
    headings = np.array([motion.heading for motion in motions])
    assert np.allclose(np.hypot(*headings.T), 1)
    for moments in (headings, headings**2 - 0.5, headings[:, :1] * headings[:, 1:]):
        assert np.abs(moments.mean(0)).max() < 0.04


def test_the_oracle_reads_free_motion_as_a_vector():
    chosen = [shapes.all_attributes(kind)[i] for kind in shapes.KINDS[1:] for i in range(18)]
    clips = np.stack([shapes.render(a, 100 + i) for i, a in enumerate(chosen)])
    motions = [shapes.draw_motion(a, 100 + i) for i, a in enumerate(chosen)]
    expected = np.array([np.multiply(m.heading, m.speed) for m in motions])
    assert np.abs(shapes.velocity(clips) - expected).max() < 0.08
    still = [m.speed == 0 for m in motions]
    assert (shapes.centroid_speed(clips) < shapes.STILL_BELOW).tolist() == still
    assert 0 < sum(still) < len(still)


def test_a_still_body_of_free_speed_faces_the_named_direction():
    left = shapes.parse("a red circle moving left")
    key = next(key for key in range(100) if shapes.draw_motion(left, key).speed == 0)
    clip = shapes.render(left, key)
    assert (clip == clip[:1]).all()
    assert shapes.read(clip[None])[0].direction == "left"


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
