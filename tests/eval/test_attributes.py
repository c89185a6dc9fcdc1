"""Attribute accuracy: right on data, wrong on other captions, frozen clips and noise."""

import dataclasses

import numpy as np
import pytest

from distill_bench.domain import controls, shapes
from distill_bench.eval.attributes import AttributeAccuracy, histogram_distance
from distill_bench.evaluator import Clips


def clips() -> Clips:
    chosen = shapes.all_attributes()[::6] * 2
    frames = np.stack([shapes.render(a, i) for i, a in enumerate(chosen)])
    return Clips(frames, [shapes.caption(a) for a in chosen], list(range(len(chosen))))


def values(sample: Clips) -> dict[str, float]:
    return {score.column: score.value for score in AttributeAccuracy().scores(sample, {})}


def test_data_is_right_and_captions_of_other_clips_are_wrong():
    sample = clips()
    assert values(sample)["attribute_accuracy"] == 1
    assert values(sample)["attribute_histogram"] == 0
    shifted = dataclasses.replace(sample, prompts=[*sample.prompts[1:], sample.prompts[0]])
    assert values(shifted)["attribute_accuracy"] == 0
    assert values(shifted)["attribute_histogram"] == 0, "the same captions in another order"


def test_a_missing_mode_shows_in_the_histogram():
    sample = clips()
    red = np.flatnonzero([" red " in prompt for prompt in sample.prompts])
    only_red = sample.frames[np.resize(red, len(sample.frames))]
    assert values(dataclasses.replace(sample, frames=only_red))["attribute_histogram"] > 0.2


def test_the_histogram_distance_is_the_share_of_values_to_change():
    assert histogram_distance(["a", "a", "b", "b"], ["a", "a", "a", "c"]) == 0.5


def test_known_good_is_above_known_bad():
    sample = clips()
    noise = np.random.default_rng(0).integers(0, 256, sample.frames.shape, dtype=np.uint8)
    worse_and_worse = [sample.frames, controls.frozen(sample.frames), noise]
    accuracy = [
        values(dataclasses.replace(sample, frames=frames))["attribute_accuracy"]
        for frames in worse_and_worse
    ]
    assert accuracy == sorted(accuracy, reverse=True) and accuracy[2] < 0.1


def test_only_named_attributes_count():
    chosen = [*shapes.all_attributes()[::6], *shapes.all_attributes("direction")[::6]]
    free = shapes.all_attributes("free")
    frames = np.stack([shapes.render(a, i) for i, a in enumerate([*chosen, *free])])
    prompts = [shapes.caption(a) for a in [*chosen, *free]]
    sample = Clips(frames, prompts, list(range(len(prompts))))
    scores = {score.column: score for score in AttributeAccuracy().scores(sample, {})}
    assert scores["attribute_accuracy"].value == 1 and scores["attribute_histogram"].value == 0
    assert scores["attribute_speed"].note == "over the 36 of 66 clips whose captions name the speed"
    assert scores["attribute_speed"].per_clip is None and scores["attribute_shape"].per_clip
    wrong = dataclasses.replace(
        sample, frames=np.concatenate([frames[:-18], np.roll(frames[-18:], 1, 0)])
    )
    assert values(wrong)["attribute_accuracy"] == 48 / 66
    assert values(wrong)["attribute_direction"] == 1


def test_a_caption_without_motion_scores_no_motion():
    free = shapes.all_attributes("free")
    frames = np.stack([shapes.render(a, i) for i, a in enumerate(free)])
    sample = Clips(frames, [shapes.caption(a) for a in free], list(range(len(free))))
    assert set(values(sample)) == {
        "attribute_accuracy",
        "attribute_colour",
        "attribute_shape",
        "attribute_histogram",
    }
    blue = dataclasses.replace(
        sample, prompts=[text.replace("red", "blue") for text in sample.prompts]
    )
    share = np.mean([" red " in text for text in sample.prompts])
    # the mean over colour and shape, the attributes that captions name
    assert values(blue)["attribute_histogram"] == pytest.approx(share / 2)


def test_the_histogram_score_is_the_mean_over_the_attributes():
    """Clips of which half show the other colour: the other attributes are right."""
    red = [a for a in shapes.all_attributes() if a.colour == "red"]
    frames = np.stack([shapes.render(a, i) for i, a in enumerate(red)])
    captions = [shapes.caption(a) for a in red]
    half = len(red) // 2
    asked = captions[:half] + [text.replace("red", "blue") for text in captions[half:]]
    found = values(Clips(frames, asked, list(range(len(red)))))
    assert found["attribute_colour"] == half / len(red)
    assert found["attribute_shape"] == 1
    share = (len(red) - half) / len(red)
    assert found["attribute_histogram"] == pytest.approx(share / len(shapes.FIELDS))


def test_an_attribute_that_some_captions_name_has_the_standard_error_of_their_share():
    named, free = shapes.all_attributes()[::7], shapes.all_attributes("free")[:10]
    frames = np.stack([shapes.render(a, i) for i, a in enumerate([*named, *free])])
    moving = [i for i, a in enumerate(named) if a.speed != "still"]
    frames[moving[:9]] = controls.frozen(frames[moving[:9]])
    prompts = [shapes.caption(a) for a in [*named, *free]]
    scores = AttributeAccuracy().scores(Clips(frames, prompts, list(range(len(prompts)))), {})
    (score,) = (score for score in scores if score.column == "attribute_speed")
    right = score.value
    assert right == pytest.approx(1 - 9 / len(named))
    assert score.sd == pytest.approx((right * (1 - right) / len(named)) ** 0.5)
    (histogram,) = (score for score in scores if score.column == "attribute_histogram")
    assert histogram.value == pytest.approx(9 / len(named) / len(shapes.FIELDS))
