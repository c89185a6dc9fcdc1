import numpy as np
import pytest
from scipy import stats as scipy_stats

from distill_bench.stats import bootstrap, bootstrap_interval, clear_winner, mean_interval, paired_difference


def test_the_interval_is_that_of_scipy():
    values = [1.0, 2.0, 4.0, 4.5]
    expected = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    interval = mean_interval(values)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.mean == pytest.approx(2.875) and interval.n == 4


def test_one_value_has_no_interval_and_excludes_nothing():
    interval = mean_interval([3.0])
    assert interval.mean == 3 and np.isnan(interval.low) and not interval.excludes(0)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf"), 1.0]])
def test_nothing_and_non_finite_values_are_refused(values):
    with pytest.raises(ValueError):
        mean_interval(values)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = [not mean_interval(generator.normal(5, 2, 3)).excludes(5) for _ in range(2000)]
    assert 0.935 < np.mean(covered) < 0.965


def test_pairing_removes_what_the_seeds_share():
    a = {0: 10.0, 1: 20.0, 2: 30.0, 9: 1000.0}
    b = {0: 9.0, 1: 18.9, 2: 29.1, 7: -5.0}
    difference = paired_difference(a, b)
    assert difference.n == 3 and difference.mean == pytest.approx(1.0) and difference.excludes(0)
    assert not (mean_interval([10, 20, 30]).low > 29)
    with pytest.raises(ValueError, match="no seed in common"):
        paired_difference({0: 1.0}, {1: 1.0})


def test_a_winner_needs_its_interval():
    clear = [{0: 1.0, 1: 1.1, 2: 0.9}, {0: 5.0, 1: 5.2, 2: 5.1}]
    assert clear_winner(clear, "lower") == 0
    assert clear_winner(clear, "higher") == 1
    assert clear_winner(clear, "one") == 0
    assert clear_winner(clear, None) is None
    assert clear_winner([{0: 1.0, 1: 3.0}, {0: 2.0, 1: 2.5}], "lower") is None
    assert clear_winner([{0: 1.0}, {0: 2.0}], "lower") is None, "one seed shows nothing"
    assert clear_winner([{0: 1.0, 1: 1.0}, {}], "lower") is None, "no rival, no win"
    with pytest.raises(ValueError, match="upwards"):
        clear_winner(clear, "upwards")


def test_more_rivals_need_more_evidence():
    row, rival = {0: 0.0, 1: 0.0, 2: 0.0}, {0: 1.0, 1: 1.2, 2: 1.7}
    assert clear_winner([row, rival], "lower") == 0
    assert clear_winner([row] + [rival] * 8, "lower") is None


def test_the_bootstrap_is_a_function_of_its_generator_and_finds_the_standard_error():
    values = np.random.default_rng(1).normal(size=400)
    one = bootstrap(values, np.mean, np.random.default_rng(2), 2000)
    assert np.array_equal(one, bootstrap(values, np.mean, np.random.default_rng(2), 2000))
    assert one.std() == pytest.approx(values.std() / 20, rel=0.1)
    interval = bootstrap_interval(values, np.mean, np.random.default_rng(2), 2000)
    assert interval.low < values.mean() < interval.high and interval.n == 400


def test_clusters_are_drawn_whole():
    """Ten copies of each of 20 values carry the information of 20 values."""
    values = np.repeat(np.random.default_rng(3).normal(size=20), 10)
    labels = np.repeat(np.arange(20), 10).tolist()
    whole = bootstrap(values, np.mean, np.random.default_rng(4), 2000, labels).std()
    assert whole == pytest.approx(values.std() / np.sqrt(20), rel=0.1)
    with pytest.raises(ValueError, match="labels"):
        bootstrap(values, np.mean, np.random.default_rng(4), 10, [0])
