"""Every cell of the data files follows from the records of a store that is written by hand."""

import csv
import io
import json

import pytest
from stores import edit_lines, score, update_json, write_lines, write_run, write_store

from distill_bench.report.data_files import TRAINING_LINES, data_files
from distill_bench.report.read_store import read_sweep

COST = "cost_forward_equivalents"


def read(store, name):
    """A data file; no column of a CSV file stands twice in it."""
    text = data_files(read_sweep("speed", store))[name]
    if name.endswith(".json"):
        return json.loads(text)
    lines = csv.DictReader(io.StringIO(text))
    assert len(set(lines.fieldnames)) == len(lines.fieldnames)
    return list(lines)


def sweep_of(store, *run_ids, **fields):
    update_json(store / "sweeps" / "speed.json", run_ids=run_ids, **fields)


@pytest.fixture
def empty(tmp_path):
    return write_store(tmp_path, [], ())


EVERY = {  # of a finished run of `stores.write_run`, as text
    "role": "student",
    "student_updates": "20",
    "nfe": "4",
    "train_seconds": "10.0",
    "peak_memory_gib": "0.5",
    "protocol": "p1",
    "version": "0.1.0",
    "commit": "abc123",
    "code_fingerprint": "c1",
    "distance_sd": "0.25",
    "distance_extractor": "net-1",
    "detail": "0.5",
}


def line(header, run_id, method, seed, status, **cells):
    """A line of runs.csv: these cells, and every other one is empty."""
    given = {"run_id": run_id, "method": method, "seed": str(seed), "status": status} | cells
    return dict.fromkeys(header, "") | given


def test_every_cell_of_runs_csv_is_a_record_or_empty(tmp_path):
    runs = [("alpha", 0, 1, 10.0), ("alpha", 1, 5, 20.0), ("beta", 0, 1, None, "collapsed")]
    runs += [("beta", 1, 1, None, None), ("beta", 2, 1, None, "missing")]
    store = write_store(tmp_path, runs)
    ids = json.loads((store / "sweeps" / "speed.json").read_text())["run_ids"]
    update_json(store / ids[0] / "attempts" / "001" / "start.json", hardware="H", version="0.0.9")
    warned = {"warnings": ["few clips"]}
    edit_lines(
        store / ids[1] / "metrics.jsonl",
        lambda score: score | (warned if score["column"] == "speed" else {}),
    )
    lines = read(store, "runs.csv")
    header = [
        *("run_id", "method", "role", "seed", "status"),
        *("student_updates", "fake_score_updates", "nfe", "distance", "speed", "detail"),
        *("train_seconds", COST, "peak_memory_gib", "protocol", "version", "commit"),
        *("code_fingerprint", "hardware", "distance_sd", "distance_extractor"),
        *("warnings", "reason"),
    ]
    assert list(lines[0]) == header, "without deviations and extractors that no score has"
    of_data = {"role": "data", "distance": "1.0", "speed": repr((1.0 + 1.1 + 1.2) / 3)}
    of_teacher = {"role": "teacher", "distance": "2.0", "speed": repr((0.5 + 0.6 + 0.7) / 3)}
    made = {key: EVERY[key] for key in ("protocol", "distance_sd", "distance_extractor", "detail")}
    started = {key: EVERY[key] for key in ("role", "nfe", "commit", "code_fingerprint")}
    unscored = {key: value for key, value in EVERY.items() if not key.startswith("d")}
    assert lines == [
        line(header, "reference-data", "data", "", "reference", **made | of_data),
        line(header, "reference-teacher", "teacher", "", "reference", **made | of_teacher),
        line(header, ids[0], "alpha", 0, "done", **EVERY, fake_score_updates="1", distance="10.0",
             speed=repr((0.1 + 0.2 + 0.3) / 3), cost_forward_equivalents="2000.0", hardware="H"),
        line(header, ids[1], "alpha", 1, "done", **EVERY | {"train_seconds": "11.0", "detail":
             "0.6"}, fake_score_updates="5", distance="20.0", speed=repr((0.06 + 0.16 + 0.26) / 3),
             cost_forward_equivalents="6000.0", warnings='{"speed": ["few clips"]}'),
        line(header, ids[2], "beta", 0, "collapsed", **unscored, fake_score_updates="1",
             cost_forward_equivalents="2000.0",
             reason="the latents are constant at student update 15"),
        line(header, ids[3], "beta", 1, "failed", **started, fake_score_updates="1",
             reason="ValueError: out of <luck>"),
        line(header, ids[4], "beta", 2, "missing", role="student", nfe="4",
             fake_score_updates="1"),
    ]  # fmt: skip


