"""Diversity: collapse, missing modes and noise each move their own score."""

import dataclasses

import numpy as np
import pytest
import torch

from distill_bench.domain import shapes
from distill_bench.eval import diversity
from distill_bench.eval.attributes import AttributeAccuracy
from distill_bench.eval.diversity import (
    Diversity,
    coarse,
    recall_and_coverage,
    same_prompt_spread,
    spread_ratio,
)
from distill_bench.evaluate.extractors import load_extractor
from distill_bench.evaluator import Clips


def two_clips_per_prompt(first: int = 0, prompts: int = 36) -> Clips:
    everything = shapes.all_attributes()
    chosen = everything[:: len(everything) // prompts][:prompts] * 2
    frames = np.stack([shapes.render(a, first + i) for i, a in enumerate(chosen)])
    seeds = list(range(first, first + len(chosen)))
    return Clips(frames, [shapes.caption(a) for a in chosen], seeds)


def scores(sample: Clips, teacher: Clips | None = None) -> dict[str, object]:
    references = {} if teacher is None else {"teacher": teacher}
    return {score.column: score for score in Diversity().scores(sample, references)}


def test_one_clip_per_prompt_loses_diversity_and_keeps_attributes():
    good, teacher = two_clips_per_prompt(), two_clips_per_prompt(1000)
    half = len(good.frames) // 2
    collapsed = dataclasses.replace(good, frames=np.concatenate([good.frames[:half]] * 2))
    good_row, collapsed_row = scores(good, teacher), scores(collapsed, teacher)
    assert abs(good_row["diversity_ratio"].value - 1) < 0.2 and good_row["copies"].value == 0
    assert collapsed_row["diversity_ratio"].value == 0 and collapsed_row["copies"].value == 0.5
    assert collapsed_row["coverage"].value < good_row["coverage"].value
    (accuracy, *_) = AttributeAccuracy().scores(collapsed, {})
    assert accuracy.column == "attribute_accuracy" and accuracy.value == 1
    assert good_row["diversity_ratio"].headline and good_row["diversity_ratio"].better == "one"


def test_coverage_and_recall_fall_with_missing_modes_and_coverage_with_noise():
    good, teacher = two_clips_per_prompt(), two_clips_per_prompt(1000)
    red = [i for i, prompt in enumerate(good.prompts) if " red " in prompt]
    only_red = dataclasses.replace(good, frames=good.frames[np.resize(red, len(good.frames))])
    noise = np.random.default_rng(0).integers(0, 256, good.frames.shape, dtype=np.uint8)
    worse_and_worse = [teacher, good, only_red, dataclasses.replace(good, frames=noise)]
    rows = [scores(sample, teacher) for sample in worse_and_worse]
    coverage = [row["coverage"].value for row in rows]
    assert coverage[0] == 1 and coverage == sorted(coverage, reverse=True) and coverage[3] < 0.1
    assert rows[0]["recall"].value == 1 and rows[2]["recall"].value < rows[1]["recall"].value


def test_recall_and_coverage_of_points_on_a_line():
    """With k = 1 the radius of each x is 1; the radii of the three y are 2, 2 and 8.

    Recall: only 0.5 is within 1 of an x. Coverage: 0.5 and 2.5 have an x within their radius, but
    10.5 is 9.5 away from the nearest x.
    """
    x = torch.tensor([[0.0], [1.0]])
    y = torch.tensor([[0.5], [2.5], [10.5]])
    recall, coverage = recall_and_coverage(x, y, 1)
    assert recall.tolist() == [1, 0, 0]
    assert coverage.tolist() == [1, 1, 0]
    assert recall_and_coverage(x, x, 1)[0].tolist() == [1, 1]


def test_a_point_at_the_radius_counts():
    """Recall: 2 is 1 from x = 1, whose radius is 1. Coverage: the radius of y = 2 is 1, too."""
    x = torch.tensor([[0.0], [1.0]])
    y = torch.tensor([[2.0], [3.0], [10.0]])
    recall, coverage = recall_and_coverage(x, y, 1)
    assert recall.tolist() == [1, 0, 0]
    assert coverage.tolist() == [1, 0, 0]


def test_few_or_unequal_clips_carry_a_warning_on_recall_and_coverage(monkeypatch):
    assert diversity.FEW_CLIPS == 256
    monkeypatch.setattr(diversity, "FEW_CLIPS", 24)
    many, few = two_clips_per_prompt(1000, prompts=18), two_clips_per_prompt(prompts=6)
    unequal = "{} clips against {} of the teacher: fewer clips lie farther apart".format
    for sample, teacher in ((many, few), (few, many)):
        row = scores(sample, teacher)
        for column in ("recall", "coverage"):
            assert row[column].warnings == (
                unequal(len(sample.prompts), len(teacher.prompts)),
                "12 clips are few: neighbours want 24",
            )
    enough = two_clips_per_prompt(prompts=12)
    assert scores(enough, enough)["recall"].warnings == ()
    assert scores(enough, many)["recall"].warnings == (unequal(24, 36),)


@pytest.mark.parametrize(
    ("clips", "teacher", "k"),
    [(3, 20, 2), (20, 4, 3), (4, 20, 3), (20, 20, 5)],
)
def test_neighbours_are_five_or_as_many_as_there_are(clips, teacher, k):
    sample, reference = (
        Clips(all_of.frames[:count], all_of.prompts[:count], all_of.seeds[:count])
        for all_of, count in (
            (two_clips_per_prompt(prompts=10), clips),
            (two_clips_per_prompt(1000, prompts=10), teacher),
        )
    )
    extractor = load_extractor(diversity.EXTRACTOR)
    expected = recall_and_coverage(extractor(sample), extractor(reference), k)
    found = scores(sample, reference)
    assert [found[name].value for name in ("recall", "coverage")] == [x.mean() for x in expected]


def test_a_ratio_of_other_prompts_carries_a_warning_and_one_of_another_order_does_not():
    teacher = two_clips_per_prompt()
    part, backwards = (
        Clips(
            teacher.frames[order],
            [teacher.prompts[i] for i in order],
            [teacher.seeds[i] for i in order],
        )
        for order in (np.arange(40), np.arange(len(teacher.prompts))[::-1])
    )
    warnings = scores(part, teacher)["diversity_ratio"].warnings
    assert any("not the reference's" in warning for warning in warnings)
    assert scores(backwards, teacher)["diversity_ratio"].warnings == ()


def test_clips_without_captions_have_no_spread_within_a_prompt():
    sample = two_clips_per_prompt(prompts=6)
    without = dataclasses.replace(sample, prompts=[""] * len(sample.prompts))
    assert "diversity" in scores(sample) and "diversity" not in scores(without, without)


def flat(*levels: int, prompts: str = "aabbcc", frames: int = 8) -> Clips:
    """One clip of constant brightness per level."""
    filled = np.zeros((len(levels), frames, 3, 32, 32), np.uint8)
    filled += np.array(levels, np.uint8)[:, None, None, None, None]
    return Clips(filled, list(prompts), list(range(len(levels))))


def test_differences_within_a_cell_of_8_x_8_are_noise():
    """In frames of 16 x 16, a chessboard of pixels has no spread, one of 2 x 2 pixels has."""
    pixels = np.indices((16, 16)).sum(0) % 2
    for pattern, spread in ((pixels, 0.0), (np.kron(pixels[:8, :8], np.ones((2, 2))), 100.0)):
        frames = np.zeros((2, 8, 3, 16, 16), np.uint8)
        frames[0], frames[1] = 100 * pattern, 100 * (1 - pattern)
        x = coarse(Clips(frames, ["a", "a"], [0, 1]))
        assert same_prompt_spread(x, ["a", "a"]) == pytest.approx(spread)


def test_spread_and_its_ratio_have_the_standard_error_over_prompts():
    """Pairs of clips are 4, 10 and 16 levels apart; the teacher's 8, 8 and 24."""
    sample, teacher = flat(0, 4, 0, 10, 0, 16), flat(0, 8, 0, 8, 0, 24)
    (copied, spread) = Diversity().scores(sample, {})
    assert (copied.column, spread.column) == ("copies", "diversity")
    assert (spread.value, spread.unit) == (pytest.approx(10, rel=1e-6), "of 255")
    error = np.std([4, 10, 16]) / 3**0.5
    assert spread.sd == pytest.approx(error, rel=1e-6)
    apart = np.array([4.0, 10.0, 16.0])
    (ratio,) = spread_ratio(sample, apart, teacher)
    assert ratio.value == pytest.approx(10 / (40 / 3), rel=1e-6)
    assert ratio.sd == pytest.approx(error / (40 / 3), rel=1e-6)


def test_a_teacher_with_little_spread_has_a_ratio_and_one_without_any_is_refused():
    sample, apart = flat(0, 4, 0, 10, 0, 16), np.array([4.0, 10.0, 16.0])
    (ratio,) = spread_ratio(sample, apart, flat(0, 1, 0, 0, 0, 0))
    assert ratio.value == pytest.approx(30, rel=1e-6)
    with pytest.raises(ValueError, match="one clip, copied: there is no spread"):
        spread_ratio(sample, apart, flat(0, 0, 5, 5, 9, 9))


def test_clips_of_another_length_than_the_teachers_are_refused():
    with pytest.raises(ValueError) as error:
        Diversity().scores(flat(0, 4, 0, 10, 0, 16, frames=6), {"teacher": flat(*range(6))})
    assert str(error.value) == (
        "the teacher reference has 8 frames of 32x32, the clips have 6 frames of 32x32; "
        "they must agree"
    )


def test_captions_that_only_one_side_has_are_named():
    apart = np.array([4.0, 10.0, 16.0])
    with_captions, partly = flat(0, 4, 0, 10, 0, 16), flat(0, 4, 0, 10, 0, 16)
    partly.prompts[0] = ""
    (ratio,) = spread_ratio(partly, apart, with_captions)
    assert "the clips have no captions" in ratio.warnings[1]
    (ratio,) = spread_ratio(with_captions, apart, partly)
    assert "the prompts are not the reference's" in ratio.warnings[1]


def test_a_clip_near_any_earlier_one_is_a_copy():
    """The next to it included."""
    (copied, *_) = Diversity().scores(flat(0, 0, 50, 99, 50, 98), {})
    assert copied.per_clip == (0, 1, 0, 0, 1, 0)


def test_the_spread_is_within_prompts_only():
    x = torch.tensor([0.0, 3.0, 100.0, 105.0, 7.0]).reshape(5, 1)
    assert same_prompt_spread(x, ["a", "a", "b", "b", "c"]).tolist() == [3, 5]
    assert same_prompt_spread(x, ["a", "b", "c", "d", "e"]) is None


def test_few_repeated_prompts_carry_a_warning_and_without_any_there_is_no_ratio():
    sample = two_clips_per_prompt(prompts=6)
    teacher = two_clips_per_prompt(1000, prompts=6)
    assert "only 6 prompts" in scores(sample, teacher)["diversity_ratio"].warnings[0]
    distinct = [str(i) for i in range(len(sample.prompts))]
    assert "diversity_ratio" not in scores(dataclasses.replace(sample, prompts=distinct), teacher)
