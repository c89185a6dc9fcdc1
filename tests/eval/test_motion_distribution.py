"""Distribution of motion over clips: the scores detect slowed, stilled and equalised clips."""

import dataclasses

import numpy as np
import pytest
import torch
from calibration import moving_shapes
from scipy.stats import wasserstein_distance

from distill_bench.domain import controls, shapes
from distill_bench.eval import motion as motion_module
from distill_bench.eval.motion import Comparison, Motion, clip_speeds, speeds
from distill_bench.evaluate import cache
from distill_bench.evaluate.optical_flow import lucas_kanade_flow
from distill_bench.evaluator import Clips, Score

BOTH = ("", "_true")  # by optical flow and by the oracle


def clips(first: int = 0, count: int = 36, **options) -> Clips:
    """Clips of the captions that leave all motion free, two per caption by default."""
    frames, prompts = controls.rendered(count, first, kind="free", **options)
    return Clips(frames, prompts, list(range(first, first + count)))


def at_speed(speed: float, fps: float = 8.0) -> Clips:
    frames = moving_shapes(speed)
    prompts = [shapes.caption(a) for a in shapes.all_attributes("free")] * 2
    return Clips(frames, prompts, list(range(len(frames))), fps=fps)


def with_frames(sample: Clips, frames: np.ndarray) -> Clips:
    return dataclasses.replace(sample, frames=frames)


def by_column(sample: Clips, teacher: Clips, other: Clips | None = None) -> dict[str, Score]:
    references = {"teacher": teacher} | ({} if other is None else {"teacher_other": other})
    return {score.column: score for score in Motion().scores(sample, references)}


@pytest.fixture(scope="module")
def teacher() -> Clips:
    return clips()


def test_a_copy_has_no_distance_and_the_teachers_spread_and_still_share(teacher):
    order = np.random.default_rng(0).permutation(len(teacher.frames))
    shuffled = Clips(
        teacher.frames[order],
        [teacher.prompts[i] for i in order],
        [teacher.seeds[i] for i in order],
    )
    for copy in (teacher, shuffled):
        scores = by_column(copy, teacher)
        assert copy is shuffled or "by construction" in scores["motion_w1"].warnings[0]
        for suffix in BOTH:
            assert scores[f"motion_w1{suffix}"].value == pytest.approx(0, abs=1e-9)
            assert np.ptp(scores[f"motion_ratio{suffix}"].per_clip) < 1e-6, "clips are paired"
            assert scores[f"motion_ratio{suffix}"].value == pytest.approx(1)
            assert scores[f"motion_spread_ratio{suffix}"].value == pytest.approx(1)
            assert np.ptp(scores[f"motion_spread_ratio{suffix}"].per_clip) < 1e-6
            shares = (scores[f"motion_still{name}{suffix}"].value for name in ("", "_teacher"))
            assert next(shares) == next(shares) == pytest.approx(0.25, abs=0.1)


def test_w1_is_scipys_distance_of_the_readings_and_near_the_oracles(teacher):
    sample = clips(500, pace=0.5)
    scores = by_column(sample, teacher)
    read = [speeds(x.frames, lucas_kanade_flow).top for x in (sample, teacher)]
    assert scores["motion_w1"].value == pytest.approx(wasserstein_distance(*read), abs=1e-5)
    assert (scores["motion_w1"].unit, scores["motion_w1"].better) == ("px/frame", "lower")
    true = [shapes.centroid_speed(x.frames) for x in (sample, teacher)]
    assert scores["motion_w1_true"].value == pytest.approx(wasserstein_distance(*true))
    assert scores["motion_w1"].value == pytest.approx(scores["motion_w1_true"].value, abs=0.03)
    for column in ("motion_ratio", "motion_w1", "motion_spread_ratio"):
        assert scores[column].headline and not scores[f"{column}_true"].headline


def test_w1_is_in_pixels_per_frame_at_any_rate():
    scores = by_column(at_speed(0.48, fps=16), at_speed(0.8, fps=16))
    for suffix in BOTH:
        assert scores[f"motion_w1{suffix}"].value == pytest.approx(0.32, abs=0.02)
        assert scores[f"motion_ratio{suffix}"].value == pytest.approx(0.6, abs=0.02)
        assert scores[f"motion_ratio{suffix}"].warnings == (), "a slow teacher is above its floor"


