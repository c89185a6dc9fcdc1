"""Numbers as text, verdicts and equal costs at their bounds."""

from math import nan

import numpy as np
import pytest
from stores import load_results, update_json, write_results, write_run, write_store

from distill_bench.report import tables
from distill_bench.report.results import Column, load
from distill_bench.report.rows import COST
from distill_bench.report.stats import CONFIDENCE, Interval
from distill_bench.report.tables.differences import (
    Difference,
    compared_pairs,
    cost_ratio,
    differences,
    seeds_for_gaps,
    spread_of_differences,
    verdict,
)
from distill_bench.report.tables.files import table_files
from distill_bench.report.tables.plateau import Change, changes, plateau
from distill_bench.report.tables.scores import budget, equal_cost, show_interval, show_p

DISTANCE = Column("d", "Distance", "", "lower", True)


@pytest.mark.parametrize(
    "p, text",
    [
        (0.0, "<0.001"),
        (0.00099, "<0.001"),
        (0.001, "0.001"),
        (0.0123, "0.012"),
        (0.0999, "0.100"),
        (0.1, "0.10"),
        (1.0, "1.00"),
        (nan, "—"),
    ],
)
def test_a_p_value_has_three_decimals_below_a_tenth(p, text):
    assert show_p(p) == text


@pytest.mark.parametrize(
    "mean, half, text",
    [
        (0.5, 0.25, "+0.50 ± 0.25"),
        (-0.5, 0.25, "-0.50 ± 0.25"),
        (12.3456, 10.0, "+12 ± 10"),
        (12.3456, 9.9, "+12.3 ± 9.9"),
        (0.0, 1.0, "+0.0 ± 1.0"),
        (0.0, nan, "0"),
        (4e-7, 4e-7, "0"),
        (0.0, 6e-7, "+0.000000 ± 0.000001"),
        (6e-7, 1e-8, "+0.000001 ± 0.000000"),
        (2e-6, nan, "+0.000002"),
        (123456.0, nan, "+123,456"),
        (-9.87654, nan, "-9.88"),
        (0.0314159, nan, "+0.0314"),
        (1000.0, 1e-7, "+1,000"),
        (1000.0, 2e-6, "+1,000.000000 ± 0.000002"),
        (1e9, 1.0, "+1,000,000,000"),
    ],
)
def test_an_interval_has_two_digits_of_its_half_width_and_at_most_six_decimals(mean, half, text):
    interval = Interval(mean, mean - half, mean + half, 3)
    assert show_interval(interval, sign="+") == text
    assert show_interval(interval, " (", sign="+") == text.replace(" ± ", " (")
    assert show_interval(interval) == text.replace("+", "")


# --- plateau ---


@pytest.mark.parametrize(
    "low, mean, high, found",
    [
        (-2.0, 0.0, 2.0, "reached"),
        (0.1, 1.0, 2.0, "reached"),
        (-2.0, -1.0, -0.1, "reached"),
        (-2.1, 0.0, 1.0, "unclear"),
        (-1.0, 0.0, 2.1, "unclear"),
        (0.1, 2.0, 3.0, "unclear"),
        (0.1, 2.1, 3.0, "moving"),
        (0.0, 2.1, 3.0, "unclear"),
        (-3.0, -2.1, -0.1, "moving"),
        (-3.0, -2.0, -0.1, "unclear"),
        (-3.0, -2.1, 0.0, "unclear"),
        (-9.0, 2.1, 9.0, "unclear"),
    ],
)
def test_a_change_is_judged_against_the_tolerance_in_units_of_the_noise(low, mean, high, found):
    interval = Interval(mean, low, high, 3)
    assert Change(DISTANCE, interval, noise=4.0, tolerance=0.5).verdict == found
    assert Change(DISTANCE, None, noise=4.0, tolerance=0.5).verdict == "not judged"


def curves(folder, *rows):
    """Results of rows of runs; a run is a list of (student updates, score)."""
    runs, points = [], []
    for i, row in enumerate(rows):
        for seed, curve in enumerate(row):
            run = f"{'abc'[i]}{seed}"
            score = curve[-1][1] if curve else None
            runs.append({"run_id": run, "method": "abc"[i], "seed": seed, "d": score})
            at = [{"run_id": run, "student_updates": u, COST: 1.0 * u, "d": d} for u, d in curve]
            points += at
    training = [{"run_id": "a0", "student_updates": 1}]
    write_results(folder, [DISTANCE], [], None, runs, points, training)
    return load(folder)


