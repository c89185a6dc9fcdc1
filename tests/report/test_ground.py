"""The committed measurement of the benchmark: scores see the damage that they should see."""

from pathlib import Path

import pytest

from distill_bench.report import load

GROUND = Path(__file__).parents[2] / "results" / "ground"
SPEEDS = ("motion_w1", "motion_spread_ratio")
MODES = ("mixture_motion_w1", "mixture_motion_spread_ratio")
SEEN = [  # teacher, row with stated damage, scores that must see it
    ("mini-wan", "slowed", ("fvd", "motion_ratio", *SPEEDS)),
    ("mini-wan", "stilled", ("fvd", "motion_ratio", *SPEEDS)),
    ("mini-wan", "equalised", ("fvd", *SPEEDS)),  # the mean speed is unchanged
    ("mini-wan", "frozen", ("fvd", "motion_ratio", *SPEEDS)),
    ("mixture", "slowed", ("mixture_motion_ratio", *MODES)),
    ("mixture", "stilled", ("mixture_motion_ratio", "mixture_motion_w1")),
    ("mixture", "equalised", MODES),
]


@pytest.fixture(scope="module")
def tables():
    return {name: load(GROUND / name).table.set_index("label") for name in ("mini-wan", "mixture")}


@pytest.fixture
def table(tables):
    return tables["mini-wan"]


@pytest.mark.parametrize(("teacher", "row", "columns"), SEEN)
def test_a_damaged_row_is_more_than_three_spreads_of_the_floor_from_the_floor(
    teacher, row, columns, tables
):
    table = tables[teacher]
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


def test_the_teacher_is_near_the_data():
    """FD of unguided reference clips to data of the same captions: at most five floors."""
    runs = load(GROUND / "mini-wan").runs.set_index("role")
    assert runs.loc["teacher", "fvd_over_floor_data"] < 5
