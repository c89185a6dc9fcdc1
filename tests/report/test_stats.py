"""Statistics against scipy, against simulations and by hand."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from distill_bench.report.stats import (
    clear_winner,
    crossed_interval,
    holm,
    losses,
    mean_interval,
    paired,
    power,
    resampled_shares,
    seeds_needed,
)


def row(*values):
    """Scores with one value per seed."""
    return {seed: np.array([value]) for seed, value in enumerate(values)}


def test_interval_and_p_agree_with_scipy():
    values = [1.0, 2.0, 4.0, 4.5]
    expected = scipy_stats.ttest_1samp(values, 0)
    interval = mean_interval(values)
    assert (interval.low, interval.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert interval.mean == pytest.approx(2.875)
    assert interval.n == 4
    assert interval.p == pytest.approx(expected.pvalue)


def test_one_value_has_no_interval_and_excludes_nothing():
    interval = mean_interval([3.0])
    assert interval.mean == 3
    assert np.isnan(interval.low) and np.isnan(interval.p)
    assert not interval.excludes(0)
    one_seed = crossed_interval(np.array([[1.0, 2.0, 3.0]]))
    assert np.isnan(one_seed.low), "clips do not stand in for seeds"


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf"), 1.0]])
def test_empty_and_non_finite_values_are_refused(values):
    with pytest.raises(ValueError, match="no value|not finite"):
        mean_interval(values)


def test_95_percent_of_intervals_over_seeds_cover_the_truth():
    generator = np.random.default_rng(0)
    covered = [not mean_interval(generator.normal(5, 2, 3)).excludes(5) for _ in range(2000)]
    assert 0.935 < np.mean(covered) < 0.965


@pytest.mark.parametrize(
    "seed_sd, clip_sd, both_sd",
    [(1.0, 0.0, 0.5), (1.0, 3.0, 1.0), (0.05, 3.0, 1.0), (0.0, 0.0, 1.0)],
)
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_bootstrap_over_seeds_and_clips_covers_the_truth(seeds, seed_sd, clip_sd, both_sd):
    """Crossed random effects around 5, with either factor dominating."""
    generator = np.random.default_rng(1)
    clips = 40
    covered = []
    for _ in range(400):
        values = 5 + seed_sd * generator.normal(size=(seeds, 1))
        values = values + clip_sd * generator.normal(size=(1, clips))
        values = values + both_sd * generator.normal(size=(seeds, clips))
        covered.append(not crossed_interval(values).excludes(5))
    assert np.mean(covered) > 0.925


def test_percentiles_of_resamples_of_three_seeds_cover_too_rarely():
    """The reason for a quantile of Student's t."""
    generator = np.random.default_rng(2)
    covered = []
    for _ in range(500):
        low, high = np.quantile(resampled_shares(3, 0) @ generator.normal(5, 1, 3), [0.025, 0.975])
        covered.append(low <= 5 <= high)
    assert np.mean(covered) < 0.85


def test_the_bootstrap_repeats_itself_and_agrees_with_the_formula():
    values = np.random.default_rng(3).normal(size=(5, 60)) + np.arange(5)[:, None]
    interval = crossed_interval(values)
    assert interval == crossed_interval(values)
    expected = np.sqrt(values.mean(1).var(ddof=1) / 5 + values.mean(0).var(ddof=1) / 60)
    assert interval.error == pytest.approx(expected, rel=0.05) and interval.n == 5
    reference = crossed_interval(values[:1], seeds_vary=False)
    assert reference.error == pytest.approx(values[0].std(ddof=1) / np.sqrt(60), rel=0.05)


def test_clips_of_one_prompt_are_not_independent():
    """Ten copies of each of 20 values have the interval of 20 values."""
    values = np.repeat(np.random.default_rng(4).normal(size=(1, 20)), 10, axis=1)
    labels = np.repeat(np.arange(20), 10).tolist()
    honest = crossed_interval(values, clusters=labels, seeds_vary=False)
    assert honest.error == pytest.approx(values.std() / np.sqrt(19), rel=0.05)
    assert crossed_interval(values, seeds_vary=False).error < honest.error / 2


