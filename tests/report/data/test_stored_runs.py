"""Runs, references, rows and ways of sampling, as their folders and the sweep's manifest state."""

import json
import shutil
from dataclasses import replace

import pytest
from stores import score, update_json, write_clips, write_lines, write_run, write_store

from distill_bench.config.schema import ProtocolConfig
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.report.read_store import (
    StoredSweep,
    StoreReadError,
    read_run,
    read_sweep,
    sample_folders,
)

WAY = {"stepping": "ode", "nfe": 2, "guidance_scale": 1.0, "shift": None}


@pytest.fixture
def empty(tmp_path):
    return write_store(tmp_path, [], ())


def sweep_of(store, run_ids, **fields):
    update_json(store / "sweeps" / "speed.json", run_ids=list(run_ids), **fields)
    return read_sweep("speed", store)


def test_a_sweep_has_what_its_manifest_and_launches_state_and_nothing_else(empty):
    path = empty / "sweeps" / "speed.json"
    path.write_text('{"run_ids": []}')
    assert read_sweep("speed", empty) == StoredSweep("speed", "", {}, None, [], [])
    stated = {
        "question": "Why?",
        "axes": {"x": [1]},
        "baseline": {"x": 1},
        "plateau": {"window": 0.5},
        "titles": {"alpha": "AlphA"},
        "contrasts": {"c": {"of": {"x": 1}, "minus": {"x": 2}}},
    }
    update_json(path, **stated)
    launch = {"time": "2026-01-01", "digest": "d", "contrasts": {}, "begun": 0}
    (empty / "sweeps" / "speed").mkdir()
    (empty / "sweeps" / "speed" / "launch.json").write_text(json.dumps(launch))
    expected = StoredSweep(name="speed", runs=[], references=[], launches=[launch], **stated)
    assert read_sweep("speed", empty) == expected


@pytest.mark.parametrize(
    "others, known", [(("rate", "speed"), "rate, speed"), (("rate",), "rate"), ((), "none")]
)
def test_a_sweep_without_a_manifest_or_a_list_of_runs_is_unknown(empty, others, known):
    path = empty / "sweeps" / "speed.json"
    path.unlink()
    for name in others:
        path.with_stem(name).write_text("{}")
    with pytest.raises(StoreReadError, match=f"no sweep called 'speed' in .*; known: {known}$"):
        read_sweep("speed", empty)


# --- runs ---


def test_the_preset_of_a_cell_stands_after_the_name_of_its_method(empty):
    plain, preset, gone = (write_run(empty, "alpha", seed, 1, 1.0) for seed in range(3))
    shutil.rmtree(empty / gone)
    sweep = sweep_of(empty, [plain, preset, gone], presets={preset: "paper", gone: "paper"})
    methods = [list(run.config.get("method", {}).items()) for run in sweep.runs]
    name, weight = ("name", "alpha"), ("weight", 1.0)
    assert methods == [[name, weight], [name, ("preset", "paper"), weight], []]
    assert [run.config.get("nfe") for run in sweep.runs] == [4, 4, None]


def test_only_a_run_whose_folder_was_deleted_takes_the_config_of_its_row(empty):
    """A run that was deleted and is in no row stays without a config."""
    inits = {0: "a", 1: "b"}
    kept = [write_run(empty, "alpha", seed, 1, 1.0, init_run=inits[seed]) for seed in inits]
    deleted, lost = "alpha-s7-0a", "alpha-s8-0a"
    groups = dict.fromkeys([*kept, deleted], "row")
    runs = sweep_of(empty, [*kept, deleted, lost], groups=groups).runs
    assert [run.config.get("init_run") for run in runs[:2]] == list(inits.values())
    assert [run.config.get("seed") for run in runs] == [0, 1, 7, None]
    assert runs[2].config in [run.config | {"seed": 7} for run in runs[:2]]
    assert runs[3].config == {}
    assert [run.seed for run in runs] == [0, 1, 7, 8]
    assert [run.status for run in runs] == ["done", "done", "missing", "missing"]


