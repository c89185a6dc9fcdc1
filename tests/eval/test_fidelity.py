"""Fidelity: saturation, contrast and sharpness of known patterns and corruptions."""

import dataclasses

import numpy as np
import pytest

from distill_bench.domain import controls, shapes
from distill_bench.eval.fidelity import Fidelity, frame_statistics
from distill_bench.evaluator import Clips


def clips(prompts: int = 12, first: int = 0) -> Clips:
    """Two clips per prompt, of every colour and shape."""
    everything = shapes.all_attributes()
    chosen = everything[:: len(everything) // prompts][:prompts] * 2
    frames = np.stack([shapes.render(a, first + i) for i, a in enumerate(chosen)])
    seeds = list(range(first, first + len(chosen)))
    return Clips(frames, [shapes.caption(a) for a in chosen], seeds)


def scores(sample: Clips, teacher: Clips) -> dict[str, object]:
    return {score.column: score for score in Fidelity().scores(sample, {"teacher": teacher})}


def test_statistics_of_stripes_are_those_computed_by_hand():
    """Vertical stripes of black and red: half of the pixels have a saturation of 200.

    The second frame is brighter, which is no contrast within a frame.
    """
    stripes = np.zeros((2, 2, 3, 8, 8), np.uint8)
    stripes[:, :, 0, :, ::2] = 200
    stripes[:, 1] += 50
    saturation, contrast, sharpness = frame_statistics(stripes).values()
    assert saturation.tolist() == [100, 100]
    assert contrast == pytest.approx([100 / 3] * 2)
    assert sharpness == pytest.approx([400 / 3] * 2)


def darkened(frames: np.ndarray) -> np.ndarray:
    return (frames // 2).astype(np.uint8)


def greyed(frames: np.ndarray) -> np.ndarray:
    return np.repeat(frames.mean(2, keepdims=True).astype(np.uint8), 3, 2)


@pytest.mark.parametrize(
    ("corrupt", "moved"),
    [
        (controls.backwards, set()),
        (controls.shuffled, set()),
        (controls.blurred, {"contrast_ratio", "sharpness_ratio"}),
        (controls.noisy, {"saturation_ratio", "sharpness_ratio"}),
        (darkened, {"saturation_ratio", "contrast_ratio", "sharpness_ratio"}),
        (greyed, {"saturation_ratio"}),
    ],
)
def test_each_corruption_moves_its_own_ratios(corrupt, moved):
    teacher = clips()
    row = scores(dataclasses.replace(teacher, frames=corrupt(teacher.frames)), teacher)
    ratios = {name: score.value for name, score in row.items() if name.endswith("_ratio")}
    assert {name for name, value in ratios.items() if abs(value - 1) > 0.1} == moved, ratios


def test_the_ratio_of_data_is_near_one_and_that_of_noise_is_not():
    sample, teacher = clips(36), clips(36, 1000)
    noise = np.random.default_rng(0).integers(0, 256, sample.frames.shape, dtype=np.uint8)
    good, bad = (
        scores(dataclasses.replace(sample, frames=frames), teacher)["saturation_ratio"].value
        for frames in (sample.frames, noise)
    )
    assert abs(good - 1) < 0.1 < abs(bad - 1)


def test_clips_of_a_grey_teacher_have_every_ratio_but_that_of_saturation():
    """Those of closed-form teachers are grey."""
    teacher = clips()
    teacher = dataclasses.replace(teacher, frames=greyed(teacher.frames))
    row = scores(teacher, teacher)
    assert {name for name in row if name.endswith("_ratio")} == {
        "contrast_ratio",
        "sharpness_ratio",
    }
    assert row["saturation"].warnings == (
        "the saturation of the teacher reference is 0: no ratio to it exists",
    )


def test_ratios_of_other_prompts_carry_a_warning_and_those_of_another_order_do_not():
    teacher = clips()
    part, backwards = (
        Clips(
            teacher.frames[order],
            [teacher.prompts[i] for i in order],
            [teacher.seeds[i] for i in order],
        )
        for order in (np.arange(20), np.arange(24)[::-1])
    )
    for column in ("saturation_ratio", "sharpness_ratio"):
        warnings = scores(part, teacher)[column].warnings
        assert any("not the reference's" in warning for warning in warnings)
        assert scores(backwards, teacher)[column].warnings == ()


def test_without_a_teacher_there_are_three_statistics():
    columns = [score.column for score in Fidelity().scores(clips(), {})]
    assert columns == ["saturation", "contrast", "sharpness"]


def test_ratios_are_to_all_clips_of_the_teacher():
    """Also if the teacher has more; its last clips are darker here."""
    teacher = clips()
    frames = teacher.frames.copy()
    frames[12:] = darkened(frames[12:])
    few = Clips(teacher.frames[:6], teacher.prompts[:6], teacher.seeds[:6])
    ratios = scores(few, dataclasses.replace(teacher, frames=frames))
    own, of_teacher = frame_statistics(few.frames), frame_statistics(frames)
    for name, values in own.items():
        expected = values.mean() / of_teacher[name].mean()
        assert ratios[f"{name}_ratio"].value == pytest.approx(expected)


def test_a_dim_teacher_has_ratios():
    """Its statistics are below one level of 255 and above 0."""
    teacher = clips()
    dim = dataclasses.replace(teacher, frames=(teacher.frames // 254).astype(np.uint8))
    row = scores(dim, dim)
    for name in ("saturation", "contrast", "sharpness"):
        assert 0 < row[name].value < 1
        assert row[f"{name}_ratio"].value == pytest.approx(1)


def test_clips_of_another_length_than_the_teachers_are_refused():
    sample = clips()
    with pytest.raises(ValueError) as error:
        scores(dataclasses.replace(sample, frames=sample.frames[:, :6]), sample)
    assert str(error.value) == (
        "the teacher reference has 8 frames of 32x32, the clips have 6 frames of 32x32; "
        "they must agree"
    )


def test_captions_that_only_one_side_has_are_named():
    named = clips()
    nameless = dataclasses.replace(named, prompts=[""] * len(named.prompts))
    warnings = {
        side: scores(*pair)["contrast_ratio"].warnings[0]
        for side, pair in {"clips": (nameless, named), "teacher": (named, nameless)}.items()
    }
    assert warnings["clips"].startswith("the clips have no captions")
    assert warnings["teacher"].startswith("the prompts are not the reference's")
