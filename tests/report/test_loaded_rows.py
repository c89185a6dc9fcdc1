"""Rows of a loaded study: counts, frames, scores and baseline, also where files lack lines."""

import numpy as np
import pandas as pd
import pytest
from stores import update_json, write_results

from distill_bench.report import ResultsError, load
from distill_bench.report.read_store import REFERENCE
from distill_bench.report.results import Column
from distill_bench.report.rows import COST, parse_keys
from distill_bench.report.stats import crossed_interval

COLUMNS = [Column("d", "Distance", "", "lower", True)]
TEACHER = {"run_id": "t", "method": "teacher", "role": "teacher", "status": REFERENCE, "d": 2.0}


def student(run_id, method, k, seed=0, d=1.0):
    return {"run_id": run_id, "method": method, "k": k, "seed": seed, "d": d}


def point(run_id, updates):
    return {"run_id": run_id, "student_updates": updates, COST: 10.0 * updates, "d": 1.0 / updates}


@pytest.fixture
def study(tmp_path):
    """Folder of two rows; the run `b`, of the second, has neither checkpoints nor a log."""
    runs = [TEACHER, student("a0", "a", 1, 0), student("a1", "a", 1, 1), student("b", "b", 2, 0)]
    points = [point(run_id, updates) for run_id in ("a0", "a1") for updates in (1, 2)]
    log = [{"run_id": run_id, "student_updates": 1} for run_id in ("a1", "a0", "t")]
    write_results(tmp_path, COLUMNS, ["k"], None, runs, points, log)
    return tmp_path


def test_a_reference_shows_its_state_unless_it_has_scores(tmp_path):
    lost = TEACHER | {"run_id": "u", "method": "data", "status": "missing", "d": None}
    write_results(tmp_path, COLUMNS, [], None, [TEACHER, lost], [point("t", 1)], [point("t", 1)])
    results = load(tmp_path)
    assert [row.count for row in results.rows] == ["reference", "reference (missing)"]
    assert results.students == [] and results.baseline is None


def test_lost_runs_are_counted_in_the_order_of_their_states(tmp_path):
    states = ["done", "failed", "missing", "missing"]
    runs = [student(f"a{i}", "a", 1, i) | {"status": state} for i, state in enumerate(states)]
    write_results(tmp_path, COLUMNS, ["k"], None, runs, [point("a0", 1)], [point("a0", 1)])
    (row,) = load(tmp_path).students
    assert row.count == "1/4 (1 failed, 2 missing)" and row.lost == "1 failed, 2 missing"


def test_a_reference_is_labelled_by_its_kind_alone(study):
    (teacher,) = load(study).references
    assert teacher.label == teacher.series == teacher.stem == teacher.method == "teacher"
    assert teacher.settings == teacher.swept == {} and teacher.at == ""


def test_a_row_has_the_checkpoints_and_the_log_of_its_runs_alone(study):
    a, b = load(study).students
    assert a.checkpoints["run_id"].tolist() == ["a0", "a0", "a1", "a1"]
    assert a.training["run_id"].tolist() == ["a1", "a0"]
    assert b.checkpoints.empty and b.training.empty
    assert set(a.curves("d")) == {0, 1} and b.curves("d") == b.at_cost("d", 10.0) == {}


def test_curves_ascend_in_whatever_order_the_checkpoints_are_written(study):
    path = study / "checkpoints.csv"
    before = load(study).students[0].curves("d")
    pd.read_csv(path).iloc[::-1].to_csv(path, index=False)
    for seed, curve in load(study).students[0].curves("d").items():
        assert np.array_equal(curve, before[seed]) and curve[0].tolist() == [1.0, 2.0]


