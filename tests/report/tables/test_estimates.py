"""Estimates of contrasts on made-up scores: seeds in common, clips of one prompt, words, cells."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from stores import update_json, write_results

from distill_bench.report.declarations import ADDED, FIRST, UNKNOWN
from distill_bench.report.results import Column, load
from distill_bench.report.rows import COST
from distill_bench.report.stats import CONFIDENCE, Interval
from distill_bench.report.tables.contrasts import (
    Estimate,
    contrast_cells,
    contrast_grid,
    contrast_heads,
    declaration,
    estimates,
    sides,
)
from distill_bench.report.tables.scores import Cell

SCORES = [Column("d", "Distance", "", "lower", True), Column("u", "Use", "", "higher", True)]
CLIPS = {  # method -> training seed -> values per clip, two of each prompt
    "a": {0: [1.0, 1.5, 8.0, 8.5], 1: [2.0, 2.0, 9.0, 9.5], 2: [1.0, 1.5, 8.5, 8.0]},
    "b": {0: [5.0, 5.5, 3.0, 3.5], 1: [6.5, 6.0, 4.0, 4.5], 2: [5.0, 5.5, 3.5, 3.0]},
    "c": {2: [4.0, 4.0, 5.0, 6.0], 3: [4.5, 4.0, 5.5, 6.0]},
    "d": {4: [0.0, 1.0, 2.0, 3.0]},
}
COSTS = {"a": 100.0, "b": 120.0, "c": 110.0, "d": 130.0}


def study(folder, contrasts, prompts=(0, 0, 1, 1), clips=CLIPS, costs=COSTS):
    """Results of four rows whose distance is the mean of their clips, halved on the way."""
    folder.mkdir(exist_ok=True)
    runs, lines, points = [], [], []
    for method, by_seed in clips.items():
        for seed, values in by_seed.items():
            run = f"{method}{seed}"
            cost, mean = costs.get(method), float(np.mean(values))
            line = {"run_id": run, "method": method, "seed": seed, "d": mean, "u": mean}
            runs.append(line | {COST: cost})
            lines.append((run, "u", " ".join(map(str, values))))
            for share in (0.5, 1.0):
                at = {"run_id": run, "student_updates": 20 * share, COST: cost and cost * share}
                points.append(at | {"d": mean / share})
    write_results(folder, SCORES, [], None, runs, points, [{"run_id": "a0", "loss": 1.0}])
    frame = pd.DataFrame(lines, columns=["run_id", "column", "values"])
    frame.to_csv(folder / "clips.csv", index=False)
    update_json(folder / "sweep.json", prompts=list(prompts), contrasts=contrasts, launch=None)
    return load(folder)


def contrast(weights, scores=("d",), at="end", declared=FIRST, name="one", runs=None):
    terms = [
        {"weight": weight, "runs": runs or [f"{method}{seed}" for seed in CLIPS[method]]}
        for method, weight in weights.items()
    ]
    options = {"at": at, "declared": declared, "since": "", "difference_of": None}
    return {"name": name, "terms": terms, "scores": list(scores)} | options


def test_clips_of_one_prompt_are_one_observation(tmp_path):
    """The rows' ranks differ between the prompts, so that two prompts say little."""
    results = study(tmp_path, [contrast({"a": 1.0, "b": -1.0}, ["u"])])
    (estimate,) = estimates(results)
    values = np.array([np.subtract(CLIPS["a"][s], CLIPS["b"][s]) for s in range(3)])
    prompts = values.reshape(3, 2, 2).mean((0, 2))
    parts = [values.mean(1).var(ddof=1) / 3, prompts.var(ddof=1) / 2]
    dof = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 1)
    half = stats.t.ppf(0.975, dof) * sum(parts) ** 0.5
    assert estimate.interval.mean == pytest.approx(values.mean())
    assert estimate.interval.half == pytest.approx(half, rel=0.06)
    assert estimate.clip_error == pytest.approx(parts[1] ** 0.5, rel=0.06)
    assert estimate.sd == pytest.approx(values.mean(1).std(ddof=1))


