"""sweep.json: swept keys, axis, baseline, columns, prompts and notes of a store written by hand."""

import json

import pytest
from stores import edit_lines, score, update_json, write_lines, write_run, write_store

from distill_bench.config.schema import ProtocolConfig, RunConfig
from distill_bench.report.data_files import NOT_IDENTITY, data_files
from distill_bench.report.read_store import read_sweep


@pytest.fixture
def empty(tmp_path):
    return write_store(tmp_path, [], ())


def manifest(store, run_ids, options=None, **fields):
    """sweep.json of a sweep with these runs and fields, made with options of `data_files`."""
    update_json(store / "sweeps" / "speed.json", run_ids=list(run_ids), **fields)
    return json.loads(data_files(read_sweep("speed", store), **(options or {}))["sweep.json"])


def cells(store, *configs, method="alpha"):
    """Ids of runs with these further keys in their configs."""
    return [
        write_run(store, method, i, config.pop("fake_score_updates", 1), 1.0, **config)
        for i, config in enumerate(configs)
    ]


# --- swept keys and axis ---


def test_swept_keys_are_the_axes_in_their_order_then_other_keys_that_differ(empty):
    ids = cells(empty, {"b": 1, "a": 1, "c": 1, "d": 1}, {"b": 2, "a": 2, "c": 2, "d": 1})
    ids += cells(empty, {"d": 2}, method="beta")
    axes = {"a": [], "method": [], "method.name": [], "seed": [], "d": []}
    assert manifest(empty, ids, axes=axes)["swept"] == ["a", "d", "b", "c"]


def test_the_name_of_the_method_is_no_swept_key_of_runs_without_a_config(empty):
    axes = {"method": ["alpha"], "x": [1], "method.name": ["alpha"], "seed": [0]}
    assert manifest(empty, ["alpha-s0-0a"], axes=axes)["swept"] == ["x"]


def test_the_order_in_which_a_setting_is_written_makes_no_rows(empty):
    scales = [("high_noise", 4.0), ("low_noise", 3.0)]
    ids = cells(empty, {"guidance_scale": dict(scales)}, {"guidance_scale": dict(scales[::-1])})
    assert manifest(empty, ids, axes={})["swept"] == []


def test_fields_that_decide_a_runs_id_separate_rows():
    """All but the seed, and the hash of what `init` names."""
    of_runs = {key: field.json_schema_extra for key, field in RunConfig.model_fields.items()}
    of_protocols = ProtocolConfig.model_fields.items()
    of_runs |= {f"protocol.{key}": field.json_schema_extra for key, field in of_protocols}
    assert of_runs.keys() >= NOT_IDENTITY
    assert {key for key in NOT_IDENTITY if of_runs[key]["in_id"]} == {"seed", "init_hash"}


@pytest.mark.parametrize("key", sorted(NOT_IDENTITY))
def test_a_field_that_changes_no_result_does_not_separate_rows(empty, key):
    first, _, rest = key.partition(".")

    def config(value):
        return {first: {rest: value} if rest else value} if key != "seed" else {}

    ids = cells(empty, config("x"), config("y"))
    assert manifest(empty, ids, axes={})["swept"] == []
    ids = cells(empty, {"other": "x"}, {"other": "y"}, method="beta")
    assert manifest(empty, ids, axes={})["swept"] == ["other"]


def test_the_training_setting_stands_beside_that_of_sampling(empty):
    ids = cells(empty, {"stepping": "ode", "shift": 1.0, "guidance_scale": 2.0})
    ways = {"sde-nfe2": {"stepping": "renoise", "nfe": 2, "guidance_scale": 2.0, "shift": 1.0}}
    folder = empty / ids[0] / "samplings" / "sde-nfe2"
    write_lines(folder / "metrics.jsonl", [score("distance", 5.0, extractor="net-1")])
    (folder / "result.json").write_text(json.dumps({"protocol": "p1"}))
    found = manifest(empty, ids, axes={}, samplings={ids[0]: ways})
    assert found["swept"] == [
        *(f"sampling.{key}" for key in ("stepping", "nfe", "guidance_scale")),
        *("stepping", "nfe", "guidance_scale"),
    ]


