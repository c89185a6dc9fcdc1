"""Diversity: collapse, missing modes and noise each move their own score."""

import dataclasses

import numpy as np
import pytest
import torch

from distill_bench.domain import shapes
from distill_bench.eval.attributes import AttributeAccuracy
from distill_bench.eval.diversity import Diversity, recall_and_coverage, same_prompt_spread
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


@pytest.mark.slow
def test_few_or_unequal_clips_carry_a_warning_on_recall_and_coverage():
    teacher = two_clips_per_prompt(1000, prompts=128)
    row = scores(two_clips_per_prompt(prompts=12), teacher)
    for column in ("recall", "coverage"):
        unequal, few = row[column].warnings
        assert "24 clips against 256" in unequal and "24 clips are few" in few
    assert scores(two_clips_per_prompt(prompts=128), teacher)["recall"].warnings == ()


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