def test_a_row_that_trains_nothing_has_no_seed_and_a_deleted_run_that_of_its_name(empty):
    row = write_run(empty, "net", 5, 1, 1.0)
    sweep_of(empty, "alpha-s7-0a", rows={row: {"label": "Net", "network_hash": "h"}})
    cells = [(line["run_id"], line["method"], line["seed"]) for line in read(empty, "runs.csv")]
    assert cells == [(row, "Net", ""), ("alpha-s7-0a", "alpha", "7")]


def test_a_column_of_deviations_or_extractors_needs_one_score_that_has_it(empty):
    ids = [write_run(empty, "alpha", seed, 1, 1.0) for seed in (0, 1)]
    scores = [
        score("zero", 1.0, sd=0.0, extractor=""),
        score("none", 1.0, sd=None, extractor=None),
        score("net", 1.0, sd=None, extractor="n"),
    ]
    write_lines(empty / ids[0] / "metrics.jsonl", scores)
    write_lines(empty / ids[1] / "metrics.jsonl", [one | {"sd": None} for one in scores])
    sweep_of(empty, *ids)
    lines = read(empty, "runs.csv")
    further = [key for key in lines[0] if key.endswith(("_sd", "_extractor"))]
    assert further == ["zero_sd", "net_extractor"], "a deviation of 0 is one"
    assert [line["zero_sd"] for line in lines] == ["0.0", ""]


def test_the_protocol_is_that_of_the_scores_and_both_numbers_of_steps_are_cells(empty):
    run_id = write_run(empty, "alpha", 0, 1, 1.0)
    update_json(empty / run_id / "result.json", protocol="old")
    folder = empty / run_id / "samplings" / "ode-nfe2"
    write_lines(folder / "metrics.jsonl", [score("distance", 5.0, extractor="net-1")])
    (folder / "result.json").write_text(json.dumps({"protocol": "p1"}))
    way = {"stepping": "ode", "nfe": 2, "guidance_scale": 1.0, "shift": None}
    sweep_of(empty, run_id, samplings={run_id: {"ode-nfe2": way}})
    own, further = read(empty, "runs.csv")
    assert [line["nfe"] for line in (own, further)] == ["4", "4"], "as trained"
    assert [line["sampling.nfe"] for line in (own, further)] == ["4", "2"]
    assert own["protocol"] == further["protocol"] == "p1"
    assert (own["distance"], further["distance"]) == ("1.0", "5.0")


def test_swept_keys_are_columns_once(empty):
    """fake_score_updates is a column of every table; a mapping is JSON, and null is empty."""
    cells = [{"adapter": None, "lr": 1e-4}, {"adapter": {"rank": 4}, "lr": 2e-4}]
    ids = [write_run(empty, "alpha", 0, k, 1.0, **cell) for k in (1, 5) for cell in cells]
    sweep_of(empty, *ids, axes={"fake_score_updates": [1, 5], "lr": [1e-4, 2e-4]})
    lines = read(empty, "runs.csv")
    assert read(empty, "sweep.json")["swept"] == ["fake_score_updates", "lr", "adapter.rank"]
    assert [line["adapter.rank"] for line in lines] == ["", "4", "", "4"]
    assert [line["lr"] for line in lines] == ["0.0001", "0.0002"] * 2


def test_clips_csv_has_headline_scores_that_are_means_over_clips_with_four_digits(tmp_path):
    store = write_store(tmp_path, [], ("teacher",))
    values = [1.23456, -0.00012345, 1234567.0]
    mean = sum(values) / 3
    scores = [
        score("none", 2.0),
        score("whole", mean, per_clip=values),
        score("near", mean * (1 + 0.9e-3), per_clip=values),
        score("far", mean * (1 + 1.1e-3), per_clip=values),
        score("zero", 0.9e-6, per_clip=[0.0, 0.0]),
        score("above", 1.1e-6, per_clip=[0.0, 0.0]),
        score("broken", float("nan"), per_clip=[float("nan"), 1.0]),
        score("empty", 2.0, per_clip=[]),
        score("detail", 1.5, per_clip=[1.0, 2.0], headline=False),
    ]
    run_id = write_run(store, "alpha", 0, 1, 1.0)
    for folder in (store / run_id, store / "references" / "teacher"):
        write_lines(folder / "metrics.jsonl", scores)
    sweep_of(store, run_id)
    text = "1.235 -0.0001234 1.235e+06"
    assert read(store, "clips.csv") == [
        {"run_id": run, "column": column, "values": cells}
        for run in ("reference-teacher", run_id)
        for column, cells in (("whole", text), ("near", text), ("zero", "0 0"))
    ]


