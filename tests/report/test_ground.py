"""The committed measurement of the benchmark: scores see the damage that they should see."""

from pathlib import Path

import pytest

from distill_bench.report import load

GROUND = Path(__file__).parents[2] / "results" / "ground" / "mini-wan"
SEEN = [  # row with stated damage, scores that must see it
    ("slowed", ("fvd", "motion_ratio", "motion_w1")),
    ("stilled", ("fvd", "motion_ratio", "motion_w1")),
    ("equalised", ("fvd", "motion_w1")),  # the mean speed is unchanged
    ("frozen", ("fvd", "motion_ratio", "motion_w1")),
]


@pytest.fixture(scope="module")
def table():
    return load(GROUND).table.set_index("label")


@pytest.mark.parametrize(("row", "columns"), SEEN)
def test_a_damaged_row_is_more_than_three_spreads_of_the_floor_from_the_floor(row, columns, table):
    for column in columns:
        floor = table.loc["teacher_other"]
        spread = (floor[f"{column}_high"] - floor[f"{column}_low"]) / (2 * 1.96)
        away = abs(table.loc[row, f"{column}_mean"] - floor[f"{column}_mean"])
        assert away > 3 * spread, column


def test_mean_motion_does_not_see_equal_speeds(table):
    low, high = table.loc["teacher_other", ["motion_ratio_low", "motion_ratio_high"]]
    assert low < table.loc["equalised", "motion_ratio_mean"] < high


def test_the_study_s_two_steps_need_distillation(table):
    """Before training, FD of students' two steps is more than five floors."""
    floor = table.loc["teacher_other", "fvd_mean"]
    for stepping in ("renoise", "ode"):
        assert table.loc[f"untrained-nfe2-{stepping}-shift2", "fvd_mean"] > 5 * floor