def test_the_window_begins_where_its_share_of_the_longest_training_does(tmp_path):
    """A curve that begins later, or ends before the window, is not judged."""
    row = [
        [(20, 9.0), (25, 8.0), (30, 4.0)],
        [(20, 7.0), (30, 5.0)],
        [(21, 0.0), (30, 90.0)],
        [(5, 0.0), (20, 50.0)],
    ]
    results = curves(tmp_path, row)
    (change,) = changes(results, results.students[0])
    assert change.interval.n == 2 and change.noise == pytest.approx(np.std([4, 5], ddof=1))
    assert change.interval.mean == pytest.approx((4 - 9 + 5 - 7) / 2)
    few = curves(tmp_path / ".." / tmp_path.name, row[1:])
    assert changes(few, few.students[0])[0].verdict == "not judged"


# --- differences ---


def test_a_verdict_needs_p_below_5_percent(results):
    a, b, _ = results.students
    for p, label in ((0.0499, a.label), (1 - CONFIDENCE, ""), (nan, "")):
        assert verdict(Difference(DISTANCE, a, b, None, p, a, nan), p) == label
    assert verdict(Difference(DISTANCE, a, b, None, 0.0, None, nan), 0.0) == ""


@pytest.mark.filterwarnings("error")
def test_the_ratio_of_costs_is_of_the_means_over_seeds(tmp_path):
    """And the budget is the least cost that is known."""
    costs = {"a": [100.0, 300.0], "b": [50.0], "c": [None], "d": [0.0], "e": [0.5]}
    runs = [
        {"run_id": f"{method}{seed}", "method": method, "seed": seed, "d": 1.0, COST: cost}
        for method, row in costs.items()
        for seed, cost in enumerate(row)
    ]
    point = {"run_id": "a0", "student_updates": 1, "d": 1.0}
    write_results(tmp_path, [DISTANCE], [], None, runs, [point], [point])
    results = load(tmp_path)
    a, b, c, d, e = results.students
    assert cost_ratio(a, b) == 4.0 and cost_ratio(b, a) == 0.25 and cost_ratio(a, e) == 400.0
    assert cost_ratio(a, c) is cost_ratio(c, a) is cost_ratio(a, d) is None
    assert budget(results, [c, a]) == 100.0 and budget(results, [c]) is None
    results.manifest["budget"] = 40.0  # as requested, for whatever rows
    assert budget(results) == budget(results, [a]) == budget(results, [c]) == 40.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("better", ["lower", None])
def test_a_difference_is_of_its_column_and_rows_over_two_seeds_or_one_or_none(tmp_path, better):
    column = Column("d", "Score", "", better, True)
    runs = [
        {"run_id": run, "method": run[0], "seed": int(run[1]), "d": float(i * i)}
        for i, run in enumerate(["a0", "a1", "b0", "b1", "c1", "d2"])
    ]
    point = {"run_id": "a0", "student_updates": 1, "d": 1.0}
    write_results(tmp_path, [column], [], None, runs, [point], [point])
    results = load(tmp_path)
    a, *others = results.students
    found = differences(results, column, [(row, a) for row in others])
    assert [(one.column, one.a, one.b) for one in found] == [(column, row, a) for row in others]
    assert [one.seeds for one in found] == [2, 1, 0]
    assert [np.isfinite(one.sd) for one in found] == [True, False, False]


def test_as_many_rows_as_all_pairs_are_compared_of_have_all(results, monkeypatch):
    count = len(results.students)
    for module in (tables.differences, tables.scores):
        monkeypatch.setattr(module, "MOST_ROWS", count)
    assert len(compared_pairs(results)) == count * (count - 1) / 2
    assert tables.scores.pairs_in_words(results) == "every pair"