def test_the_error_by_the_clips_is_what_the_common_seeds_leave(tmp_path):
    """A failed seed is no part of the spread over seeds, which is wide here."""
    spread = {0: [0.0, 4.0], 1: [5.0, 9.0], 2: [-6.0, -2.0]}
    clips = {"a": spread, "b": {seed: [0.0, 0.0] for seed in range(5)}}
    one = contrast({"a": 1.0, "b": -1.0}, ["u"])
    for term, method in zip(one["terms"], "ab", strict=True):
        term["runs"] = [f"{method}{seed}" for seed in range(5)]
    results = study(tmp_path, [one], (0, 1), clips)
    failed = [{"run_id": f"a{seed}", "method": "a", "seed": seed} for seed in (3, 4)]
    lines = pd.concat([results.runs, pd.DataFrame(failed).assign(role="student", status="failed")])
    results = replace(results, runs=lines)
    (estimate,) = estimates(results)
    assert (estimate.seeds, estimate.expected) == (3, 5)
    assert estimate.clip_error == pytest.approx(2.0, rel=0.06), "the clips are 4 apart"


def test_two_clips_have_a_spread_and_two_seeds_too(tmp_path):
    clips = {"a": {0: [1.0, 5.0], 1: [2.0, 8.0]}, "b": {0: [0.0, 0.0], 1: [0.0, 0.0]}}
    weights = {"a": 1.0, "b": -1.0}
    both = contrast(weights, ["u"], runs=["a0", "a1", "b0", "b1"])
    both["terms"][0]["runs"], both["terms"][1]["runs"] = ["a0", "a1"], ["b0", "b1"]
    (estimate,) = estimates(study(tmp_path, [both], (0, 1), clips))
    assert estimate.sd == pytest.approx(np.std([3.0, 5.0], ddof=1))
    assert estimate.clip_error == pytest.approx(np.std([1.5, 6.5], ddof=1) / 2**0.5, rel=0.06)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("score", ["d", "u"])
def test_the_level_is_the_mean_over_the_rows_of_the_common_seeds(tmp_path, score):
    weights = {"a": 0.5, "b": 0.5, "c": -1.0}
    (estimate,) = estimates(study(tmp_path, [contrast(weights, [score])]))
    means = [np.mean(CLIPS[method][2]) for method in "abc"]
    assert estimate.level == pytest.approx(np.mean(means))
    assert estimate.interval.mean == pytest.approx((means[0] + means[1]) / 2 - means[2])
    assert estimate.seeds == 1 and estimate.expected == 1, "a and b have seed 2 in common with c"
    assert np.isnan(estimate.sd) and estimate.clip_error == 0.0


@pytest.mark.parametrize("score", ["d", "u"])
def test_without_a_common_seed_there_is_no_estimate(tmp_path, score):
    entry = contrast({"a": 1.0, "d": -1.0}, [score])
    (estimate,) = estimates(study(tmp_path, [entry]))
    column = next(column for column in SCORES if column.name == score)
    assert estimate.contrast == entry and estimate.column == column
    assert estimate.interval is None and (estimate.seeds, estimate.expected) == (0, 0)
    assert estimate.clip_error == 0.0 and not estimate.clear and estimate.comparisons == 0
    assert np.isnan([estimate.sd, estimate.level, estimate.p, estimate.p_holm]).all()
    assert contrast_cells(estimate)[2:5] == [Cell("0", 0), Cell("—"), Cell("—")]


def test_a_score_that_no_run_has_yet_is_named_by_its_column(tmp_path):
    (estimate,) = estimates(study(tmp_path, [contrast({"a": 1.0, "b": -1.0}, ["fvd"])]))
    assert estimate.column == Column("fvd", "fvd") and estimate.seeds == 0


def test_seeds_that_a_contrast_does_not_name_do_not_count(tmp_path):
    """Runs are named one by one: a row may have been trained with more seeds since."""
    entry = contrast({"a": 1.0, "b": -1.0})
    entry["terms"][0]["runs"] = ["a1"]
    (estimate,) = estimates(study(tmp_path, [entry]))
    assert (estimate.seeds, estimate.expected) == (1, 1)
    expected = np.mean(CLIPS["a"][1]) - np.mean(CLIPS["b"][1])
    assert estimate.interval.mean == pytest.approx(expected)


def test_the_cost_of_a_contrast_is_that_which_its_own_rows_reach(tmp_path):
    """Not the cost that every row of the sweep reaches, which is lower."""
    entry = contrast({"b": 1.0, "c": -1.0}, at="equal_cost")
    (estimate,) = estimates(study(tmp_path / "costs", [entry]))
    b, c = np.mean(CLIPS["b"][2]), np.mean(CLIPS["c"][2])
    at_110 = np.interp(110.0, [60.0, 120.0], [2 * b, b])
    assert estimate.interval.mean == pytest.approx(at_110 - c)
    (estimate,) = estimates(study(tmp_path / "none", [entry], costs={}))
    assert estimate.interval is None, "without costs there is no equal cost"


