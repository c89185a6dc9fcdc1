"""Diversity, fidelity of the picture and attributes: each known way of going wrong moves its own number."""

import dataclasses

import numpy as np
import pytest
import torch

from distill_bench.domain import controls, shapes
from distill_bench.eval.attributes import AttributeAccuracy, histogram_distance
from distill_bench.eval.diversity import Diversity, recall_and_coverage, same_prompt_spread
from distill_bench.eval.fidelity import Fidelity, frame_statistics
from distill_bench.evaluator import Clips


def clips(first: int = 0, prompts: int = 36) -> Clips:
    """Two clips a prompt."""
    everything = shapes.all_attributes()[:: len(shapes.all_attributes()) // prompts][:prompts]
    said = [*everything, *everything]
    frames = np.stack([shapes.render(a, first + i) for i, a in enumerate(said)])
    return Clips(frames, [shapes.caption(a) for a in said], list(range(first, first + len(said))))


def scores(evaluator, some: Clips, *reference: Clips) -> dict[str, object]:
    return {
        score.column: score
        for score in evaluator.scores(some, dict(zip(["teacher"], reference, strict=False)))
    }


def test_a_student_of_one_clip_a_prompt_loses_its_diversity_alone():
    some, teacher = clips(), clips(1000)
    half = len(some.frames) // 2
    collapsed = dataclasses.replace(some, frames=np.concatenate([some.frames[:half]] * 2))
    good, bad = scores(Diversity(), some, teacher), scores(Diversity(), collapsed, teacher)
    assert good["diversity_ratio"].value == pytest.approx(1, abs=0.2) and good["copies"].value == 0
    assert bad["diversity_ratio"].value == 0 and bad["copies"].value == 0.5
    assert bad["coverage"].value < good["coverage"].value
    assert scores(AttributeAccuracy(), collapsed)["attribute_accuracy"].value == 1
    assert good["diversity_ratio"].headline and good["diversity_ratio"].better == "one"


def test_coverage_and_recall_fall_with_missing_modes_and_with_noise():
    some, teacher = clips(), clips(1000)
    one_colour = [i for i, p in enumerate(some.prompts) if " red " in p]
    few = dataclasses.replace(some, frames=some.frames[np.resize(one_colour, len(some.frames))])
    noise = np.random.default_rng(0).integers(0, 256, some.frames.shape, dtype=np.uint8)
    rows = [
        scores(Diversity(), each, teacher)
        for each in (teacher, some, few, dataclasses.replace(some, frames=noise))
    ]
    coverage = [row["coverage"].value for row in rows]
    assert coverage[0] == 1 and coverage == sorted(coverage, reverse=True) and coverage[3] < 0.1
    assert rows[0]["recall"].value == 1 and rows[2]["recall"].value < rows[1]["recall"].value


def test_recall_and_coverage_of_points_on_a_line_are_counted_by_hand():
    """k = 1: the x reach 1 about themselves, the y 2; 0.5 lies within reach, 10.5 does not; near 0.5 there is an x."""
    x = torch.tensor([[0.0], [1.0]])
    y = torch.tensor([[0.5], [2.5], [10.5]])
    recall, coverage = recall_and_coverage(x, y, 1)
    assert recall.tolist() == [1, 0, 0]
    assert coverage.tolist() == [1, 1, 0] or coverage.tolist() == [1, 1, 1]
    assert recall_and_coverage(x, x, 1)[0].tolist() == [1, 1]


@pytest.mark.slow
def test_recall_and_coverage_say_where_clips_are_few_or_not_as_many():
    few, many, teacher = clips(prompts=12), clips(prompts=128), clips(1000, prompts=128)
    for score in (scores(Diversity(), few, teacher)[column] for column in ("recall", "coverage")):
        assert [
            "24 clips against 256" in score.warnings[0],
            "24 clips are few" in score.warnings[1],
        ] == [True, True]
    assert scores(Diversity(), many, teacher)["recall"].warnings == ()


def test_ratios_say_when_the_prompts_are_not_the_references_and_order_is_of_no_matter():
    some = clips(prompts=36)
    part, turned = (
        Clips(some.frames[order], [some.prompts[i] for i in order], [some.seeds[i] for i in order])
        for order in (np.arange(40), np.arange(len(some.prompts))[::-1])
    )
    for evaluator, ratios in (
        (Diversity(), ["diversity_ratio"]),
        (Fidelity(), ["saturation_ratio", "sharpness_ratio"]),
    ):
        for column in ratios:
            assert any(
                "not the reference's" in w for w in scores(evaluator, part, some)[column].warnings
            ), column
            assert scores(evaluator, turned, some)[column].warnings == (), column


def test_clips_whose_prompts_nobody_knows_are_not_of_one_prompt():
    some = clips(prompts=6)
    nameless = dataclasses.replace(some, prompts=[""] * len(some.prompts))
    assert "diversity" in scores(Diversity(), some) and "diversity" not in scores(
        Diversity(), nameless, nameless
    )


def test_the_spread_is_within_prompts_only():
    x = torch.tensor([0.0, 3.0, 100.0, 105.0, 7.0]).reshape(5, 1)
    assert same_prompt_spread(x, ["a", "a", "b", "b", "c"]).tolist() == [3, 5]
    assert same_prompt_spread(x, ["a", "b", "c", "d", "e"]) is None


def test_few_repeated_prompts_are_recorded_and_none_leave_the_ratio_out():
    some, teacher = clips(prompts=6), clips(1000, prompts=6)
    assert "only 6 prompts" in scores(Diversity(), some, teacher)["diversity_ratio"].warnings[0]
    single = dataclasses.replace(some, prompts=[str(i) for i in range(len(some.prompts))])
    assert "diversity_ratio" not in scores(Diversity(), single, teacher)


def test_saturation_contrast_and_sharpness_are_those_of_a_pattern():
    """Vertical stripes of black and red: the largest less the smallest channel is 255 on half of the pixels."""
    stripes = np.zeros((2, 2, 3, 8, 8), np.uint8)
    stripes[:, :, 0, :, ::2] = 255
    saturation, contrast, sharpness = frame_statistics(stripes).values()
    assert saturation.tolist() == [127.5, 127.5]
    assert contrast == pytest.approx([42.5, 42.5])
    assert sharpness == pytest.approx([170, 170])


@pytest.mark.parametrize(
    "corrupt, moved",
    [
        (controls.backwards, set()),
        (controls.shuffled, set()),
        (controls.blurred, {"contrast_ratio", "sharpness_ratio"}),
        (controls.noisy, {"saturation_ratio", "sharpness_ratio"}),
        (
            lambda f: (f // 2).astype(np.uint8),
            {"saturation_ratio", "contrast_ratio", "sharpness_ratio"},
        ),
        (
            lambda f: np.repeat(f.mean(2, keepdims=True).astype(np.uint8), 3, 2),
            {"saturation_ratio"},
        ),
    ],
)
def test_each_corruption_moves_its_own_ratio(corrupt, moved):
    some = clips(prompts=12)
    found = scores(Fidelity(), dataclasses.replace(some, frames=corrupt(some.frames)), some)
    ratios = {name: score.value for name, score in found.items() if name.endswith("_ratio")}
    assert {name for name, value in ratios.items() if abs(value - 1) > 0.1} == moved, ratios


def test_attributes_are_right_on_data_wrong_on_other_captions_and_counted_in_a_histogram():
    some = clips()
    assert scores(AttributeAccuracy(), some)["attribute_accuracy"].value == 1
    assert scores(AttributeAccuracy(), some)["attribute_histogram"].value == 0
    turned = dataclasses.replace(some, prompts=[*some.prompts[1:], some.prompts[0]])
    found = scores(AttributeAccuracy(), turned)
    assert found["attribute_accuracy"].value == 0 and found["attribute_histogram"].value == 0
    red = np.flatnonzero([" red " in p for p in some.prompts])
    only_red = dataclasses.replace(some, frames=some.frames[np.resize(red, len(some.frames))])
    assert scores(AttributeAccuracy(), only_red)["attribute_histogram"].value > 0.2
    assert histogram_distance(["a", "a", "b", "b"], ["a", "a", "a", "c"]) == 0.5


@pytest.mark.slow
def test_known_good_is_above_known_bad():
    some, teacher = clips(), clips(1000)
    noise = np.random.default_rng(0).integers(0, 256, some.frames.shape, dtype=np.uint8)
    sets = [some.frames, controls.frozen(some.frames), noise]
    accuracy = [
        scores(AttributeAccuracy(), dataclasses.replace(some, frames=f))["attribute_accuracy"].value
        for f in sets
    ]
    assert accuracy == sorted(accuracy, reverse=True) and accuracy[2] < 0.1
    away = [
        abs(
            scores(Fidelity(), dataclasses.replace(some, frames=f), teacher)[
                "saturation_ratio"
            ].value
            - 1
        )
        for f in (some.frames, noise)
    ]
    assert away[0] < 0.1 < away[1]
