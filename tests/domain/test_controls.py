"""Controls: slowed, stilled and equalised clips move as they say."""

import numpy as np
import pytest

from distill_bench.domain import controls, shapes


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return controls.rendered(36, 0, kind="free")[0]


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.75, 1.0])
def test_slowed_clips_move_at_the_factor_of_their_speed(frames, factor):
    slow = controls.slowed(frames, factor=factor)
    assert slow.shape == frames.shape and slow.dtype == np.uint8
    expected = factor * shapes.velocity(frames)
    assert shapes.velocity(slow) == pytest.approx(expected, abs=0.06)
    if factor == 1:
        assert (slow == frames).all()


def test_stilled_clips_are_a_random_share_and_the_others_do_not_change(frames):
    still = controls.stilled(frames, 0, 0.25)
    changed = (still != frames).any((1, 2, 3, 4))
    assert (still[changed] == controls.frozen(frames)[changed]).all()
    repeated = (np.diff(still.astype(int), axis=1) == 0).all((1, 2, 3, 4))
    assert repeated.sum() >= 9 and changed.sum() <= 9
    assert (controls.stilled(frames, 1, 0.25) != still).any(), "the seed chooses the clips"


@pytest.mark.parametrize(("by", "error"), [("rendering", 0.03), ("displacing frames", 0.09)])
def test_equalised_clips_of_a_caption_have_one_speed_and_the_same_mean(frames, by, error):
    """Displaced frames are interpolated, which costs the oracle some precision."""
    equal, prompts = controls.rendered(36, 0, kind="free", equalised=True)
    if by == "displacing frames":
        equal = controls.equalised(frames, prompts)
    speed, own = shapes.centroid_speed(equal), shapes.centroid_speed(frames)
    for prompt in set(prompts):
        clips = [i for i, other in enumerate(prompts) if other == prompt]
        assert np.ptp(speed[clips]) < error < 0.1 * np.ptp(own)
        assert speed[clips].mean() == pytest.approx(own[clips].mean(), abs=error)
    angles = (np.arctan2(*shapes.velocity(x).T) for x in (equal, frames))
    turned = np.subtract(*angles)[own > 0.3]
    assert np.cos(turned).min() > 0.95, "headings do not change"


def test_jittered_clips_stay_in_place(frames):
    still = np.stack(
        [
            shapes.render(a, 0, motion=shapes.Motion((1.0, 0.0), 0.0))
            for a in shapes.all_attributes("free")
        ]
    )
    jittered = controls.jittered(still)
    assert shapes.centroid_speed(jittered).mean() < 0.06
    steps = np.abs(np.diff(jittered.astype(int), axis=1)).mean()
    assert steps > 0.5, "but frames differ"
