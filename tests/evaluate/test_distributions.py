"""Statistics per clip: their values match scipy's, and their spread that of joint resampling."""

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from distill_bench.evaluate.distributions import (
    deviations,
    ratio_by_clip,
    spread_ratio_by_clip,
    wasserstein_by_clip,
)
from distill_bench.report.stats import crossed_interval


def speeds(seed: int, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Speeds of a teacher and of a slower student whose clips are correlated with the teacher's."""
    rng = np.random.default_rng(seed)
    teacher = np.where(rng.uniform(size=count) < 0.25, 0, 0.4 * 5 ** rng.uniform(size=count))
    return 0.6 * teacher + rng.normal(0, 0.1, count) ** 2, teacher


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_w1_is_scipys_distance(paired, count):
    student, teacher = speeds(0, count)
    student[: count // 2] = np.round(student[: count // 2], 1)  # ties
    expected = wasserstein_distance(student, teacher)
    assert wasserstein_by_clip(student, teacher, paired).mean() == pytest.approx(
        expected, abs=1e-12
    )


def test_w1_of_sets_of_different_sizes_is_scipys_distance():
    student, teacher = speeds(0)[0], speeds(1, 150)[1]
    by_clip = wasserstein_by_clip(student, teacher, paired=False)
    assert len(by_clip) == len(student)
    assert by_clip.mean() == pytest.approx(wasserstein_distance(student, teacher), abs=1e-12)


def test_w1_is_symmetric_scales_with_the_unit_and_is_the_size_of_a_shift():
    student, teacher = speeds(0)
    distance = wasserstein_by_clip(student, teacher, True).mean()
    assert wasserstein_by_clip(teacher, student, True).mean() == pytest.approx(distance)
    assert wasserstein_by_clip(8 * student, 8 * teacher, True).mean() == pytest.approx(8 * distance)
    for shift in (-0.3, 0.3):
        shifted = wasserstein_by_clip(teacher + shift, teacher, True)
        assert shifted.mean() == pytest.approx(0.3), "a distance is positive in both directions"


def test_a_copy_in_any_order_has_distance_zero():
    _, teacher = speeds(0)
    copy = np.random.default_rng(1).permutation(teacher)
    assert wasserstein_by_clip(copy, teacher, False).mean() == pytest.approx(0, abs=1e-12)
    assert (wasserstein_by_clip(teacher, teacher, True) == 0).all()


@pytest.mark.parametrize("statistic", [ratio_by_clip, wasserstein_by_clip, spread_ratio_by_clip])
@pytest.mark.parametrize("paired", [True, False])
def test_the_spread_over_clips_is_that_of_resampling_them(statistic, paired):
    """Pairs are drawn together; without pairs, the reference is fixed."""
    student, teacher = speeds(0)
    by_clip = statistic(student, teacher, paired)
    drawn = np.random.default_rng(0).integers(0, len(student), (1000, len(student)))
    resampled = [
        statistic(student[index], teacher[index] if paired else teacher, paired).mean()
        for index in drawn
    ]
    error = by_clip.std(ddof=1) / len(student) ** 0.5
    assert error == pytest.approx(np.std(resampled), rel=0.1)


@pytest.mark.parametrize("per_prompt", [2, 4])
def test_the_interval_of_the_spread_ratio_is_that_of_resampled_prompts(per_prompt):
    """The deviations of a prompt's clips are not independent: of two clips, they are equal."""
    student, teacher = speeds(0, 480)
    prompts = [f"p{i // per_prompt}" for i in range(len(student))]
    by_clip = spread_ratio_by_clip(deviations(student, prompts), deviations(teacher, prompts), True)
    clips = np.arange(len(student)).reshape(-1, per_prompt)
    resampled = []
    for drawn in np.random.default_rng(0).integers(0, len(clips), (1000, len(clips))):
        own, other = (values[clips[drawn]].var(1, ddof=1).mean() for values in (student, teacher))
        resampled.append((own / other) ** 0.5)
    assert by_clip.mean() == pytest.approx(
        np.sqrt(student[clips].var(1, ddof=1).mean() / teacher[clips].var(1, ddof=1).mean())
    )
    error = crossed_interval(by_clip[None], clusters=prompts, seeds_vary=False).error
    assert error == pytest.approx(np.std(resampled), rel=0.1)


def test_pairing_removes_what_pairs_share():
    student, teacher = speeds(0)
    for statistic in (ratio_by_clip, wasserstein_by_clip):
        paired, unpaired = (statistic(student, teacher, pair) for pair in (True, False))
        assert paired.mean() == pytest.approx(unpaired.mean(), abs=1e-12)
        assert paired.std() < 0.9 * unpaired.std()
    mixed = np.random.default_rng(0).permutation(teacher)
    spread = wasserstein_by_clip(student, teacher, True).std()
    assert wasserstein_by_clip(student, mixed, True).std() > 1.5 * spread


def test_the_ratio_is_that_of_the_means():
    student, teacher = speeds(0)
    for paired in (True, False):
        ratio = ratio_by_clip(student, teacher, paired).mean()
        assert ratio == pytest.approx(student.mean() / teacher.mean(), rel=1e-12)


def test_deviations_are_within_prompts_and_unbiased():
    values = np.array([1.0, 3.0, 10.0, 11.0, 12.0, 5.0, 7.0])
    prompts = ["a", "a", "b", "b", "b", "c", ""]
    within = deviations(values, prompts)
    assert (within[5:] == 0).all(), "one clip per prompt, or no prompt, has no deviation"
    assert np.mean(within**2) == pytest.approx((2 * 2 + 3 * 1) / 5), "variances 2 and 1, n 2 and 3"
    assert deviations(values, list("abcdefg")) is None and deviations(values, [""] * 7) is None


def test_the_spread_ratio_is_one_for_a_copy_half_for_half_and_zero_for_equal_speeds():
    _, teacher = speeds(0)
    prompts = [f"p{i // 2}" for i in range(len(teacher))]
    reference = deviations(teacher, prompts)
    means = np.repeat(teacher.reshape(-1, 2).mean(1), 2)
    for values, expected in ((teacher, 1), (means + (teacher - means) / 2, 0.5), (means, 0)):
        ratio = spread_ratio_by_clip(deviations(values, prompts), reference, True)
        assert ratio.mean() == pytest.approx(expected, abs=1e-12)
