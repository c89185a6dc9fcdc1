"""Statistics against scipy, against simulations and by hand."""

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from distill_bench.report.stats import (
    MOST_SEEDS,
    Interval,
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


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0, 4.5], [1.0, 1.5], [-3.0, -1.0, -2.5]])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_interval_and_p_agree_with_scipy(values, confidence):
    expected = scipy_stats.ttest_1samp(values, 0)
    interval = mean_interval(values, confidence)
    low, high = expected.confidence_interval(confidence)
    assert (interval.low, interval.high) == pytest.approx((low, high))
    assert interval.half == pytest.approx((high - low) / 2)
    assert interval.mean == pytest.approx(np.mean(values))
    assert interval.error == pytest.approx(scipy_stats.sem(values))
    assert (interval.n, interval.dof) == (len(values), len(values) - 1)
    assert interval.p == pytest.approx(expected.pvalue)


def test_an_interval_includes_its_bounds():
    interval = Interval(mean=1.0, low=0.0, high=2.0, n=3, error=0.5, dof=2)
    assert not interval.excludes(0.0) and not interval.excludes(2.0)
    assert interval.excludes(-1e-9) and interval.excludes(2.0 + 1e-9)


def test_means_of_single_precision_scores_are_double_precision():
    values = np.array([[0.1, 0.7, 0.4], [0.3, 0.2, 0.9]], dtype=np.float32)
    double = values.astype(np.float64)
    assert mean_interval(values[:, 0]) == mean_interval(double[:, 0])
    assert crossed_interval(values) == crossed_interval(double)


def test_one_value_has_no_interval_and_excludes_nothing():
    one_seed = crossed_interval(np.array([[1.0, 3.0, 5.0]]))  # clips do not stand in for seeds
    for interval in (mean_interval([3.0]), one_seed):
        assert (interval.mean, interval.n) == (3.0, 1)
        unknown = [interval.low, interval.high, interval.half, interval.p, interval.error]
        assert np.isnan(unknown).all()
        assert not interval.excludes(0)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf"), 1.0]])
def test_empty_and_non_finite_values_are_refused(values):
    with pytest.raises(ValueError, match="no value|not finite"):
        mean_interval(values)
    with pytest.raises(ValueError, match="not finite"):
        crossed_interval(np.array([[0.0, 1.0], [2.0, np.inf]]))


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


def test_resamples_are_shares_of_all_members_and_repeat_themselves():
    shares = resampled_shares(4, 0, 500)
    assert shares.shape == (500, 4)
    np.testing.assert_allclose(shares.sum(1), 1)
    np.testing.assert_allclose(shares.mean(0), 0.25, atol=0.02)
    counts = shares * 4
    np.testing.assert_allclose(counts, counts.round(), atol=1e-9)
    resampled_shares.cache_clear()
    assert np.array_equal(shares, resampled_shares(4, 0, 500)), "the key decides, not the process"
    assert not np.array_equal(shares, resampled_shares(4, 1, 500))
    values = np.random.default_rng(10).normal(size=(4, 6))
    assert crossed_interval(values) == crossed_interval(values, seed=0)
    assert crossed_interval(values) != crossed_interval(values, seed=1)