def test_the_teachers_noise_floor_is_that_of_its_own_clips(teacher, monkeypatch):
    """A noisy teacher's motion is doubted, whatever the student's clips are."""
    sample = clips(500)

    floors: dict[str, float] = {}
    monkeypatch.setattr(motion_module, "noise_floor", lambda x, flow: floors[x.digest])
    for of_teacher, of_sample in ((99.0, 0.0), (0.0, 99.0)):
        floors.update({teacher.digest: of_teacher, sample.digest: of_sample})
        warnings = by_column(sample, teacher)["motion_ratio"].warnings
        doubted = any("below its noise floor" in warning for warning in warnings)
        assert doubted == (of_teacher > of_sample)


def test_scores_do_not_depend_on_the_order_or_the_batches_of_clips(teacher, monkeypatch):
    sample, other = clips(500), clips(900)
    in_order = by_column(sample, teacher, other)
    expected = {column: score.value for column, score in in_order.items()}
    order = np.random.default_rng(0).permutation(len(sample.frames))
    reordered = Clips(
        sample.frames[order],
        [sample.prompts[i] for i in order],
        [sample.seeds[i] for i in order],
    )
    monkeypatch.setattr(cache, "BATCH", 5)
    scores = by_column(reordered, teacher, other)
    values = {column: score.value for column, score in scores.items()}
    for column in ("motion_ratio", "motion_w1", "motion_spread_ratio"):
        spreads = (np.std(of_set[column].per_clip) for of_set in (in_order, scores))
        assert next(spreads) == pytest.approx(next(spreads), rel=1e-4), "clips are paired"
    expected.pop("motion_floor"), values.pop("motion_floor")  # of the first 64 clips
    assert values == pytest.approx(expected, rel=1e-6)


def test_cached_speeds_are_those_of_their_method_and_version(tmp_path, monkeypatch):
    sample = dataclasses.replace(clips(count=2), cache=tmp_path)

    def read(method: str, step: float | None) -> np.ndarray:
        flow = None if step is None else lambda x: torch.full((len(x) - 1, 2, 4, 4), step)
        return clip_speeds(sample, method, flow).by_pair

    first, second = read("raft#1a", 1.0), read("raft#2b", 2.0)  # with the digests of weights
    assert second == pytest.approx(2 * first)
    assert read("raft#1a", None) == pytest.approx(first)
    monkeypatch.setattr(Motion, "version", Motion.version + 1)
    assert read("raft#1a", 3.0) == pytest.approx(3 * first)


def test_the_floor_is_one_and_a_worse_student_is_above_it(teacher):
    other = clips(900)
    floor, slow = by_column(other, teacher, other), by_column(clips(500, pace=0.5), teacher, other)
    for suffix in BOTH:
        column = f"motion_w1_over_floor{suffix}"
        assert floor[column].value == pytest.approx(1)
        assert slow[column].value > 1.5
    few = by_column(clips(500, count=12), teacher, other)  # fewer clips than the reference has
    of_other = by_column(other, teacher)
    for suffix in BOTH:
        w1, floor_w1 = (scores[f"motion_w1{suffix}"].value for scores in (few, of_other))
        assert few[f"motion_w1_over_floor{suffix}"].value == pytest.approx(w1 / floor_w1)
    with pytest.raises(ValueError, match="give clips of other seeds"):
        by_column(other, teacher, teacher)


def test_equal_speeds_are_seen_by_w1_and_spread_and_not_by_the_mean():
    scores = by_column(clips(count=72, equalised=True), clips(count=72))
    for suffix in BOTH:
        assert scores[f"motion_ratio{suffix}"].value == pytest.approx(1, abs=0.02)
        assert scores[f"motion_spread_ratio{suffix}"].value < 0.1
        assert scores[f"motion_w1{suffix}"].value > 0.2
        own, its = (scores[f"motion_still{name}{suffix}"].value for name in ("", "_teacher"))
        assert own < its / 2


def test_standing_still_is_seen_by_the_share_of_still_clips(teacher):
    scores = by_column(with_frames(teacher, controls.stilled(teacher.frames, share=1 / 3)), teacher)
    for suffix in BOTH:
        own, its = (scores[f"motion_still{name}{suffix}"].value for name in ("", "_teacher"))
        assert own - its == pytest.approx(0.25, abs=0.08), "a third of the moving clips"
        assert scores[f"motion_ratio{suffix}"].value == pytest.approx(2 / 3, abs=0.1)