def test_a_checkpoint_of_unknown_cost_or_score_is_no_point_of_a_curve(tmp_path):
    points = [point("a", updates) for updates in (1, 2, 4)]
    points[0][COST] = points[1]["d"] = None
    log = [{"run_id": "a", "student_updates": 1}]
    write_results(tmp_path, COLUMNS, ["k"], None, [student("a", "a", 1)], points, log)
    (row,) = load(tmp_path).students
    by_cost, by_updates = row.curves("d", COST)[0], row.curves("d")[0]
    assert [values.tolist() for values in by_cost] == [[40.0], [0.25]]
    assert [values.tolist() for values in by_updates] == [[1, 4], [1.0, 0.25]]


def test_an_unknown_score_has_no_seeds_and_seeds_are_whole_numbers(study):
    results = load(study)
    row = results.students[0]
    assert row.by_seed("unknown") == {} and results.interval(row, "unknown") is None
    assert [str(seed) for seed in row.by_seed("d")] == ["0", "1"]
    assert results.runs["seed"].isna().tolist() == [True, False, False, False]


def test_a_study_without_checkpoints_and_logs_has_no_curves(study):
    for name in ("checkpoints.csv", "training.csv"):
        (study / name).unlink()
    results = load(study)
    assert results.checkpoints.empty and results.training.empty
    assert all(row.curves("d") == {} and row.training.empty for row in results.rows)
    heads = "run_id,student_updates,loss"
    (study / "training.csv").write_text(f"{heads}\n")
    assert load(study).training.columns.tolist() == heads.split(",")


@pytest.mark.parametrize("name", ["checkpoints.csv", "training.csv"])
def test_a_log_without_run_ids_or_with_words_is_refused_by_its_name(study, name):
    text = (study / name).read_text()
    (study / name).write_text(text.replace("run_id", "run"))
    with pytest.raises(ResultsError, match=f"{name} has no column run_id"):
        load(study)
    (study / name).write_text(text.replace("a1,1", "a1,one"))
    with pytest.raises(ResultsError, match=f"{name} is damaged"):
        load(study)


def test_a_baseline_that_no_row_or_two_rows_fit_is_named_beside_the_rows(study):
    update_json(study / "sweep.json", baseline={"method": "c"})
    with pytest.raises(ResultsError) as error:
        _ = load(study).baseline
    known = "method=a,k=1; method=b,k=2"
    assert str(error.value) == f"no row is the baseline method=c; known: {known}"
    lines = pd.read_csv(study / "runs.csv", dtype=str, keep_default_na=False)
    lines.loc[lines["run_id"] == "b", "method"] = "a"
    lines.to_csv(study / "runs.csv", index=False)
    update_json(study / "sweep.json", baseline={"method": "a"})
    with pytest.raises(ResultsError) as error:
        _ = load(study).baseline
    assert str(error.value) == "the baseline method=a fits 2 rows: method=a,k=1; method=a,k=2"


def test_prompts_cluster_the_clips_of_scores_with_a_value_per_prompt_alone(study):
    """A score with fewer values, of pairs of clips say, is taken over its values one by one."""
    update_json(study / "sweep.json", prompts=[0, 0, 1, 1])
    values = {"a0": [1.0, 3.0, 8.0, 4.0], "a1": [2.0, 6.0, 5.0, 7.0]}

    def interval(count):
        lines = [(run, "d", " ".join(map(str, scores[:count]))) for run, scores in values.items()]
        frame = pd.DataFrame(lines, columns=["run_id", "column", "values"])
        frame.to_csv(study / "clips.csv", index=False)
        results = load(study)
        return results.interval(results.students[0], "d").half

    def expected(count, clusters):
        scores = np.array([scores[:count] for scores in values.values()])
        centred = scores - scores.mean(axis=1, keepdims=True) + 1.0  # the score of both runs is 1
        return pytest.approx(crossed_interval(centred, clusters=clusters).half)

    assert interval(4) == expected(4, [0, 0, 1, 1])
    assert interval(3) == expected(3, None)
    assert load(study).clusters({4}) == [0, 0, 1, 1]
    assert load(study).clusters({1, 4}) is None, "rows that differ are compared by their means"


def test_a_value_may_have_an_equals_sign():
    assert parse_keys("method=a,init=x=1") == {"method": "a", "init": "x=1"}