@pytest.mark.parametrize(
    "configs, axis",
    [
        ([{"x": 1}, {"x": 2}], "x"),
        ([{"x": 1, "y": 1}, {"x": 2, "y": 2}, {"x": 2, "y": 3}], "y"),
        ([{"x": 1, "y": 5}, {"x": 2, "y": 6}], "x"),
        ([{"x": "p"}, {"x": "q"}], None),
        ([{"x": 1}, {"x": "q"}], None),
        ([{"x": True}, {"x": False}], None),
        ([{"x": 1}, {"x": None}], None),
        ([{"x": 1.5}, {"x": None}, {"x": 2}], "x"),
        ([{"method": {"name": "alpha", "w": 1}}, {"method": {"name": "alpha", "w": 2}}], None),
        ([{}], None),
    ],
)
def test_the_axis_is_the_number_with_most_values_in_one_method(empty, configs, axis):
    found = manifest(empty, cells(empty, *configs), axes={"x": [], "y": []})
    assert found["axis"] == axis


def test_values_of_different_methods_are_not_counted_together(empty):
    """x has four values, two in each method; y has three in one."""
    ids = cells(empty, {"x": 1, "y": 1}, {"x": 2, "y": 2}, {"x": 2, "y": 3})
    ids += cells(empty, {"x": 3, "y": 1}, {"x": 4, "y": 1}, method="beta")
    assert manifest(empty, ids, axes={"x": [], "y": []})["axis"] == "y"
    ids = cells(empty, {"x": 1}, method="gamma") + cells(empty, {"x": 2}, method="delta")
    assert manifest(empty, ids, axes={"x": []})["axis"] == "x", "one value in each of two methods"


# --- baseline ---


@pytest.mark.parametrize(
    "wanted, baseline",
    [
        ({"method": "alpha", "x": 1}, {"method": "alpha", "x": 1}),
        ({"x": 1.0, "method": "alpha"}, {"x": 1.0, "method": "alpha"}),  # as it was written
        ({"x": 2}, {"x": 2}),
        ({"method": "alpha"}, {"method": "alpha"}),
        ({"nfe": 4, "x": 1}, {"method": "alpha", "x": 1}),  # nfe is equal in all runs
        ({"method": {"name": "alpha"}, "x": 2}, {"method": "alpha", "x": 2}),
        ({"nfe": 4}, {"nfe": 4}),  # two rows
        ({"nfe": 5}, {"nfe": 5}),  # none
        ({}, {}),
        (None, None),
    ],
)
def test_a_baseline_is_in_terms_of_the_keys_of_one_row(empty, wanted, baseline):
    ids = cells(empty, {"x": 1}, {"x": 2})
    found = manifest(empty, ids, axes={"x": []}, baseline=wanted)["baseline"]
    assert json.dumps(found) == json.dumps(baseline)
    other = {"method": "alpha", "x": 9}
    found = manifest(empty, ids, {"baseline": wanted}, axes={"x": []}, baseline=other)
    assert found["baseline"] == (baseline or other), "that of the command comes first"
    command = "python -m distill_bench.report speed"
    expected = command if wanted is None else f"{command} --baseline "
    assert found["provenance"]["command"].startswith(expected)
    assert ("--baseline" in found["provenance"]["command"]) == (wanted is not None)


@pytest.mark.parametrize(
    "wanted, more",
    [
        ({"stepping": "ode"}, {"sampling.stepping": "ode", "sampling.nfe": 4}),
        ({"stepping": "sde"}, {"sampling.stepping": "sde", "sampling.nfe": 4}),
        ({"stepping": "ode", "log_every": 3, "sampling.nfe": 2}, {"sampling.stepping": "renoise"}),
        ({"stepping": "ode", "sampling.nfe": 4}, None),  # keys of rows, as they were written
        ({"log_every": 3}, None),  # two rows are sampled as they were trained
    ],
)
def test_a_baseline_is_sampled_as_it_was_trained_unless_it_names_a_way(empty, wanted, more):
    ids = cells(empty, *({"stepping": way, "log_every": 3} for way in ("ode", "sde")))
    ways = {"renoise-nfe2": {"stepping": "renoise", "nfe": 2, "guidance_scale": 1.0}}
    found = manifest(
        empty, ids, axes={"stepping": []}, samplings=dict.fromkeys(ids, ways), baseline=wanted
    )
    assert found["swept"] == ["stepping", "sampling.stepping", "sampling.nfe", "nfe"]
    row = {key: value for key, value in wanted.items() if key in found["swept"]}
    expected = wanted if more is None else {"method": "alpha", "nfe": 4} | row | more
    assert found["baseline"] == expected


def test_the_command_names_baseline_and_budget(empty):
    ids = cells(empty, {"x": 1}, {"x": 2})
    options = {"baseline": {"method": "alpha", "x": 2}, "budget": 1500.0}
    found = manifest(empty, ids, options, axes={"x": []})
    assert found["provenance"]["command"] == (
        "python -m distill_bench.report speed --baseline method=alpha,x=2 --budget 1500"
    )
    assert found["budget"] == 1500.0


# --- columns, prompts, notes ---