def test_a_contrast_is_clear_if_p_is_below_5_percent():
    estimate = Estimate({}, SCORES[0], None, 3, 1.0, 0.0, 1.0)
    for p, clear in ((0.049, True), (1 - CONFIDENCE, False), (0.051, False), (np.nan, False)):
        assert replace(estimate, p_holm=p).clear is clear


def test_the_sides_of_a_contrast_are_rows_means_of_rows_or_contrasts(tmp_path):
    pair = contrast({"a": 2.0, "b": -2.0})
    average = contrast({"a": 0.5, "b": 0.5, "c": -0.25, "d": -0.75})
    results = study(tmp_path, [pair, average])
    assert sides(results, pair) == "A − B"
    assert sides(results, average) == "mean of (A; B) − mean of (C; D)"
    assert sides(results, pair | {"difference_of": ["x", "y"]}) == "(x) − (y)"


def made_up(name, column, n, mean, p_holm, declared=FIRST, at="end", comparisons=3, expected=3):
    interval = Interval(mean, mean - 1.0, mean + 1.0, n, error=0.4, dof=2)
    entry = contrast({}, name=name, declared=declared, at=at)
    return Estimate(entry, column, interval, expected, 1.0, 0.0, 1.0, p_holm, comparisons)


def test_a_line_has_seeds_the_difference_in_bold_if_clear_and_p():
    estimate = made_up("one", SCORES[1], 2, -4.0, 0.02)
    assert contrast_cells(estimate) == [
        Cell("one"),
        Cell("Use"),
        Cell("2/3", 2),
        Cell("-4.0 ± 1.0", -4.0, best=True),
        Cell("0.020", 0.02),
        Cell("before the runs"),
    ]
    later = made_up("one", SCORES[0], 3, 4.0, 0.2, ADDED, "equal_cost")
    assert contrast_cells(later) == [
        Cell("one (at equal cost)"),
        Cell("Distance"),
        Cell("3", 3),
        Cell("+4.0 ± 1.0", 4.0, best=False),
        Cell("0.20", 0.2),
        Cell("added later"),
    ]
    assert contrast_heads([estimate, replace(later, comparisons=5)]) == [
        "contrast",
        "score",
        "seeds",
        "difference",
        "p (Holm over 3 or 5)",
        "declared",
    ]


@pytest.mark.parametrize("declared", [FIRST, UNKNOWN])
def test_a_grid_has_a_line_per_contrast_and_a_column_per_score(declared):
    one = made_up("one", SCORES[0], 3, 4.0, 0.01)
    two = made_up("two", SCORES[1], 3, 5.0, 0.9, declared)
    other = replace(made_up("", SCORES[1], 2, -6.0, 0.01), contrast=one.contrast)
    heads, lines = contrast_grid([one, other, two])
    later = declared != FIRST
    assert heads == ["contrast", "seeds", "Distance", "Use", *["declared"] * later]
    notes = ["before the runs", "unknown"]
    assert lines == [
        [
            Cell("one"),
            Cell("3, 2/3"),
            Cell("+4.0 ± 1.0", 4.0, best=True),
            Cell("-6.0 ± 1.0", -6.0, best=True),
            *[Cell(notes[0])] * later,
        ],
        [Cell("two"), Cell("3"), Cell("—"), Cell("+5.0 ± 1.0", 5.0), *[Cell(notes[1])] * later],
    ]


def test_the_declaration_says_what_is_known_of_the_first_launch(tmp_path):
    results = study(tmp_path, [])
    launch = {"time": "noon", "digest": "abcdefabcdefXYZ", "begun": 0, "dropped": []}
    first = "Sweep file at the first launch (noon): SHA-256 abcdefabcdef."
    newest = " At the newest launch: 123456123456."
    begun = (
        " 4 of its runs had begun before: it is unknown whether the contrasts were declared "
        "without knowing their scores."
    )
    dropped = " Declared once, and no longer in the file: x, y."
    same = {"last_digest": "abcdefabcdefXYZ"}
    for fields, text in (
        (same, first),
        ({"last_digest": "123456123456XYZ"}, first + newest),
        (same | {"begun": 4}, first + begun),
        (same | {"dropped": ["x", "y"]}, first + dropped),
        ({"last_digest": "123456123456", "begun": 4, "dropped": ["x", "y"]}, None),
    ):
        known = replace(results, manifest=results.manifest | {"launch": launch | fields})
        assert declaration(known) == (text or first + newest + begun + dropped)
