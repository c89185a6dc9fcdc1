"""A sweep read from a store: comparable scores, missing runs, roles."""

import json
import shutil

import pytest
from stores import RUNS, edit_lines, load_results, score, update_json, write_store

from distill_bench.config.yaml_files import parse_yaml
from distill_bench.report.read_store import StoreReadError, read_sweep
from distill_bench.sample.reference_kinds import ROLES, role_of


@pytest.fixture
def pair(tmp_path):
    """Store with one run of alpha and one of beta, without references."""
    return write_store(tmp_path, [("alpha", 0, 1, 1.0), ("beta", 0, 1, 2.0)], references=())


@pytest.mark.parametrize("key, value", [("protocol", "p2"), ("version", 2), ("extractor", "net-2")])
def test_scores_made_differently_cannot_share_a_column(pair, key, value):
    """Only of protocols the error names what differs in them, if anything does."""
    conditions = {} if key == "protocol" else {"clips": 5}
    path = next(pair.glob("beta-*")) / "metrics.jsonl"
    edit_lines(path, lambda line: line | {key: value, "conditions": conditions})
    both = rf"alpha-s0-.*{key}.*beta-s0-\S+ \({key} {value}\) cannot share a column; evaluate"
    with pytest.raises(StoreReadError, match=both):
        read_sweep("speed", pair)


def test_scores_along_the_training_are_made_as_those_at_its_end(pair):
    """A student of 10 updates, scored by another version than that of 20."""
    earlier = next(pair.glob("beta-*")) / "samples" / "10" / "metrics.jsonl"
    edit_lines(earlier, lambda line: line | {"version": 2})
    with pytest.raises(StoreReadError, match=r"\(version 2\) cannot share a column"):
        read_sweep("speed", pair)


def test_the_error_names_the_fields_in_which_protocols_differ(pair):
    """Fields come from protocol.json or, without it, from the conditions of the scores."""
    for name, clips, fps in (("alpha", 144, 8.0), ("beta", 256, 16.0)):
        changed = {
            "protocol": name,
            "conditions": {"clips": clips, "references": {"teacher": name}},
        }
        for path in pair.glob(f"{name}-*/**/metrics.jsonl"):
            edit_lines(path, lambda line, changed=changed: line | changed)
        folder = pair / "references" / name
        folder.mkdir(parents=True)
        protocol = {"clips": clips, "fps": fps, "teacher_steps": 32}
        (folder / "protocol.json").write_text(json.dumps(protocol))
    advice = "; evaluate both with the same settings"
    both = f"column: they differ in clips 144 and 256, fps 8.0 and 16.0{advice}"
    with pytest.raises(StoreReadError, match=both):
        read_sweep("speed", pair)
    (pair / "references" / "beta" / "protocol.json").unlink()
    clips = f"column: they differ in clips 144 and 256{advice}"
    with pytest.raises(StoreReadError, match=clips):
        read_sweep("speed", pair)


def test_the_newest_evaluation_of_a_score_counts(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0)], references=())
    newer = json.dumps(score("distance", 3.0, version=2, extractor="net-1")) + "\n"
    for path in store.glob("alpha-*/**/metrics.jsonl"):
        path.write_text(path.read_text() + newer)
    assert load_results(store, tmp_path / "data").runs["distance"].tolist() == [3.0]


def test_an_unknown_sweep_is_an_error_that_names_the_known_ones(store):
    with pytest.raises(StoreReadError, match="'sped'.*known: speed"):
        read_sweep("sped", store)


@pytest.mark.parametrize(
    "name", ["wan2.1_1.3b", "sweeps/wan2.1_1.3b.yaml", "runs/sweeps/wan2.1_1.3b.json"]
)
def test_the_name_of_a_sweep_may_contain_dots(name, store):
    (store / "sweeps" / "speed.json").rename(store / "sweeps" / "wan2.1_1.3b.json")
    sweep = read_sweep(name, store)
    assert sweep.name == "wan2.1_1.3b"
    assert len(sweep.runs) == len(RUNS)


def test_a_run_whose_folder_was_deleted_is_missing_in_its_own_row(tmp_path):
    runs = [("alpha", seed, cadence, 1.0) for seed in range(3) for cadence in (1, 5)]
    store = write_store(tmp_path, runs)
    cadences = {
        path.parent.name: parse_yaml(path.read_text())["fake_score_updates"]
        for path in store.glob("*/run.yaml")
    }
    groups = {run_id: f"at {cadence}" for run_id, cadence in cadences.items()}
    update_json(store / "sweeps" / "speed.json", groups=groups)
    (deleted,) = (run for run in cadences if run.startswith("alpha-s1-") and cadences[run] == 5)
    shutil.rmtree(store / deleted)
    rows = load_results(store, tmp_path / "data").students
    assert [(row.at, row.count) for row in rows] == [("1", "3"), ("5", "2/3 (1 missing)")]


def test_references_have_the_role_of_their_kind(tmp_path):
    kinds = (*ROLES, "teacher_few-nfe4", "unheard_of")
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0)], references=kinds)
    results = load_results(store, tmp_path / "data")
    roles = dict(zip(results.runs["method"], results.runs["role"], strict=True))
    assert roles["teacher"] == "teacher" and roles["teacher_other"] == "floor"
    assert roles["teacher_few-nfe4"] == roles["teacher_few"] == role_of("teacher_few")
    assert roles["unheard_of"] == "reference" and roles["alpha"] == "student"
    assert [row.role for row in results.references] == [roles[kind] for kind in kinds]
