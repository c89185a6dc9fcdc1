"""The committed measurement of the benchmark: scores see the damage that they should see."""

from pathlib import Path

import pytest

from distill_bench.report import load

GROUND = Path(__file__).parents[2] / "results" / "ground" / "mini-wan"
SPEEDS = ("motion_w1", "motion_spread_ratio")
SEEN = [  # row with stated damage, scores that must see it
    ("slowed", ("fvd", "motion_ratio", *SPEEDS)),
    ("stilled", ("fvd", "motion_ratio", *SPEEDS)),
    ("equalised", ("fvd", *SPEEDS)),  # the mean speed is unchanged
    ("frozen", ("fvd", "motion_ratio", *SPEEDS)),
]


@pytest.fixture(scope="module")
def study():
    return load(GROUND)


@pytest.fixture(scope="module")
def table(study):
    return study.table.set_index("label")


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
    """Before training, two steps are more than five floors away in FD and in W1 of motion."""
    for stepping in ("renoise", "ode"):
        row = table.loc[f"untrained-nfe2-{stepping}-shift2"]
        for column in ("fvd_mean", "motion_w1_mean"):
            assert row[column] > 5 * table.loc["teacher_other", column], column


def test_the_teacher_is_near_the_data(study):
    """FD of unguided reference clips to data of the same captions: at most five floors."""
    for role in ("teacher", "floor"):  # two sets of noise
        assert study.runs.set_index("role").loc[role, "fvd_over_floor_data"] < 5