@pytest.mark.parametrize("better, sign", [("lower", 1), ("higher", -1), ("one", 1)])
def test_a_row_is_favoured_by_the_sign_of_its_gain(tmp_path, better, sign):
    """Not if both are as good: then neither is."""
    column = Column("d", "Score", "", better, True)
    scores = {"a": [2.0, 2.2], "b": [3.0, 3.2], "c": [2.0, 2.2]}
    runs = [
        {"run_id": f"{method}{seed}", "method": method, "seed": seed, "d": score}
        for method, row in scores.items()
        for seed, score in enumerate(row)
    ]
    point = {"run_id": "a0", "student_updates": 1, "d": 1.0}
    write_results(tmp_path, [column], [], None, runs, [point], [point])
    results = load(tmp_path)
    a, b, c = results.students
    up, down, equal = differences(results, column, [(a, b), (b, a), (a, c)])
    assert up.favours is down.favours is (a if sign > 0 else b)
    assert equal.favours is None
    assert compared_pairs(results) == [(b, a), (c, a), (c, b)]
    assert spread_of_differences(results, column, a) == pytest.approx(0.0, abs=1e-12)


def test_the_spread_is_pooled_over_the_rows_that_share_two_seeds_with_the_baseline(tmp_path):
    shifts = {"b": [1.0, 2.0, 6.0], "c": [4.0, 9.0]}
    rows = [[[(1, 10.0 * seed)] for seed in range(3)]]
    rows += [[[(1, 10.0 * s + x)] for s, x in enumerate(row)] for row in shifts.values()]
    results = curves(tmp_path, *rows)
    squares = sum(np.var(row, ddof=1) * (len(row) - 1) for row in shifts.values())
    pooled = (squares / 3) ** 0.5
    found = spread_of_differences(results, DISTANCE, results.baseline)
    assert found == pytest.approx(pooled)
    ((column, mean, sd, needed),) = seeds_for_gaps(results)
    assert column == DISTANCE and mean == pytest.approx(10.0) and sd == pytest.approx(pooled)
    assert needed == sorted(needed, reverse=True) and len(needed) == 4


# --- equal cost ---


def test_runs_that_others_start_from_do_not_limit_the_budget(tmp_path):
    store = write_store(tmp_path, [], ())
    first = write_run(store, "alpha", 0, 0, 9.0)
    later = [write_run(store, "beta", s, 2, 8.0, init_run=first) for s in (0, 1)]
    for ids in ([first, *later], later):
        update_json(store / "sweeps" / "speed.json", run_ids=ids)
        results = load_results(store, tmp_path / "data")
        assert budget(results) == 3000.0
        assert budget(results, results.students[:1]) == (1000.0 if len(ids) == 3 else 3000.0)
        apart = ", apart from runs from whose students others start" if len(ids) == 3 else ""
        origin = f"the largest that every finished run reaches{apart}. Each run's score"
        assert origin in table_files(results)["table.md"]


def test_a_row_of_which_one_run_alone_is_started_from_limits_the_budget(tmp_path):
    store = write_store(tmp_path, [], ())
    ids = [write_run(store, "alpha", seed, 0, 9.0) for seed in (0, 1)]
    ids += [write_run(store, "beta", 0, 2, 8.0, init_run=ids[0])]
    update_json(store / "sweeps" / "speed.json", run_ids=ids)
    assert budget(load_results(store, tmp_path / "data")) == 1000.0


def test_what_is_absent_at_equal_cost_is_explained(tmp_path):
    """Of finished runs: evaluated later, or not around the cost; of the others, their state."""
    runs = [("alpha", 0, 1, 9.0), ("alpha", 1, 1, 9.0), ("beta", 0, 5, 9.0)]
    runs += [("beta", 1, 5, None, None)]
    store = write_store(tmp_path, runs, ())
    for budgeted, alpha, beta in (
        (1500.0, "2", "0/2 (1 failed, 1 first evaluated at 3,000)"),
        (2500.0, "0/2 (2 not evaluated around it)", "0/2 (1 failed, 1 first evaluated at 3,000)"),
        (3000.0, "0/2 (2 not evaluated around it)", "1/2 (1 failed)"),
    ):
        results = load_results(store, tmp_path / "data", budget=budgeted)
        lines = {
            row.method: [cell.text for cell in line] for row, line in equal_cost(results).lines
        }
        assert lines["alpha"][2] == alpha and lines["beta"][2] == beta
        assert (lines["alpha"][3] == "—") == (alpha != "2")


def test_a_row_without_judged_scores_is_not_judged(tmp_path):
    results = curves(tmp_path, [[(20, 1.0), (30, 1.0)]])
    assert plateau(results, results.students[0]) == "not judged"