def compared(
    values: list[float], prompts: list[str], references: dict, **fields
) -> dict[str, Score]:
    """Scores of clips with the given speeds; a reference is (speeds, prompts, seeds)."""
    made = {}
    for kind, (speed, names, seeds) in {"": (values, prompts, range(9)), **references}.items():
        frames = np.zeros((len(names), 2, 3, 4, 4), np.uint8)
        frames[:, 0, 0, 0, 0] = np.array(speed) * 10
        made[kind] = Clips(frames, names, list(seeds)[: len(names)])
    own = made.pop("")
    settings = {
        "speed": lambda x: x.frames[:, 0, 0, 0, 0] / 10,
        "floor": lambda x: 0.0,
        "still_below": 0.5,
        "name": "speed",
        "extractor": "by hand",
    }
    comparison = Comparison(clips=own, references=made, **settings | fields)
    return {score.column: score for score in comparison.scores()}


def test_still_clips_are_those_below_the_bound():
    scores = compared([0.4, 0.5, 0.6], ["a"] * 3, {"teacher": ([0.5, 0.6], ["a"] * 2, [0, 1])})
    assert scores["motion_still"].per_clip == (1, 0, 0)
    assert scores["motion_still_teacher"].value == 0


@pytest.mark.parametrize("fps, bound", [(16.0, 0.075), (4.0, 0.3)])
def test_a_clip_is_still_below_a_twentieth_of_the_shorter_side_per_second(fps, bound, monkeypatch):
    """Of 24x40 pixels; the flow is one per cent below and above, in every pixel."""

    def flow(clip: torch.Tensor) -> torch.Tensor:
        steps = torch.zeros(len(clip) - 1, 2, *clip.shape[2:])
        steps[:, 0] = bound * float(clip[0, 0, 0, 0]) / 100
        return steps

    monkeypatch.setattr(motion_module, "flow_method", lambda frames, raft: ("known", flow))
    frames = np.zeros((2, 3, 3, 24, 40), np.uint8)
    frames[0], frames[1] = 99, 101
    scores = Motion().scores(Clips(frames, ["a"] * 2, [0, 1], fps), {})
    assert next(s.per_clip for s in scores if s.column == "motion_still") == (1, 0)


def test_a_teacher_below_its_noise_floor_is_a_reason_to_doubt_the_ratios():
    prompts = ["a", "a", "b", "b"]
    teacher = {"teacher": ([1, 2, 3, 4], prompts, range(9))}
    low, nameless = "moves 2.5 px/frame, below its noise floor", "whether the ratio is paired"
    for own, floor, expected in (
        (prompts, 2.4, ()),
        (prompts, 2.5, ()),
        (prompts, 2.6, (low,)),
        ([""] * 4, 2.6, (nameless, low)),
    ):
        scores = compared([1, 3, 2, 4], own, teacher, floor=lambda x, floor=floor: floor)
        for column in {"motion_ratio", "motion_spread_ratio"} & scores.keys():
            warnings = scores[column].warnings
            assert len(warnings) == len(expected)
            assert all(end in text for text, end in zip(warnings, expected, strict=True))
        assert scores["motion_w1"].warnings == ()


def test_the_distance_of_a_clip_is_to_its_own_reference_if_there_is_one_and_else_to_all():
    """Both sums of distances are 1 per clip; the readings of four equal clips are equal."""
    prompts = ["a", "a", "b", "b"]
    teacher = {"teacher": ([1, 2, 3, 4], prompts, range(9))}
    for values, own in (([2, 3, 4, 5], prompts), ([2.5] * 4, ["c"] * 4)):
        by_clip = compared(values, own, teacher)["motion_w1"].per_clip
        assert by_clip == pytest.approx([1] * 4)