def test_a_run_is_named_by_its_folder_then_by_its_config(empty):
    """Its seed is that of the config first. A folder may be a copy with a name of its own."""

    def identity(name, config):
        folder = empty / name
        folder.mkdir()
        if config is not None:
            (folder / "run.yaml").write_text(dump_yaml(config))
        run = read_run(folder)
        return run.method, run.seed

    config = {"method": {"name": "alpha"}, "seed": 3}
    assert identity("two-words-s5-0a1", None) == ("two-words", 5)
    assert identity("beta-s6-0a1", config) == ("beta", 3)
    assert identity("copy", config) == ("alpha", 3)
    assert identity("copy-s6-0a1x", {"nfe": 4}) == ("copy-s6-0a1x", None)
    assert identity("bare", None) == ("bare", None)


def test_what_a_run_did_counts_before_what_its_config_had_planned(tmp_path):
    run_id = write_run(
        tmp_path, "alpha", 0, 1, None, "collapsed", student_updates=99, nfe=8, shift=3.0
    )
    run = read_run(tmp_path / run_id)
    assert run.flat_config["student_updates"] == 99 and run.known("student_updates") == 20
    assert run.known("nfe") == run.result["nfe"] == 4 and run.known("shift") == 3.0
    assert run.known("commit") == "abc123" and run.known("nothing") is None


def test_attempts_are_counted_and_the_newest_one_tells_the_provenance(empty):
    folder = empty / write_run(empty, "alpha", 0, 1, 1.0)
    assert read_run(folder).attempts == 1
    for name in ("2", "010"):
        shutil.copytree(folder / "attempts" / "001", folder / "attempts" / name)
        update_json(folder / "attempts" / name / "start.json", commit=name)
    run = read_run(folder)
    assert run.attempts == 3 and run.provenance["commit"] == "010"
    assert read_run(empty / "alpha-s1-0a").attempts == 0


def test_sampled_updates_are_in_ascending_order(tmp_path):
    for name in ("100", "9", "10", "x"):
        (tmp_path / "samples" / name).mkdir(parents=True)
    assert [path.name for path in sample_folders(tmp_path)] == ["9", "10", "100"]


def test_a_stored_protocol_keeps_its_values_and_gets_younger_keys(empty):
    stored = {"clips": 8, "evaluators": ["fvd"]}
    folder = empty / write_run(empty, "alpha", 0, 1, 1.0, protocol=stored)
    fields = ProtocolConfig.model_fields.items()
    younger = {key: field.default for key, field in fields if field.json_schema_extra["added"]}
    assert younger and read_run(folder).config["protocol"] == younger | stored


# --- references and rows that train nothing ---


def test_a_reference_is_scored_or_missing_and_left_out_if_no_score_applies_to_it(empty):
    """Its folder is there in the last case."""
    for kind in ("teacher", "frozen"):
        write_clips(empty / "references" / kind, 200)
        (empty / "references" / kind / "row.json").write_text(json.dumps({"kind": kind, "nfe": 3}))
    scores = [score("distance", 2.0), score("speed", 1.0)]
    write_lines(empty / "references" / "teacher" / "metrics.jsonl", scores)
    kinds = ("teacher", "frozen", "data")
    folders = {kind: f"references/{kind}" for kind in kinds}
    teacher, data = sweep_of(empty, [], references=folders).references
    assert teacher.scores == {line["column"]: line for line in scores} and not data.scores
    assert teacher.result == {"kind": "teacher", "nfe": 3} and data.result == {}
    assert [run.run_id for run in (teacher, data)] == ["reference-teacher", "reference-data"]
    assert [run.status for run in (teacher, data)] == ["reference", "missing"]
    assert [run.role for run in (teacher, data)] == ["teacher", "data"]
    assert teacher.seed is data.seed is None and teacher.config == data.config == {}


