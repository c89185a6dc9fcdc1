"""Scores of a results folder that contradict each other, even with new digests."""

import numpy as np
import pandas as pd
import pytest
from stores import update_json, write_results

from distill_bench.report.results import Column
from distill_bench.report.rows import COST
from distill_bench.report.verify import verify

SCORES = [Column("speed", "Speed", "", "one", True), Column("d", "Distance", "", "lower", True)]


def contradictions(folder, runs, checkpoints, clips):
    """Differences within runs.csv, of a folder with these data files and no tables."""
    write_results(folder, SCORES, [], None, runs, checkpoints, [{"run_id": "a", COST: 1.0}])
    lines = [(run, "speed", " ".join(map(repr, values))) for run, values in clips.items()]
    frame = pd.DataFrame(lines, columns=["run_id", "column", "values"])
    frame.to_csv(folder / "clips.csv", index=False)
    update_json(folder / "sweep.json", prompts=None, contrasts=[])
    return [line for line in verify(folder) if line.startswith("runs.csv:")]


def run(name, speed, distance, seed=0):
    return {"run_id": name, "method": "m", "seed": seed, "speed": speed, "d": distance}


def at_end(name, distance):
    return {"run_id": name, "student_updates": 20, COST: 1.0, "d": distance}


@pytest.mark.parametrize("clips", [[1.0, 2.0, 6.0], [-100.0, 50.0], [1e-5, 3e-5], [0.0, 0.0]])
@pytest.mark.parametrize("share", [-1.01, -0.99, 0.0, 0.99, 1.0, 1.01])
def test_a_score_is_the_mean_of_its_clips_up_to_a_thousandth_of_the_largest(tmp_path, clips, share):
    """clips.csv has four digits. Of clips near 0 an error of 1e-6 is allowed."""
    allowed = 1e-3 * max(1e-3, np.abs(clips).max())
    mean = float(np.mean(clips))
    if share == 1.0 and mean:
        share = 0.5  # the bound itself is a number of a computer only at 0
    value = mean + share * allowed
    runs = [run("a", value, 1.0), run("b", mean, 1.0, 1)]
    found = contradictions(tmp_path, runs, [at_end("a", 1.0)], {"a": clips, "b": clips})
    message = f"runs.csv: speed of a is {value}, its clips average {mean:.6g}"
    assert found == ([message] if abs(share) > 1 else [])


def test_clips_of_a_run_without_a_score_and_of_an_unknown_run_are_named(tmp_path):
    clips = {"a": [1.0, 3.0], "b": [1.0], "other": [2.0, 3.0]}
    runs = [run("a", None, 1.0), run("b", 1.0, 1.0, 1)]
    assert contradictions(tmp_path, runs, [at_end("b", 1.0)], clips) == [
        "runs.csv: speed of a is nan, its clips average 2",
        "runs.csv: speed of other is nan, its clips average 2.5",
    ]


@pytest.mark.parametrize("value", [4.0, -300.0, 2e-5, 0.0])
@pytest.mark.parametrize("share", [-1.01, -0.99, 0.0, 0.99, 1.0, 1.01])
def test_a_score_is_that_of_the_last_checkpoint_up_to_a_tenth_of_its_fourth_digit(
    tmp_path, value, share
):
    """checkpoints.csv has five digits. Every run is named; earlier checkpoints may differ."""
    allowed = 1e-4 * max(1e-6, abs(value))
    if share == 1.0 and value:
        share = 0.5
    end = value + share * allowed
    points = [line for name in "ab" for line in (at_end(name, value + 5), at_end(name, end))]
    lost = run("c", None, value, 2) | {"status": "collapsed"}
    runs = [run("a", 1.0, value), run("b", 1.0, value, 1), lost]
    found = contradictions(tmp_path, runs, [*points, at_end("c", value + 5)], {})
    expected = [
        f"runs.csv: d of {name} is {value:.6g}, its last line in checkpoints.csv has {end:.6g}"
        for name in "ab"
    ]
    assert found == (expected if abs(share) > 1 else [])


def test_a_last_line_that_lacks_another_score_is_still_compared(tmp_path):
    runs = [run("a", 1.0, 4.0)]
    points = [at_end("a", 4.0) | {"speed": 1.0}, at_end("a", 5.0) | {"speed": None}]
    assert contradictions(tmp_path, runs, points, {}) == [
        "runs.csv: d of a is 4, its last line in checkpoints.csv has 5"
    ]
