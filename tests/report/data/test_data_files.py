"""The data files: one line per run, notes on limits of the means, and the keys that make rows."""

import re

from stores import load_results, update_json, write_store

from distill_bench.config.yaml_files import dump_yaml, parse_yaml
from distill_bench.report.csv_files import read_texts
from distill_bench.report.tables.files import table_files


def test_runs_csv_has_a_line_per_run_and_per_reference(results):
    lines = read_texts(results.folder / "runs.csv")
    assert lines["method"].tolist() == ["data", "teacher"] + ["alpha"] * 6 + ["beta"] * 4
    assert lines["status"].tolist()[-4:] == ["done", "collapsed", "failed", "missing"]
    assert lines["reason"].iloc[-2] == "ValueError: out of <luck>"
    reference, run = lines.iloc[0], lines.iloc[2]
    assert reference["run_id"] == "reference-data" and reference["role"] == "data"
    assert reference["distance"] == "1.0" and reference["protocol"] == "p1"
    assert run["distance"] == "10.0" and run["distance_extractor"] == "net-1"
    assert run["role"] == "student" and run["commit"] == "abc123"
    settings = {"seed", "nfe", "version", "fake_score_updates"}
    assert settings | {"train_seconds", "cost_forward_equivalents"} <= set(lines)


def test_a_score_that_is_not_finite_is_noted_and_left_out_of_the_mean(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0), ("alpha", 1, 1, float("nan"))])
    results = load_results(store, tmp_path / "data")
    assert re.search(r"alpha-s1-.*not finite.*: distance", results.manifest["notes"][0])
    assert results.interval(results.students[0], "distance").n == 1


def test_several_versions_of_a_methods_code_are_noted(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0), ("alpha", 1, 1, 2.0)])
    attempt = next(store.glob("alpha-s1-*")) / "attempts" / "001"
    update_json(attempt / "start.json", code_fingerprint="c2")
    results = load_results(store, tmp_path / "data")
    note = "alpha ran with 2 versions of its code (c1 in 1 runs, c2 in 1 runs)"
    assert results.manifest["notes"] == [note]
    assert note in table_files(results)["table.md"]


def test_several_kinds_of_hardware_are_noted(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0), ("beta", 0, 1, 2.0), ("beta", 1, 1, 2.0)])
    for path in store.glob("*/attempts/001/start.json"):
        model = 1 if "beta-s1" in str(path) else 2
        update_json(path, hardware=f"Xeon family 6 model {model}")
    results = load_results(store, tmp_path / "data")
    counts = "Xeon family 6 model 2 in 2 runs, Xeon family 6 model 1 in 1 runs"
    note = f"the runs used 2 kinds of hardware ({counts}): one seed gives different numbers"
    assert results.manifest["notes"] == [f"{note} on different hardware"]
    students = results.runs[results.runs["role"] == "student"]
    assert set(students["hardware"]) == {"Xeon family 6 model 1", "Xeon family 6 model 2"}


def test_only_known_hardware_of_finished_runs_is_counted(tmp_path):
    runs = [("alpha", 0, 1, 1.0), ("alpha", 1, 1, 2.0), ("beta", 0, 1, None, None)]
    store = write_store(tmp_path, runs)
    for name, model in (("alpha-s0", 1), ("beta-s0", 2)):
        path = next(store.glob(f"{name}-*")) / "attempts" / "001" / "start.json"
        update_json(path, hardware=f"Xeon family 6 model {model}")
    assert load_results(store, tmp_path / "data").manifest["notes"] == []


def test_a_field_that_differs_within_a_method_makes_rows_even_if_it_is_no_axis(tmp_path):
    """`log_every` differs, too, but changes no result."""
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0), ("alpha", 1, 1, 2.0)])
    path = next(store.glob("alpha-s1-*")) / "run.yaml"
    path.write_text(dump_yaml(parse_yaml(path.read_text()) | {"nfe": 8, "log_every": 3}))
    results = load_results(store, tmp_path / "data")
    assert results.swept == ["fake_score_updates", "nfe"]
    assert len(results.students) == 2