def test_a_row_that_trains_nothing_is_a_reference_with_its_label(empty):
    """It is of the role of its network; the config of its folder is that of no row."""
    done, elsewhere = (write_run(empty, name, 5, 1, 1.0) for name in ("few", "net"))
    failed = write_run(empty, "net", 6, 1, None, None)  # before it had a score
    unscored = write_run(empty, "net", 8, 1, 1.0)  # no evaluator applies to it
    (empty / unscored / "metrics.jsonl").unlink()
    rows = {
        done: {"label": "teacher, ODE", "network_hash": None},
        elsewhere: {"label": "Net", "network_hash": "h"},
        failed: {"label": "Other net", "network_hash": "h"},
        unscored: {"label": "Third net", "network_hash": "h"},
        "net-s7-0a": {"label": "untrained"},
    }
    references = sweep_of(empty, [], rows=rows).references
    assert [(run.run_id, run.method, run.status, run.role) for run in references] == [
        (done, "teacher, ODE", "reference", "undistilled"),
        (elsewhere, "Net", "reference", "elsewhere"),
        (failed, "Other net", "failed", "elsewhere"),
        ("net-s7-0a", "untrained", "missing", "undistilled"),
    ]
    stored = {"scores", "result", "provenance", "reason", "folder", "checkpoints"}
    for run in references:
        assert run.seed is None and run.config == {}
        of_folder = read_run(empty / run.run_id)
        assert {key: getattr(run, key) for key in stored} == {
            key: getattr(of_folder, key) for key in stored
        }


# --- further ways of sampling ---


def test_a_student_that_is_sampled_otherwise_is_a_run_of_its_own(empty):
    """Its scores and number of steps are its own; method, costs and label are its student's."""
    plain, run_id = (write_run(empty, "alpha", i, 1, 1.0, shift=3.0) for i in range(2))
    folder = empty / run_id / "samplings" / "ode-nfe2"
    line = score("distance", 5.0, extractor="net-1")
    write_lines(folder / "metrics.jsonl", [line])
    (folder / "result.json").write_text(json.dumps({"protocol": "p1"}))
    label = {"label": "Fast", "keys": ["method"]}
    ways = {"ode-nfe3": WAY | {"nfe": 3}, "ode-nfe2": WAY}
    sweep = sweep_of(empty, [plain, run_id], samplings={run_id: ways}, labels={run_id: label})
    other, own, unscored, further = sweep.runs
    training = {"stepping": None, "nfe": 4, "shift": 3.0, "guidance_scale": 1.0}
    for run, name in ((other, plain), (own, run_id)):
        stored = read_run(empty / name)
        assert run == replace(stored, config=stored.config | {"sampling": training})
    assert further == replace(
        own,
        run_id=f"{run_id}/samplings/ode-nfe2",
        folder=folder,
        config=own.config | {"sampling": {"stepping": "ode", "nfe": 2, "guidance_scale": 1.0}},
        result=own.result | {"nfe": 2},
        scores={"distance": line},
        checkpoints={20: {"distance": line}},
        training=[],
    )
    assert own.training and own.as_trained and not further.as_trained
    assert (unscored.status, unscored.result["nfe"], unscored.scores) == ("missing", 3, {})
    assert sweep.labels == {run.run_id: label for run in (own, unscored, further)}


def test_a_way_of_sampling_counts_once_it_has_its_result(empty):
    """Until then the student is missing in that way if it is done, else in its own state."""
    ids = [write_run(empty, "alpha", 0, 1, 1.0), write_run(empty, "alpha", 1, 1, None, None)]
    ids += [write_run(empty, "alpha", 2, 1, None, "collapsed"), "alpha-s3-0a"]
    metrics = empty / ids[0] / "samplings" / "ode-nfe2" / "metrics.jsonl"
    write_lines(metrics, [score("distance", 5.0, extractor="net-1")])
    runs = sweep_of(empty, ids, samplings=dict.fromkeys(ids, {"ode-nfe2": WAY})).runs
    ways = [run for run in runs if not run.as_trained]
    assert [run.status for run in ways] == ["missing", "failed", "collapsed"]
    assert [run.scores for run in ways] == [run.checkpoints for run in ways] == [{}] * 3
    assert [run.result.get("nfe") for run in ways] == [2, None, 2]
    assert [bool(run.result) for run in ways] == [True, False, True]
    (deleted,) = (run for run in runs if run.run_id == ids[3])
    assert deleted.config == {}
