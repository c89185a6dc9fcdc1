"""A row's plateau, judged on score curves that are made up."""

import numpy as np
import pandas as pd
import pytest
from stores import write_results

from distill_bench.report.results import Column, load
from distill_bench.report.rows import COST
from distill_bench.report.tables.files import table_files
from distill_bench.report.tables.plateau import changes, plateau, plateau_caption
from distill_bench.report.tables.scores import score_table

SCORES = [Column("d", "Distance", "", "lower", True), Column("m", "Motion", "", "one", True)]
T = np.linspace(1 / 12, 1, 12)  # evaluated updates, as a share of the training


def falling(t):
    return 10 - 6 * t


def early(t):
    return 4 + 6 * np.exp(-12 * t)


def u_shaped(t):
    return 4 + 20 * (t - 0.5) ** 2


def late_u(t):
    """Equal at the window's start and at the end, and deep between them."""
    return np.where(t < 2 / 3, 4.0, 4 - 3 * np.sin(np.pi * (t - 2 / 3) * 3))


def study(folder, curve, seeds=8, noise=0.0, times=T, **manifest):
    """Results of one row whose distance follows a curve; seeds differ by a normal offset.

    Args:
        noise: of every evaluation, in units of the spread between seeds.
    """
    draw = np.random.default_rng(1)
    offsets = draw.normal(size=seeds)
    if seeds > 1:
        offsets = (offsets - offsets.mean()) / offsets.std(ddof=1)
    points, runs = [], []
    for seed, offset in enumerate(offsets):
        values = curve(times) + offset + noise * draw.normal(size=len(times))
        points += [
            {"run_id": f"a{seed}", "student_updates": 100 * t, COST: t, "d": value, "m": offset}
            for t, value in zip(times, values, strict=True)
        ]
        run = {"run_id": f"a{seed}", "method": "a", "seed": seed, "d": values[-1], "m": offset}
        runs.append(run)
    write_results(folder, SCORES, [], None, runs, points, [{"run_id": "a0", "loss": 1.0}])
    results = load(folder)
    results.manifest.update(manifest)
    return results


@pytest.mark.parametrize(
    ("curve", "noise", "verdict"),
    [
        (falling, 0.0, "moving"),
        (falling, 0.3, "moving"),
        (u_shaped, 0.0, "moving"),
        (late_u, 0.0, "moving"),
        (early, 0.0, "reached"),
        (early, 0.3, "reached"),
        (early, 2.0, "unclear"),
    ],
)
def test_a_curve_that_moves_is_told_from_one_that_is_flat(curve, noise, verdict, tmp_path):
    results = study(tmp_path, curve, noise=noise)
    (row,) = results.students
    assert plateau(results, row) == verdict
    assert changes(results, row)[1].verdict == "reached", "motion differs only between seeds"


def test_the_change_is_that_of_the_curve_in_units_of_the_spread_between_seeds(tmp_path):
    results = study(tmp_path, falling)
    distance, _ = changes(results, results.students[0])
    assert distance.interval.mean == pytest.approx(-2.0), "a third of 6"
    assert distance.noise == pytest.approx(1.0)
    results = study(tmp_path, falling, plateau={"tolerance": 2.1})
    assert plateau(results, results.students[0]) == "reached"
    half = study(tmp_path, falling, plateau={"window": 0.5, "tolerance": 2.1})
    assert changes(half, half.students[0])[0].interval.mean == pytest.approx(-3.0)
    assert plateau(half, half.students[0]) == "moving"


def test_between_evaluations_the_curve_is_interpolated(tmp_path):
    results = study(tmp_path, falling, times=np.array([0.5, 1.0]))
    assert changes(results, results.students[0])[0].interval.mean == pytest.approx(-2.0)


def test_every_seed_says_where_the_curves_are_compared(tmp_path):
    """The first seed was evaluated at the window's ends alone."""
    study(tmp_path, late_u)
    points = pd.read_csv(tmp_path / "checkpoints.csv")
    inside = points["student_updates"].between(67, 99)
    points[~(inside & (points["run_id"] == "a0"))].to_csv(tmp_path / "checkpoints.csv", index=False)
    results = load(tmp_path)
    assert plateau(results, results.students[0]) == "moving"


@pytest.mark.parametrize(
    ("seeds", "times"),
    [(8, [1.0]), (1, T), (8, [0.8, 0.9, 1.0])],
    ids=["one checkpoint", "one seed", "late checkpoints"],
)
def test_a_row_without_enough_evaluations_is_not_judged(seeds, times, tmp_path):
    results = study(tmp_path, falling, seeds, times=np.array(times))
    assert plateau(results, results.students[0]) == "not judged"


def test_tables_mark_a_row_that_is_still_moving(tmp_path):
    results = study(tmp_path, falling)
    table = score_table(results, results.headline)
    (_, cells), place = table.lines[0], table.heads.index("plateau")
    assert cells[place].text == "moving"
    assert "Still moving: A." in plateau_caption(results)
    files = table_files(results)
    assert "| moving |" in files["table.md"]
    frame = pd.DataFrame([line.split(",") for line in files["plateau.csv"].splitlines()])
    assert frame.iloc[1:, -1].tolist() == ["moving", "reached"]
    assert frame.set_axis(frame.iloc[0], axis=1)["seeds"].tolist()[1:] == ["8", "8"]


def test_a_curve_that_begins_where_the_window_does_is_judged(tmp_path):
    rule = {"window": 0.5, "tolerance": 1.0}
    results = study(tmp_path, falling, times=np.linspace(0.5, 1, 5), plateau=rule)
    assert plateau(results, results.students[0]) == "moving"


def test_the_caption_states_the_sweeps_rule_and_rows_that_move_alone(tmp_path):
    results = study(tmp_path, early, plateau={"window": 0.25, "tolerance": 3.0})
    caption = plateau_caption(results)
    assert "over the last 25% of the training" in caption and "against 3 times the" in caption
    assert "Still moving" not in caption