def logged(*points):
    return [
        {"student_updates": updates, COST: cost, "seconds": seconds, "student_loss": 1 / 3}
        for updates, cost, seconds in points
    ]


def at(run_id, updates, cost, seconds, distance):
    cells = {"student_updates": str(updates), COST: cost, "seconds": seconds}
    return {"run_id": run_id} | cells | {"distance": distance}


@pytest.mark.parametrize("start", [None, (500, 3.0)], ids=["own", "continued"])
def test_checkpoints_csv_has_the_clock_between_lines_of_the_log(empty, start):
    """Linear, from 0 or from the student that the run started from, and never extrapolated."""
    run_id = write_run(empty, "alpha", 0, 1, 10.0)
    folder = empty / run_id
    cost, seconds = start or (0, 0.0)
    if start:
        record = {"run_id": "r", "content": "c", COST: cost, "train_seconds": seconds}
        (folder / "initial.json").write_text(json.dumps(record))
    write_lines(folder / "train.jsonl", logged((4, 100.0, 2.0), (10, 400.0, 5.0), (16, 400.0, 9.0)))
    for updates in (2, 4, 7, 16, 18):
        path = folder / "samples" / str(updates) / "metrics.jsonl"
        write_lines(path, [score("distance", 100 / 7 + updates)])
    (folder / "samples" / "12").mkdir()  # sampled, and not evaluated yet
    (folder / "samples" / "10" / "metrics.jsonl").unlink()
    scores = [score("distance", 123.456789, title="Fréchet distance")]
    write_lines(folder / "metrics.jsonl", scores)
    update_json(folder / "result.json", **{COST: 1234567.0})
    sweep_of(empty, run_id)
    assert read(empty, "checkpoints.csv") == [
        at(run_id, 2, str(50.0 + cost), str(1.0 + seconds), "16.286"),
        at(run_id, 4, str(100.0 + cost), str(2.0 + seconds), "18.286"),
        at(run_id, 7, str(250.0 + cost), str(3.5 + seconds), "21.286"),
        at(run_id, 16, str(400.0 + cost), str(9.0 + seconds), "30.286"),
        at(run_id, 18, "", "", "32.286"),
        at(run_id, 20, "1235100.0" if start else "1234600.0", str(10.0 + seconds), "123.46"),
    ]


def test_without_a_result_the_clock_is_that_of_the_log(empty):
    """A run that goes on, and one whose log names no seconds."""
    run_id = write_run(empty, "alpha", 0, 1, 10.0)
    folder = empty / run_id
    (folder / "result.json").unlink()
    lines = [{"student_updates": u, COST: 123456.0 * u} for u in (10, 20)]
    write_lines(folder / "train.jsonl", [*lines, {"student_updates": 30, "seconds": 6.0}])
    sweep_of(empty, run_id)
    (line,) = read(empty, "checkpoints.csv")
    assert (line["student_updates"], line[COST], line["seconds"]) == ("10", "1234600.0", "2.0")


@pytest.mark.parametrize("count", [1, TRAINING_LINES, TRAINING_LINES + 1, 5 * TRAINING_LINES + 3])
def test_training_csv_has_lines_spread_over_the_log_up_to_its_end(empty, count):
    ids = [write_run(empty, "alpha", seed, 1, 10.0) for seed in (0, 1)]
    log = [
        {
            "student_updates": u,
            "loss": {"by": {"bin": u / 3}},
            "flag": True,
            "note": "x",
            "seconds": u,
        }
        for u in range(1, count + 1)
    ]
    write_lines(empty / ids[0] / "train.jsonl", log)
    write_lines(empty / ids[1] / "train.jsonl", [{"student_updates": 1, "other": 2.0}])
    sweep_of(empty, *ids)
    *lines, last = read(empty, "training.csv")
    header = ["run_id", "student_updates", COST, "seconds", "loss/by/bin", "other"]
    assert list(last) == header
    assert last == dict.fromkeys(header, "") | {
        "run_id": ids[1], "student_updates": "1", "other": "2.0"
    }  # fmt: skip
    updates = [int(line["student_updates"]) for line in lines]
    assert len(lines) == min(count, TRAINING_LINES) and updates[-1] == count
    gaps = [b - a for a, b in zip([0, *updates], updates, strict=False)]
    assert min(gaps) >= 1 and max(gaps) <= count // len(lines) + 1, "evenly"
    assert lines[-1]["loss/by/bin"] == str(float(f"{count / 3:.5g}"))
    assert {line["run_id"] for line in lines} == {ids[0]}
