"""The committed measurement of the benchmark: scores see the damage that they should see."""

from pathlib import Path

import pandas as pd
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
    ("mixture", "slowed", ("mode_tv", "mixture_motion_ratio", *MODES)),
    ("mixture", "stilled", ("mode_tv", "mixture_motion_ratio", *MODES)),
    ("mixture", "equalised", ("mode_tv", *MODES)),
]
MEAN_MOTION = {"mini-wan": "motion_ratio", "mixture": "mixture_motion_ratio"}


@pytest.fixture(scope="module")
def studies():
    return {teacher: load(GROUND / teacher) for teacher in MEAN_MOTION}


@pytest.fixture(scope="module")
def tables(studies):
    return {teacher: study.table.set_index("label") for teacher, study in studies.items()}


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


@pytest.mark.parametrize(("teacher", "score"), MEAN_MOTION.items())
def test_mean_motion_does_not_see_equal_speeds(teacher, score, tables):
    table = tables[teacher]
    low, high = table.loc["teacher_other", [f"{score}_low", f"{score}_high"]]
    assert low < table.loc["equalised", f"{score}_mean"] < high


@pytest.mark.parametrize(
    ("teacher", "columns"),
    [
        ("mini-wan", ("fvd", "motion_w1")),
        ("mixture", ("mode_tv", "mixture_motion_w1", "mixture_energy")),
    ],
)
def test_two_steps_need_distillation(teacher, columns, tables):
    """The teacher's own two steps are more than five floors away, by the floor's upper end."""
    table = tables[teacher]
    for stepping in ("renoise", "ODE"):
        for column in columns:
            away = table.loc[f"teacher, {stepping}, 2 steps", f"{column}_mean"]
            assert away > 5 * table.loc["teacher_other", f"{column}_high"], (stepping, column)


def test_gaussian_rows_are_exact():
    """More ODE steps are nearer to the data; re-noising has a limit; guidance moves the mean."""
    table = load(GROUND / "gaussian").table.set_index("label")

    def of(column: str, stepping: str, steps: int, guidance: str = "") -> float:
        return table.loc[f"teacher, {stepping}, {steps} steps{guidance}", f"{column}_mean"]

    steps = (2, 4, 8, 16, 32)
    for stepping in ("ODE", "renoise"):
        for column in ("exact_kl", "exact_w2"):
            values = [of(column, stepping, n) for n in steps]
            assert values == sorted(values, reverse=True)
        for n in steps:
            spread = of("exact_spread", stepping, n)
            assert of("exact_spread", stepping, n, ", w=3") == pytest.approx(spread)
            assert of("exact_w2", stepping, n, ", w=3") > 1.5 * of("exact_w2", stepping, n)
    assert of("exact_kl", "ODE", 32) < 0.1 < 1 < of("exact_kl", "renoise", 32)
    one = table.loc["teacher, ODE, 1 step"]  # a point: KL is infinite, and W2 is not
    assert one["exact_spread_mean"] == 0 < one["exact_w2_mean"] and pd.isna(one["exact_kl_mean"])


def test_the_teacher_is_near_the_data(studies):
    """FD of unguided reference clips to data of the same captions: at most five floors."""
    for role in ("teacher", "floor"):  # two sets of noise
        runs = studies["mini-wan"].runs.set_index("role")
        assert runs.loc[role, "fvd_over_floor_data"] < 5


def test_the_shipped_teacher_is_good_on_new_noise():
    """`distill-bench pretrain --measure`: every set of noise; no choice was made on any."""
    quality = pd.read_csv(GROUND / "quality.csv")
    assert len(quality) >= 3 and quality.noise.is_unique
    assert quality["all"].min() >= 0.97 and quality.guided.min() >= 0.99
    assert quality.speed_w1.max() <= 0.05 and quality.still.abs().max() <= 0.03
    assert (quality.fd <= 5 * quality.fd_floor).all()