@pytest.mark.parametrize("clusters", [None, [0, 1, 2, 3, 4, 5] * 2, [0, 0, 0, 1, 1, 2] * 2])
def test_the_error_is_that_of_the_resamples_themselves(clusters):
    """Also where covariances stand for them: clusters of equal and of unequal sizes."""
    values = np.random.default_rng(9).normal(2.0, 1.0, size=(5, 12))
    variance = 0.0
    for means, labels in ((values.mean(1), range(5)), (values.mean(0), clusters or range(12))):
        members = [means[np.array(labels) == label] for label in dict.fromkeys(labels)]
        shares, n = resampled_shares(len(members), 0), len(members)
        resampled = shares @ list(map(np.sum, members)) / (shares @ list(map(len, members)))
        variance += np.mean((resampled - resampled.mean()) ** 2) * n / (n - 1)
    interval = crossed_interval(values, clusters=clusters)
    assert interval.error == pytest.approx(variance**0.5, rel=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
@pytest.mark.parametrize("seed_sd, clip_sd", [(1.0, 1e-6), (1e-6, 1.0), (1.0, 2.0)])
def test_degrees_of_freedom_are_satterthwaites(seed_sd, clip_sd, scale):
    """Of the larger variance if one dominates; two clips are enough for an interval over clips."""
    generator = np.random.default_rng(8)
    for clips in (2, 30):
        effects = seed_sd * generator.normal(size=(5, 1)), clip_sd * generator.normal(size=clips)
        values = scale * (3 + effects[0] + effects[1])
        variances = [values.mean(1).var(ddof=1) / 5, values.mean(0).var(ddof=1) / clips]
        dofs = [4, clips - 1]
        expected = sum(variances) ** 2 / sum(np.square(variances) / dofs)
        interval = crossed_interval(values)
        assert interval.dof == pytest.approx(expected, rel=0.05)
        assert interval.error == pytest.approx(sum(variances) ** 0.5, rel=0.05)
        half = scipy_stats.t.ppf(0.975, interval.dof) * interval.error
        assert (interval.low, interval.high) == pytest.approx(
            (interval.mean - half, interval.mean + half)
        )


def test_values_without_any_spread_have_an_interval_of_width_0():
    interval = crossed_interval(np.full((3, 4), 2.5))
    assert (interval.mean, interval.low, interval.high) == (2.5, 2.5, 2.5)
    assert np.isnan(interval.p) and not interval.excludes(0)


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
    means = paired(a, {0: np.array([3.0, 5.0]), 7: np.zeros(2)})
    assert means.tolist() == [[pytest.approx(clips.mean() + 1 - 4.0)]], "clips of other prompts"


def test_pairs_are_of_one_seed_in_whatever_order_the_seeds_are_listed():
    a = {2: np.array([20.0]), 0: np.array([1.0]), 1: np.array([10.0])}
    b = {0: np.array([2.0]), 1: np.array([30.0]), 2: np.array([50.0])}
    assert sorted(paired(a, b).ravel().tolist()) == [-30.0, -20.0, -1.0]
    assert sorted(paired(b, a).ravel().tolist()) == [1.0, 20.0, 30.0]


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


def test_the_best_row_has_the_best_mean_of_its_seeds_means():
    """However many seeds or clips it has: sums would favour the row with fewer of them."""
    more_seeds = row(1.0, 1.01, 0.99, 1.0, 1.0)
    assert clear_winner([row(1.5, 1.52), more_seeds], "lower") == 1
    more_clips = {seed: np.full(4, 1.0 + seed / 100) for seed in range(3)}
    fewer_clips = {seed: np.full(2, 1.5 + seed / 90) for seed in range(3)}
    assert clear_winner([fewer_clips, more_clips], "lower") == 1
    assert clear_winner([more_clips, fewer_clips], "higher") == 1


def test_a_winner_wins_on_the_seeds_that_both_rows_have():
    best = row(0.0, 0.0, 0.0)
    assert clear_winner([best, {7: np.ones(1), 8: np.ones(1)}], "lower") is None, "no common seed"
    worse_in_common = {0: np.array([1.0]), 1: np.array([1.1]), 2: np.array([-9.0])}
    rival = {0: np.array([0.5]), 1: np.array([0.61])}
    assert clear_winner([worse_in_common, rival], "lower") is None
    near = [row(1.0, 2.0, 3.0), row(1.1, 1.95, 3.05)]
    assert clear_winner(near, "lower") is None, "0 is inside a narrow interval, 1 is outside"
    assert clear_winner([{}, best, row(1.0, 1.01, 1.02)], "lower") == 1, "an empty row is no rival"


def test_a_winner_over_two_prompts_needs_more_than_many_clips_of_each():
    prompts = np.repeat([0, 1], 20)
    rows = [
        {seed: np.where(prompts, 0.1, 2.0) * factor + seed for seed in range(3)}
        for factor in (0, 1)
    ]
    assert clear_winner(rows, "lower") == 0
    assert clear_winner(rows, "lower", clusters=prompts.tolist()) is None
    far = {seed: np.array([9.0 + 1.1 * seed]) for seed in range(3)}  # a row without values per clip
    assert clear_winner([*rows, far], "lower", clusters=prompts.tolist()) is None
    assert clear_winner([rows[0], far], "lower", clusters=prompts.tolist()) == 0


def test_the_distance_to_1_is_taken_from_the_mean_of_a_seed():
    """Clips at 0.5 and 1.5 average to exactly the target."""
    assert losses({0: np.array([0.5, 1.5])}, "one")[0].tolist() == [0.0]
    distances = losses({0: np.array([0.4, 0.6]), 1: np.array([1.75])}, "one")
    assert [value.tolist() for value in distances.values()] == [[0.5], [0.75]]


def test_more_rivals_need_more_evidence():
    best, rival = row(0.0, 0.0, 0.0), row(1.0, 1.2, 1.7)
    assert clear_winner([best, rival], "lower") == 0
    p = scipy_stats.ttest_1samp([1.0, 1.2, 1.7], 0).pvalue
    for rivals in range(1, 9):  # each is compared with the best row, and not with one another
        for empty in (0, 2):  # empty rows are no comparisons
            rows = [best, *[rival] * rivals, *[{}] * empty]
            assert clear_winner(rows, "lower") == (0 if rivals * p < 0.05 else None)


def test_holm_by_hand():
    """0.01 x 3, 0.03 x 2, and 0.04 x 1, raised to the value before it; nan is not a test."""
    expected = [0.06, 0.03, float("nan"), 0.06]
    assert holm([0.04, 0.01, float("nan"), 0.03]) == pytest.approx(expected, nan_ok=True)


def test_holm_agrees_with_statsmodels():
    generator = np.random.default_rng(9)
    for size in (1, 2, 5, 12):
        for upper in (1.0, 0.05):
            p_values = generator.uniform(0, upper, size)
            expected = multipletests(p_values, method="holm")[1]
            np.testing.assert_allclose(holm(p_values.tolist()), expected, rtol=1e-12)
    assert holm([0.2, 0.2, 0.01]) == pytest.approx([0.4, 0.4, 0.03]), "ties"
    assert holm([0.9, 0.8]) == [1.0, 1.0], "a probability"
    assert holm([]) == [] and np.isnan(holm([float("nan")])).all()


@pytest.mark.parametrize("confidence", [0.95, 0.99])
@pytest.mark.parametrize("seeds, sd, gap", [(8, 2.0, 1.5), (3, 1.0, 2.0), (20, 1.0, -0.5)])
def test_power_agrees_with_the_noncentral_t(seeds, sd, gap, confidence):
    critical = scipy_stats.t.ppf((1 + confidence) / 2, seeds - 1)
    noncentral = scipy_stats.nct(seeds - 1, abs(gap) / sd * seeds**0.5)
    expected = noncentral.sf(critical) + noncentral.cdf(-critical)
    assert power(seeds, sd, gap, confidence) == pytest.approx(expected, abs=1e-3)


def test_a_test_of_equal_rows_detects_a_difference_as_often_as_its_level():
    """In both tails."""
    assert power(6, 1.0, 1e-9) == pytest.approx(0.05, abs=5e-4)
    assert power(6, 1.0, 1e-9, 0.8) == pytest.approx(0.2, abs=2e-3)


def test_power_agrees_with_a_simulation():
    generator = np.random.default_rng(6)
    detected = [mean_interval(generator.normal(1, 1, 8)).excludes(0) for _ in range(3000)]
    assert power(8, 1.0, 1.0) == pytest.approx(np.mean(detected), abs=0.03)


@pytest.mark.parametrize("sd, seeds", [(5, 4), (8, 5), (10, 6), (15, 10)])
def test_seeds_needed_for_a_gap_of_15(sd, seeds):
    """Textbook values of a paired test with 80 % power at a two-sided 5 % level."""
    assert seeds_needed(sd, 15) == seeds


@pytest.mark.parametrize("confidence", [0.95, 0.995])
@pytest.mark.parametrize("gap", [0.12, 0.2, 0.3, 0.5, 1.0, 2.5])
def test_seeds_needed_are_the_fewest_with_the_power(gap, confidence):
    fewest = seeds_needed(1.0, gap, confidence)
    assert power(fewest, 1.0, gap, confidence) >= 0.8 > power(fewest - 1, 1.0, gap, confidence)
    for scale in (1e-6, 1e6):
        assert seeds_needed(scale, gap * scale, confidence) == fewest, "a unit changes nothing"
    assert seeds_needed(1.0, -gap, confidence) == fewest


def test_a_thousand_seeds_are_the_most():
    """The scale of the spread at which a paired test needs about a thousand seeds."""
    answers = [seeds_needed(sd, 1.0) for sd in np.linspace(11.26, 11.30, 41)]
    known = [answer for answer in answers if answer is not None]
    assert max(known) == MOST_SEEDS and None in answers


def test_no_number_of_seeds_is_given_without_a_spread_and_a_difference():
    for sd, gap in ((np.nan, 1.0), (1.0, np.nan), (np.inf, 1.0), (1.0, np.inf), (0.0, 0.0)):
        assert seeds_needed(sd, gap) is None


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
