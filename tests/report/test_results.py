"""Results loaded as frames and rows, and the labels of rows."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from stores import load_results, update_json, write_results, write_run, write_store

from distill_bench.report import ResultsError, load
from distill_bench.report.results import COSTS, Column, load_data_files
from distill_bench.report.rows import COST, is_value, key_texts, parse_keys


def test_a_study_is_loaded_by_its_name_or_its_folder(tabulated, tmp_path, monkeypatch):
    folder = tabulated[0]
    monkeypatch.chdir(folder.parent.parent)
    by_name, by_folder = load("speed"), load(folder)
    pd.testing.assert_frame_equal(by_name.runs, by_folder.runs)
    assert by_name.question == "Does a faster fake_score pay?"
    assert by_name.baseline.label == "Alpha, K=1"
    with pytest.raises(ResultsError, match="no sweep.json in results/nothing"):
        load("nothing")
    with pytest.raises(ResultsError, match="; known: speed$"):
        load("nothing")
    assert re.fullmatch(r"<results of speed: \d rows, \d references>", repr(by_name))


def test_frames_have_numbers_as_numbers_and_every_digit_of_the_files(tabulated):
    study = load(tabulated[0])
    assert study.runs["seed"].dropna().tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3]
    assert study.runs["distance"].dtype == study.checkpoints["seconds"].dtype == float
    written = pd.read_csv(tabulated[0] / "runs.csv", dtype=str)["speed"].dropna()
    assert study.runs["speed"].dropna().map(repr).tolist() == written.tolist()
    alpha = study.clips.query("run_id.str.startswith('alpha-s1') and column == 'speed'")
    assert alpha["clip"].tolist() == [0, 1, 2] * 2
    assert study.clips.columns.tolist() == ["run_id", "column", "clip", "value"]
    assert set(study.differences["column"]) == {"distance", "speed"}
    assert len(study.table) == len(study.rows) and len(study.equal_cost) == len(study.students)


@pytest.mark.parametrize(
    "unit, better, heading, axis",
    [
        ("px", "lower", "Speed (px) ↓", "Speed (px, lower is better)"),
        ("", "higher", "Speed ↑", "Speed (higher is better)"),
        ("s", "one", "Speed (s) → 1", "Speed (s, 1 is best)"),
        ("s", None, "Speed (s)", "Speed (s)"),
        ("", None, "Speed", "Speed"),
    ],
)
def test_a_heading_has_unit_and_direction(unit, better, heading, axis):
    column = Column("s", "Speed", unit, better)
    assert column.heading == heading and column.axis_label == axis


def test_texts_of_data_files_are_loaded_as_the_files_are(results):
    names = ("sweep.json", "runs.csv", "clips.csv", "checkpoints.csv", "training.csv")
    loaded = load_data_files({name: (results.folder / name).read_text() for name in names})
    assert loaded.manifest == results.manifest
    for frame in ("runs", "checkpoints", "training", "clips"):
        pd.testing.assert_frame_equal(getattr(loaded, frame), getattr(results, frame))
    assert [row.label for row in loaded.rows] == [row.label for row in results.rows]


def test_declared_contrasts_are_those_of_the_manifest(results):
    assert load(results.folder).contrasts == []
    declared = [{"name": "one against two"}]
    update_json(results.folder / "sweep.json", contrasts=declared)
    assert load(results.folder).contrasts == declared


def test_costs_have_units():
    heads = {cost.name: cost.heading for cost in COSTS}
    assert heads["peak_memory_gib"] == "Peak memory (GiB)"


def test_the_table_of_contrasts_is_empty_or_that_of_the_file(results):
    assert load(results.folder).contrast_table.empty
    (results.folder / "contrasts.csv").write_text("contrast,p\none,0.5\n")
    table = load(results.folder).contrast_table
    assert table.to_dict("records") == [{"contrast": "one", "p": 0.5}]


def test_a_student_that_is_sampled_otherwise_has_the_keys_of_its_training(tmp_path):
    runs = [
        {"run_id": f"r{way}", "method": "a", "seed": 0, "d": 5.0, "lr": "1e-4", "sampling.nfe": nfe}
        for way, nfe in (("", 4), ("/samplings/ode-nfe8", 8))
    ]
    point = {"run_id": "r", "student_updates": 1, "d": 1.0}
    columns, swept = [Column("d", "Distance", "", "lower", True)], ["lr", "sampling.nfe"]
    write_results(tmp_path, columns, swept, None, runs, [point], [point])
    own, further = load(tmp_path).students
    assert own.as_trained and not further.as_trained
    assert own.training_keys == further.training_keys == (("method", "a"), ("lr", "1e-4"))
    assert [row.keys["sampling.nfe"] for row in (own, further)] == ["4", "8"]


def test_footnotes_are_numbered_in_the_order_of_the_rows_and_marked_once(tmp_path):
    warnings = [
        '{"d": ["few clips", "old network"]}',
        '{"e": ["old network"], "d": ["few clips"]}',
        "",
    ]
    runs = [
        {"run_id": f"r{seed}", "method": "a", "seed": seed, "d": 1.0, "e": 2.0, "warnings": text}
        for seed, text in enumerate(warnings)
    ]
    runs.append({"run_id": "s", "method": "b", "seed": 0, "d": 1.0, "e": 1.0, "warnings": ""})
    columns = [Column(name, name, "", "lower", True) for name in "de"]
    point = {"run_id": "r0", "student_updates": 1, "d": 1.0}
    write_results(tmp_path, columns, [], None, runs, [point], [point])
    results = load(tmp_path)
    assert results.footnotes == [
        ("few clips", [("r0", "d"), ("r1", "d")]),
        ("old network", [("r0", "d"), ("r1", "e")]),
    ]
    a, b = results.students
    assert results.marks(a, "d") == [1, 2] and results.marks(a, "e") == [2]
    assert results.marks(b, "d") == results.marks(b, "e") == []


def test_scores_at_a_cost_are_interpolated_between_checkpoints(results):
    row = results.students[0]
    points = row.checkpoints[row.checkpoints["run_id"] == row.runs["run_id"].iloc[0]]
    columns = ["student_updates", "cost_forward_equivalents", "distance"]
    assert points[columns].to_numpy().tolist() == [[10, 1000, 30], [20, 2000, 10]]
    assert row.at_cost("distance", 1500.0)[0] == pytest.approx(20.0)
    assert row.at_cost("distance", 900.0) == row.at_cost("distance", 2100.0) == {}


@pytest.fixture
def curve(tmp_path):
    """The row of one run, evaluated four times; its second score is not finite."""
    points = [(10, 100.0, 8.0), (20, 200.0, None), (30, 300.0, 2.0), (40, 400.0, 5.0)]
    checkpoints = [
        {"run_id": "r", "student_updates": updates, COST: cost, "d": score}
        for updates, cost, score in points
    ]
    run = {"run_id": "r", "method": "a", "seed": 3, "d": 5.0, COST: 400.0}
    training = [{"run_id": "r", "student_updates": 1}]
    columns = [Column("d", "Distance", "", "lower", True)]
    write_results(tmp_path, columns, [], None, [run], checkpoints, training)
    (row,) = load(tmp_path).students
    return row


@pytest.mark.parametrize(
    "cost, score",
    [
        (100.0, 8.0),
        (150.0, 6.5),  # between the finite scores at 100 and 300
        (300.0, 2.0),
        (375.0, 4.25),
        (400.0, 5.0),
        (100.0 * (1 - 5e-7), 8.0),  # a cost is written with six digits
        (400.0 * (1 + 5e-7), 5.0),
        (100.0 * (1 - 5e-6), None),
        (400.0 * (1 + 5e-6), None),
        (50.0, None),
    ],
)
def test_a_score_at_a_cost_is_linear_between_finite_scores_and_never_extrapolated(
    curve, cost, score
):
    expected = {} if score is None else {3: pytest.approx(score)}
    assert curve.at_cost("d", cost) == expected
    assert curve.at_cost("unknown", cost) == {}


def test_seeds_with_unequal_numbers_of_clips_count_equally(tabulated, tmp_path):
    folder = shutil.copytree(tabulated[0], tmp_path / "speed")
    lines = pd.read_csv(folder / "clips.csv", dtype=str)
    first = lines.index[lines["run_id"].str.startswith("alpha-s0")][0]
    lines.loc[first, "values"] = " ".join(lines.loc[first, "values"].split()[:2])
    lines.to_csv(folder / "clips.csv", index=False)
    study = load(folder)
    row = study.students[0]
    assert {len(values) for values in row.by_seed("speed").values()} == {2, 3}
    interval = study.interval(row, "speed")
    assert interval.mean == pytest.approx(row.runs["speed"].mean())
    assert interval.error == pytest.approx(row.runs["speed"].sem())


def test_the_mean_over_clips_is_the_score(results):
    row = results.students[0]
    speed = row.by_seed("speed")[1]
    assert len(speed) == 3
    assert speed.mean() == pytest.approx(row.runs["speed"].iloc[1], rel=1e-12)
    assert row.by_seed("distance")[1].tolist() == [11.1], "no value per clip"


def test_a_row_has_the_mean_over_its_seeds_and_counts_its_lost_runs(results):
    assert [row.label for row in results.rows] == [
        "data",
        "teacher",
        "Alpha, K=1",
        "Alpha, K=5",
        "Beta, K=1",
    ]
    alpha, _, beta = results.students
    assert results.interval(alpha, "distance").mean == pytest.approx(11.1)
    assert alpha.count == "3"
    assert beta.count == "1/4 (1 collapsed, 1 failed, 1 missing)"
    single = results.interval(beta, "distance")
    assert single.n == 1 and not np.isfinite(single.low)


def test_the_interval_of_a_reference_is_over_its_clips(results):
    teacher = results.references[1]
    sd = 0.25  # under resampling of clips
    distance = results.interval(teacher, "distance")
    assert distance.half == pytest.approx(1.96 * sd) and distance.n == 1
    assert results.interval(teacher, "speed").half > 0


def test_keys_of_a_row_are_parsed_and_matched_as_numbers(results):
    (row,) = results.matching(parse_keys("method=alpha, fake_score_updates=5.0"))
    assert row.name == "method=alpha,fake_score_updates=5"
    with pytest.raises(ResultsError, match="'gamma' is not KEY=VALUE"):
        parse_keys("gamma")


def test_keys_are_written_as_they_are_parsed():
    keys = {"x": 4, "name": "a b", "none": None, "on": True, "to": [1, "q"], "of": {"a": 1.5}}
    text = 'x=4,name=a b,none=null,on=true,to=[1, "q"],of={"a": 1.5}'
    assert key_texts(keys) == text and parse_keys(text) == keys
    assert parse_keys(" x = 4, name= a b") == {"x": 4, "name": "a b"}
    for wrong, named in (("x=1,y", "'y' is not KEY=VALUE"), ("x=1,to=[1, 2", r"'to=\[1, 2': ")):
        with pytest.raises(ResultsError, match=named):
            parse_keys(wrong)


@pytest.mark.parametrize(
    "cell, value, same",
    [
        (None, None, False),
        (None, 1, False),
        ("", None, True),
        ("0", None, False),
        ("True", True, True),
        ("1", True, False),
        ("", False, False),
        ("False", False, True),
        ("4", 4.0, True),
        ("0.0001", "1e-4", True),
        ("4", 5, False),
        ("nan", "x", False),
        ("ode", "ode", True),
        ("ode", "sde", False),
        ("ODE", "ode", False),
        ('{"rank": 4}', {"rank": 4}, True),
        ('{"rank": 4}', {"rank": 5}, False),
        ("[1, 2]", [2, 1], False),
        ("text", [1], False),
    ],
)
def test_a_cell_holds_a_value_if_it_is_written_for_it(cell, value, same):
    assert is_value(cell, value) is same


def test_studies_beside_a_missing_folder_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rewrite = "`python -m distill_bench.report SWEEP` writes it again"

    def message(name):
        with pytest.raises(ResultsError) as error:
            load(name)
        return str(error.value)

    assert message("c") == f"no sweep.json in results/c; {rewrite}"
    for name in ("b", "a"):
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "sweep.json").write_text("{}")
    (tmp_path / "results" / "empty").mkdir()
    assert message("c") == f"no sweep.json in results/c; {rewrite}; known: a, b"
    assert message("empty") == f"no sweep.json in results/empty; {rewrite}"
    assert message("a") == f"no runs.csv in results/a; {rewrite}"


def _results_of(tmp_path, cells, **manifest):
    """Results of `alpha` with two seeds per cell; a cell gives further keys of the runs."""
    axes = {key: [] for cell in cells for key in cell}
    store = write_store(tmp_path, [], (), axes=axes, **manifest)
    runs = [write_run(store, "alpha", seed, 1, 2.0, **cell) for cell in cells for seed in (0, 1)]
    update_json(store / "sweeps" / "speed.json", run_ids=runs)
    return load_results(store, tmp_path / "results")


@pytest.mark.parametrize("baseline", [
    {"method": "alpha", "ema": None, "reuse": False},
    {"method": "alpha", "ema": None, "reuse": False, "nfe": 4},  # nfe is equal in all runs
    {"method": {"name": "alpha"}, "ema": None, "reuse": False},
    parse_keys("method=alpha,ema=null,reuse=false"),
    parse_keys("method=alpha, ema=~, reuse=False"),
])  # fmt: skip
def test_null_and_switches_name_a_row(tmp_path, baseline):
    cells = [{"ema": ema, "reuse": reuse} for ema in (0.5, None) for reuse in (True, False)]
    results = _results_of(tmp_path, cells, baseline=baseline)
    assert results.baseline.keys == {"method": "alpha", "ema": "", "reuse": "False"}
    assert results.baseline.label == "Alpha, no EMA, no reuse"
    assert results.matching(parse_keys(results.baseline.name)) == [results.baseline]


def test_a_mapping_that_is_null_in_some_runs_separates_rows(tmp_path):
    cells = [{"adapter": adapter} for adapter in (None, {"rank": 4, "to": ["q", "k"]})]
    keys = 'adapter={rank: 4, to: ["q", "k"]}'
    results = _results_of(tmp_path, cells, baseline=parse_keys(keys))
    assert [len(row.runs) for row in results.students] == [2, 2]
    assert [row.label for row in results.students] == ["Alpha", "Alpha, rank 4"]
    assert results.baseline.label == "Alpha, rank 4"
    assert results.matching(parse_keys(results.baseline.name)) == [results.baseline]


def test_labels_of_two_rows_differ_even_if_one_has_null(tmp_path):
    cells = [{"ema": None, "lr": 1.0}, {"ema": 0.5, "lr": 1.0}, {"ema": 0.5, "lr": 2.0}]
    labels = [row.label for row in _results_of(tmp_path, cells).students]
    assert labels == ["Alpha, no EMA, lr 1", "Alpha, lr 1", "Alpha, lr 2"]


def test_a_run_that_is_older_than_a_key_has_its_default(tmp_path):
    results = _results_of(tmp_path, [{}, {"compile": True}], baseline={"compile": False})
    assert [row.swept["compile"] for row in results.students] == ["False", "True"]
    assert results.baseline is results.students[0]


def test_a_baseline_that_fits_two_rows_is_refused(tmp_path):
    cells = [{"ema": ema} for ema in (0.5, None)]
    with pytest.raises(ResultsError, match="the baseline method=alpha fits 2 rows: .*ema=null"):
        _ = _results_of(tmp_path, cells, baseline={"method": "alpha"}).baseline


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("runs.csv", "\n", ",more\n", "runs.csv"),
        ("runs.csv", "role", "roll", "runs.csv has no column role"),
        ("runs.csv", ",10.0,", ",ten,", "runs.csv is damaged"),
        ("checkpoints.csv", ",30.0", "", r"checkpoints.csv:2 does not have one cell per column"),
        ("clips.csv", "values", "value", "clips.csv has no column values"),
        ("sweep.json", '"swept"', '"sweep"', "sweep.json has no swept"),
    ],
)
def test_a_damaged_data_file_is_named(tabulated, tmp_path, name, old, new, message):
    folder = shutil.copytree(tabulated[0], tmp_path / "speed")
    text = (folder / name).read_text()
    first, separator, rest = text.partition(old)
    assert separator
    (folder / name).write_text(first + new + rest)
    with pytest.raises(ResultsError, match=message):
        load(folder)


# --- labels: as short as possible, and no shorter ---


def test_a_label_has_the_values_that_tell_rows_apart_and_no_others(tmp_path):
    store = tmp_path / "runs"
    plain, other = ({"name": "alpha", "kind": kind} for kind in ("plain", "other"))
    for cadence in (1, 5):
        write_run(store, "alpha", 0, cadence, 1.0, method=plain, reuse=False, lr=1e-4)
        write_run(store, "alpha", 0, cadence, 1.0, method=other, reuse=True, lr=1e-4)
        write_run(store, "beta", 0, cadence, 1.0, reuse=False, lr=1e-4)
    write_run(store, "beta", 0, 1, 1.0, reuse=False, lr=5e-4)
    run_ids = sorted(path.name for path in store.iterdir())
    axes = {"method": [], "fake_score_updates": [1, 5], "method.kind": [], "reuse": [], "lr": []}
    (store / "sweeps").mkdir()
    sweep = {"question": "?", "run_ids": run_ids, "axes": axes}
    (store / "sweeps" / "speed.json").write_text(json.dumps(sweep))
    series = {row.series for row in load_results(store, tmp_path / "data").students}
    assert series == {"Alpha, plain", "Alpha, other", "Beta", "Beta, lr 0.0005"}


def test_a_label_shows_a_setting_that_only_differs_between_methods(tmp_path):
    """Beta has one row, so its name would do, but its row also reuses the rollout."""
    store = write_store(tmp_path, [])
    run_ids = [
        write_run(store, method, 0, cadence, 4.0, reuse_rollout=method == "beta")
        for method, cadence in (("alpha", 1), ("alpha", 5), ("beta", 1))
    ]
    axes = {"method": [], "fake_score_updates": [1, 5], "reuse_rollout": [False, True]}
    update_json(store / "sweeps" / "speed.json", run_ids=run_ids, axes=axes)
    assert [row.label for row in load_results(store, tmp_path / "data").students] == [
        "Alpha, K=1",
        "Alpha, K=5",
        "Beta, reused rollout, K=1",
    ]