def test_pairing_removes_the_spread_that_seeds_share():
    a = {0: np.array([10.0]), 1: np.array([20.0]), 2: np.array([30.0]), 9: np.array([1000.0])}
    b = {0: np.array([9.0]), 1: np.array([18.9]), 2: np.array([29.1]), 7: np.array([-5.0])}
    difference = crossed_interval(paired(a, b))
    assert difference.n == 3 and difference.mean == pytest.approx(1.0) and difference.excludes(0)
    assert not mean_interval([10, 20, 30]).low > 29
    with pytest.raises(ValueError, match="no seed in common"):
        paired({0: np.ones(1)}, {1: np.ones(1)})


def test_pairing_keeps_clips_if_both_rows_have_them():
    clips = np.random.default_rng(5).normal(0, 10, 50)
    a, b = {0: clips + 1, 1: clips + 1.1}, {0: clips, 1: clips}
    assert paired(a, b).shape == (2, 50)
    assert crossed_interval(paired(a, b)).excludes(0), "hard and easy prompts cancel"
    assert paired(a, {0: np.array([0.0])}).shape == (1, 1)


def test_a_winner_needs_intervals_that_exclude_0():
    clear = [row(1.0, 1.1, 0.9), row(5.0, 5.2, 5.1)]
    assert clear_winner(clear, "lower") == 0
    assert clear_winner(clear, "higher") == 1
    assert clear_winner(clear, "one") == 0
    assert clear_winner(clear, None) is None
    assert clear_winner([row(1.0, 3.0), row(2.0, 2.5)], "lower") is None
    assert clear_winner([row(1.0), row(2.0)], "lower") is None, "one seed shows nothing"
    assert clear_winner([row(1.0, 1.0), {}], "lower") is None, "no rival, no win"
    with pytest.raises(ValueError, match="upwards"):
        clear_winner(clear, "upwards")


def test_the_distance_to_1_is_taken_from_the_mean_of_a_seed():
    """Clips at 0.5 and 1.5 average to exactly the target."""
    assert losses({0: np.array([0.5, 1.5])}, "one")[0].tolist() == [0.0]


def test_more_rivals_need_more_evidence():
    best, rival = row(0.0, 0.0, 0.0), row(1.0, 1.2, 1.7)
    assert clear_winner([best, rival], "lower") == 0
    assert clear_winner([best] + [rival] * 8, "lower") is None


def test_holm_by_hand():
    """0.01 x 3, 0.03 x 2, and 0.04 x 1, raised to the value before it; nan is not a test."""
    expected = [0.06, 0.03, float("nan"), 0.06]
    assert holm([0.04, 0.01, float("nan"), 0.03]) == pytest.approx(expected, nan_ok=True)


def test_power_agrees_with_the_noncentral_t():
    critical = scipy_stats.t.ppf(0.975, 7)
    expected = scipy_stats.nct.sf(critical, 7, 1.5 / 2 * 8**0.5)
    assert power(8, 2.0, 1.5) == pytest.approx(expected, abs=1e-3)


def test_power_agrees_with_a_simulation():
    generator = np.random.default_rng(6)
    detected = [mean_interval(generator.normal(1, 1, 8)).excludes(0) for _ in range(3000)]
    assert power(8, 1.0, 1.0) == pytest.approx(np.mean(detected), abs=0.03)


@pytest.mark.parametrize("sd, seeds", [(5, 4), (8, 5), (10, 6), (15, 10)])
def test_seeds_needed_for_a_gap_of_15(sd, seeds):
    """Textbook values of a paired test with 80 % power at a two-sided 5 % level."""
    assert seeds_needed(sd, 15) == seeds


def test_a_larger_difference_never_needs_more_seeds():
    assert [seeds_needed(1.0, gap) for gap in (0.5, 1, 2, 4, 8, 16, 32)] == [34, 10, 5, 3, 3, 2, 2]
    assert seeds_needed(1.0, 0.0) is seeds_needed(1e6, 1.0) is None
    assert seeds_needed(0.0, 1.0) == 2


def test_equal_values_are_not_significant():
    """A share of a few clips is often the same for two seeds by chance."""
    for values in ([0.25, 0.25], [0.3 - 0.2, 0.4 - 0.3, 0.5 - 0.4]):  # equal up to rounding
        interval = mean_interval(values)
        assert np.isnan(interval.p)
        assert not interval.excludes(0.0)
    assert mean_interval([0.0, 0.0, 0.0]).p == 1.0
    assert clear_winner([row(0.5, 0.5, 0.5), row(0.75, 0.75, 0.75)], "higher") is None