def test_sweep_json_has_one_entry_per_line_and_only_entries_that_apply(empty):
    launch = {"time": "2026-01-01", "digest": "d", "contrasts": {}, "begun": 0}
    path = empty / "sweeps" / "speed" / "launch.json"
    stated = {"plateau": {"window": 0.5}, "titles": {"alpha": "A"}, "labels": {}}
    assert manifest(empty, [], **stated)["launch"] is None
    path.parent.mkdir()
    path.write_text(json.dumps(launch))
    text = data_files(read_sweep("speed", empty))["sweep.json"]
    found = json.loads(text)
    assert text == json.dumps(found, indent=1) + "\n", "as committed: digests are of the bytes"
    assert {key: found[key] for key in stated} == stated
    assert found["launch"]["digest"] == "d" and found["contrasts"] == []
    assert "initial_runs" not in found


def test_columns_are_all_scores_in_the_order_of_their_first_run(empty):
    """Also of checkpoints: a run may collapse before its end."""
    first, second = cells(empty, {}, {})
    early = empty / first / "samples" / "10" / "metrics.jsonl"
    write_lines(early, [score("early", 1.0, title=None, unit=None, better=None, headline=False)])
    write_lines(empty / first / "metrics.jsonl", [score("end", 1.0, title="End", unit="px")])
    write_lines(empty / second / "metrics.jsonl", [score("end", 1.0), score("late", 1.0)])
    (empty / second / "samples" / "10" / "metrics.jsonl").unlink()
    assert manifest(empty, [first, second])["columns"] == [
        {"column": "end", "title": "End", "unit": "px", "better": "lower", "headline": True},
        {"column": "early", "title": "early", "unit": "", "better": None, "headline": False},
        {"column": "late", "title": "Late", "unit": "", "better": "lower", "headline": True},
    ]


def test_without_a_headline_score_every_score_is_one(empty):
    (run_id,) = cells(empty, {})
    for path in empty.glob("alpha-*/**/metrics.jsonl"):
        edit_lines(path, lambda line: line | {"headline": False})
    assert all(column["headline"] for column in manifest(empty, [run_id])["columns"])


@pytest.mark.parametrize(
    "prompts, numbers",
    [(["x", "y", "x", "z", "y"], [0, 1, 0, 2, 1]), (["x", "y"], None), (["x", "x"], [0, 0])],
)
def test_prompts_are_numbered_if_several_clips_share_one(empty, prompts, numbers):
    run_id, other = cells(empty, {}, {})
    for path in empty.glob("alpha-*/samples/*/manifest.jsonl"):
        path.unlink()
    assert manifest(empty, [run_id, other])["prompts"] is None
    lines = [{"index": i, "prompt": prompt, "seed": i} for i, prompt in enumerate(prompts)]
    write_lines(empty / other / "samples" / "20" / "manifest.jsonl", lines)
    assert manifest(empty, [run_id, other])["prompts"] == numbers


def test_notes_name_broken_scores_and_runs_that_start_from_others(empty):
    ids = cells(empty, {}, {"init_run": "alpha-s0"}, {"init_run": "alpha-s0"})
    edit_lines(
        empty / ids[0] / "metrics.jsonl",
        lambda line: line | ({"value": float("inf")} if line["column"] != "detail" else {}),
    )
    notes = manifest(empty, ids)["notes"]
    broken = "is done, but these scores are not finite and left out of the mean: distance, speed"
    assert notes == [
        f"{ids[0]} {broken}",
        "training cost and time of 2 runs include those of the runs from whose students they start",
    ]
    ids = cells(empty, {"init_run": ids[0]}, method="beta") + ids
    assert manifest(empty, ids)["initial_runs"] == [ids[1]]


def test_provenance_lists_distinct_records_in_order_and_marks_uncommitted_changes(empty):
    ids = cells(empty, {}, {}, {})
    for run_id, fields in zip(
        ids,
        ({"hardware": "H"}, {"dirty": True, "hardware": "G"}, {"dirty": False, "hardware": "H"}),
        strict=True,
    ):
        update_json(empty / run_id / "attempts" / "001" / "start.json", **fields)
    update_json(empty / ids[2] / "result.json", version="0.2.0")
    found = manifest(empty, ids)["provenance"]
    assert found == {
        "protocol": "p1",
        "extractors": "net-1",
        "version": "0.1.0, 0.2.0",
        "commit": "abc123, abc123 with uncommitted changes",
        "code": "c1",
        "hardware": "H, G",
        "command": "python -m distill_bench.report speed",
    }
    assert set(manifest(empty, [])["provenance"].values()) == {"—", found["command"]}
