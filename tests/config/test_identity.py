"""Ids of runs: equal if and only if the runs have equal numbers, however they are written."""

import shutil

import pytest

from distill_bench.config.identity import (
    cost_key,
    group_id,
    hashed_fields,
    method_title,
    run_id,
    short_name,
)
from distill_bench.config.overrides import run_value
from distill_bench.config.resolve import load_run, method_of, resolve
from distill_bench.config.schema import AdapterConfig, ProtocolConfig, RunConfig
from distill_bench.config.yaml_files import dump_yaml

PLAIN = {"method": "dmd2"}


def id_of(**keys) -> str:
    return run_id(resolve(PLAIN | keys))


def test_every_key_of_a_run_is_declared_in_or_out_of_the_id():
    for model in (RunConfig, ProtocolConfig, AdapterConfig):
        for name, field in model.model_fields.items():
            declared = field.json_schema_extra or {}
            assert isinstance(declared.get("in_id"), bool), f"{model.__name__}.{name}"


def test_a_run_has_one_id_however_it_is_written():
    assert id_of().startswith("dmd2-s0-")
    assert id_of() == id_of(method={"name": "dmd2"}, student_lr=1e-4, guidance_scale=3)


@pytest.mark.parametrize(
    "change",
    [
        {"student_lr": 2e-4},
        {"seed": 1},
        {"method": "sgmd"},
        {"protocol": {"clips": 8}},
        {"reuse_rollout": True},
    ],
)
def test_a_key_that_changes_the_numbers_changes_the_id(change):
    assert id_of(**change) != id_of()


@pytest.mark.parametrize(
    "change", [{"log_every": 1}, {"checkpoint_every": 7}, {"threads": 2}, {"trackers": []}]
)
def test_a_key_that_does_not_change_the_numbers_leaves_the_id(change):
    assert id_of(**change) == id_of()


def test_keys_without_effect_do_not_change_the_id():
    plain = id_of(method="consistency")
    assert id_of(method="consistency", fake_score="exact") == plain
    assert id_of(method="consistency", reuse_rollout=True) == plain
    exact = {
        "method": {"name": "sgmd", "preset": "paper"},
        "teacher": "gaussian",
        "fake_score": "exact",
    }
    assert id_of(**exact) == id_of(**exact, reuse_rollout=False)
    batched = {"fake_score_rollouts": "batched"}
    assert id_of(**exact, **batched) == id_of(**exact)
    assert id_of(**batched, fake_score_updates=1) == id_of(fake_score_updates=1)
    reused = {"reuse_rollout": True, "fake_score_updates": 2}
    assert id_of(**batched, **reused) == id_of(**reused)
    assert id_of(**batched, fake_score_updates=2) != id_of(fake_score_updates=2)


def test_a_group_is_a_run_without_its_seed():
    first, second = (resolve(PLAIN | {"seed": seed}) for seed in (0, 1))
    assert run_id(first) != run_id(second)
    assert group_id(first) == group_id(second)


def test_runs_of_one_cost_differ_only_in_keys_without_cost():
    plain = cost_key(resolve(PLAIN))
    free = {"seed": 3, "student_updates": 7, "student_lr": 1e-3, "protocol": {"clips": 8}}
    assert cost_key(resolve(PLAIN | free)) == plain
    assert cost_key(resolve(PLAIN | {"nfe": 2})) != plain
    assert cost_key(resolve(PLAIN | {"fake_score_rollouts": "batched"})) != plain


def test_the_id_covers_every_field_of_the_method_and_the_teacher_by_content():
    config = resolve({"method": "sgmd"})
    assert config.method == {"name": "sgmd"} | vars(method_of(config))
    hashed = hashed_fields(config)
    assert hashed["method"] == config.method
    assert "teacher" not in hashed
    assert len(hashed["teacher_hash"]) == 12


def test_an_added_field_of_a_method_enters_the_id_only_if_it_is_not_at_its_default():
    assert "denoise" not in resolve({"method": "dmd2"}).method
    assert id_of(method={"name": "dmd2", "denoise": "velocity"}) == id_of()
    changed = {"name": "dmd2", "denoise": "x0"}
    assert resolve({"method": changed}).method["denoise"] == "x0"
    assert method_of(resolve({"method": changed})).denoise == "x0"
    assert id_of(method=changed) != id_of()


def test_a_teacher_counts_by_content_and_not_by_path(tiny_wan, tmp_path):
    copy = shutil.copytree(tiny_wan, tmp_path / "elsewhere")
    original = id_of(teacher=str(tiny_wan), frames=5)
    assert id_of(teacher=str(copy), frames=5) == original
    (copy / "prompts.txt").write_text("a red circle\n")
    assert id_of(teacher=str(copy), frames=5) != original


def test_a_resolved_run_is_unchanged_by_writing_and_reading_its_yaml(tmp_path):
    config = resolve({"method": {"name": "gradient_template", "b": "1e-1"}, "student_lr": 3e-7})
    (tmp_path / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    assert load_run(tmp_path) == config
    assert run_id(load_run(tmp_path)) == run_id(config)


def test_a_title_names_the_preset_of_the_cell():
    config = resolve({"method": {"name": "dmd2", "preset": "paper"}})
    assert method_title(config, {group_id(config): "paper"}) == "dmd2 paper"
    assert method_title(config, {}) == "dmd2"
    assert short_name("folder/my_method.py:MyMethod") == "mymethod"


def test_the_value_of_a_dotted_key_is_read_from_a_run():
    config = resolve({"method": "sgmd"})
    assert run_value(config, "method") == "sgmd"
    assert run_value(config, "method.residual_weight") == config.method["residual_weight"]
    assert run_value(config, "protocol.clips") == 256
    assert run_value(config, "protocol.nothing.deeper") is None