def test_a_distance_to_other_clips_than_the_reference_has_carries_warnings():
    teacher = {"teacher": ([1, 2, 3, 4], ["a", "a", "b", "b"], range(9))}
    fewer = "3 clips against 4 of the teacher: the bias differs from other rows'"
    foreign = "the prompts are not the reference's"
    copied = "these are the reference's own clips: 0 by construction"
    for prompts, values, expected in (
        (["b", "a", "b", "a"], [1, 3, 2, 4], ()),
        ([""] * 4, [1, 3, 2, 4], ()),
        (["a", "a", "b", ""], [1, 3, 2, 4], ()),
        (["a", "a", "b", "c"], [1, 3, 2, 4], (foreign,)),
        ([""] * 3, [1, 3, 2], (fewer,)),
        (["a", "b", "b"], [1, 3, 2], (fewer, foreign)),
        ([""] * 4, [1, 2, 3, 4], (copied,)),
        (["a", "a", "b", "c"], [1, 2, 3, 4], (foreign, copied)),
    ):
        assert compared(values, prompts, teacher)["motion_w1"].warnings == expected


def test_spreads_within_prompts_need_several_clips_of_a_prompt_on_both_sides_and_a_spread():
    twice, once = ["a", "a", "b", "b"], ["a", "b", "c", "d"]
    for own, its, reference, there in (
        (twice, twice, [1, 2, 4, 4], True),
        (twice, twice, [1, 1, 4, 4], False),
        (twice, once, [1, 2, 4, 4], False),
        (once, twice, [1, 2, 4, 4], False),
        (once, once, [1, 2, 4, 4], False),
    ):
        scores = compared([1, 3, 2, 4], own, {"teacher": (reference, its, range(9))})
        assert ("motion_spread_ratio" in scores) == there


def test_other_seeds_of_another_frame_rate_are_refused(teacher):
    with pytest.raises(ValueError, match="the teacher_other reference plays at 16"):
        by_column(teacher, teacher, dataclasses.replace(teacher, fps=16.0))


@pytest.mark.slow
def test_worse_and_worse_students_are_further_and_further(teacher):
    halves = controls.stilled(teacher.frames, share=0.5)
    students = [
        clips(500),
        with_frames(teacher, controls.slowed(teacher.frames, factor=0.75)),
        with_frames(teacher, controls.slowed(teacher.frames, factor=0.5)),
        with_frames(teacher, controls.frozen(teacher.frames)),
    ]
    *scores, halved = (by_column(x, teacher) for x in [*students, with_frames(teacher, halves)])
    for suffix in BOTH:
        w1 = [of_set[f"motion_w1{suffix}"].value for of_set in scores]
        assert w1 == sorted(w1) and w1[1] > 1.3 * w1[0]
        assert w1[0] < halved[f"motion_w1{suffix}"].value < w1[-1]


def test_a_teacher_without_a_body_is_refused_by_optical_flow_only(teacher):
    blank = with_frames(teacher, controls.noisy(np.full_like(teacher.frames, 30), 0, 0.02))
    assert not any(name.endswith("w1_true") for name in by_column(teacher, blank))
    with pytest.raises(ValueError, match="does not move"):
        by_column(teacher, with_frames(teacher, np.full_like(teacher.frames, 30)))


def test_without_captions_or_several_clips_per_prompt_there_is_no_spread_within_prompts(teacher):
    nameless = dataclasses.replace(teacher, prompts=[""] * len(teacher.prompts))
    scores = by_column(nameless, nameless)
    assert "motion_spread_ratio" not in scores and "motion_w1_true" not in scores
    assert scores["motion_w1"].value == pytest.approx(0, abs=1e-9)
    single = clips(count=18)
    assert "motion_spread_ratio" not in by_column(single, single)


@pytest.mark.slow
def test_slowed_stilled_and_equalised_clips_are_three_spreads_of_the_floor_away():
    """256 clips, as in the default protocol; the floor is the distance of other seeds."""
    teacher = clips(0, 256)
    floors = [by_column(clips(1000 * (2 + i), 256), teacher) for i in range(4)]
    students = {
        "slowed": clips(1000, 256, pace=0.75),
        "stilled": with_frames(clips(1000, 256), controls.stilled(clips(1000, 256).frames)),
        "equalised": clips(1000, 256, equalised=True),
    }
    scores = {name: by_column(sample, teacher) for name, sample in students.items()}
    for suffix in BOTH:
        column = f"motion_w1{suffix}"
        floor = np.array([by_name[column].value for by_name in floors])
        for name, by_name in scores.items():
            away = by_name[column].value - floor.mean()
            assert away > 3 * floor.std(ddof=1), (name, column)
