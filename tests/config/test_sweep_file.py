"""Sweep files: expansion of grid, zip, include, exclude and overrides into runs."""

from pathlib import Path

import pytest

from distill_bench.config.cluster import ClusterConfig
from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import group_id, run_id
from distill_bench.config.overrides import apply_overrides, parse_override
from distill_bench.config.reference import reference
from distill_bench.config.schema import RunConfig
from distill_bench.config.sweep_file import SweepConfig, load_sweep
from distill_bench.config.validation import validate


def load(folder: Path, text: str, **overrides) -> SweepConfig:
    path = folder / "speed.yaml"
    path.write_text(text)
    return load_sweep(path, overrides)


def test_a_grid_is_every_combination_with_every_seed_plus_the_included_cells(tmp_path):
    runs = load(
        tmp_path,
        """
        question: which?
        base: {student_updates: 4}
        grid: {method: [dmd2, sgmd], fake_score_updates: [1, 5]}
        include: [{method: dmd, nfe: 2}]
        exclude: ["method == 'sgmd' and fake_score_updates > 1"]
        seeds: 2
        """,
    ).expand()
    cells = {(r.method["name"], r.fake_score_updates, r.nfe) for r in runs}
    assert cells == {("dmd2", 1, 4), ("dmd2", 5, 4), ("sgmd", 1, 4), ("dmd", 5, 2)}
    assert len(runs) == 8
    assert {r.seed for r in runs} == {0, 1}
    assert {r.student_updates for r in runs} == {4}


def test_a_comparison_does_not_exclude_null(tmp_path):
    text = "question: q\nbase: {method: dmd2}\ngrid: {ema: [null, 0.5]}\nexclude: ['ema > 0.1']\n"
    assert [run.ema for run in load(tmp_path, text).expand()] == [None]


ONE_AXIS = """
question: which?
grid: {method: [dmd2, sgmd]}
zip: [{fake_score_updates: 5}, {fake_score_updates: 1, fake_score_lr: 5e-4}]
"""


def test_zipped_keys_vary_together(tmp_path):
    runs = load(tmp_path, ONE_AXIS).expand()
    cells = [(r.method["name"], r.fake_score_updates, r.fake_score_lr) for r in runs]
    assert cells == [("dmd2", 5, 1e-4), ("dmd2", 1, 5e-4), ("sgmd", 5, 1e-4), ("sgmd", 1, 5e-4)]


def test_a_label_names_a_cell_and_is_no_key_of_its_runs(tmp_path):
    text = """
    question: which?
    zip: [{method: {name: sgmd, preset: paper}, student_lr: 5e-4, label: Paper}, {method: dmd2}]
    grid: {fake_score_updates: [1, 5]}
    include: [{method: dmd, label: Mine}]
    """
    sweep = load(tmp_path, text)
    runs = sweep.expand()
    assert run_id(runs[0]) == run_id(load(tmp_path, text.replace(", label: Paper", "")).expand()[0])
    labels = [sweep.labels().get(group_id(run)) for run in runs]
    assert [label and label.text for label in labels] == ["Paper", None, "Paper", None, "Mine"]
    assert labels[0].keys == ("method.name", "method.preset", "student_lr")
    assert "label" not in sweep.axes(runs)
    with pytest.raises(ConfigError, match="label is 3: write a text"):
        load(tmp_path, text.replace("label: Mine", "label: 3"))


def test_several_zipped_axes_are_combined(tmp_path):
    text = """
        question: which?
        zip:
          - [{method: dmd2, student_lr: 1e-3}, {method: sgmd, student_lr: 2e-3}]
          - [{fake_score_updates: 5}, {fake_score_updates: 1}]
        """
    runs = load(tmp_path, text).expand()
    cells = [(r.method["name"], r.student_lr, r.fake_score_updates) for r in runs]
    assert cells == [("dmd2", 1e-3, 5), ("dmd2", 1e-3, 1), ("sgmd", 2e-3, 5), ("sgmd", 2e-3, 1)]


def test_an_override_replaces_a_zipped_key_in_every_cell(tmp_path):
    runs = load(tmp_path, ONE_AXIS, fake_score_lr=2e-4).expand()
    assert {(r.fake_score_updates, r.fake_score_lr) for r in runs} == {(5, 2e-4), (1, 2e-4)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ONE_AXIS.replace("{fake_score_updates: 5}", "{method: dmd}"), "method is on two axes"),
        (ONE_AXIS.replace("fake_score_lr:", "fake_score_lrr:"), "unknown key 'fake_score_lrr'"),
        ("question: q\nzip: [1, 2]\n", "zip"),
    ],
)
def test_a_wrong_zip_is_refused(text, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, text).expand()


def test_cells_that_resolve_to_one_run_are_expanded_once(tmp_path):
    text = """
        question: q
        base: {method: dmd2}
        grid: {student_lr: [1e-4, 0.0001]}
        include: [{student_lr: 1.0e-4}]
        """
    assert len(load(tmp_path, text).expand()) == 1


def test_a_method_field_can_be_swept(tmp_path):
    text = "question: q\nbase: {method: sgmd}\ngrid: {method.residual_weight: [0, 0.1]}\n"
    runs = load(tmp_path, text).expand()
    assert [r.method["residual_weight"] for r in runs] == [0.0, 0.1]


def test_an_override_replaces_keys_of_base_and_grid(tmp_path):
    text = """
        question: q
        base: {method: dmd2, nfe: 2}
        grid: {fake_score_updates: [1, 5]}
        seeds: 3
        """
    overrides = {"nfe": 1, "fake_score_updates": 2, "seeds": 1, "cluster.hours": 2.5, "name": "new"}
    sweep = load(tmp_path, text, **overrides)
    (run,) = sweep.expand()
    assert (run.nfe, run.fake_score_updates) == (1, 2)
    assert (sweep.cluster.hours, sweep.name) == (2.5, "new")


def test_an_override_reaches_included_cells_and_fields_of_swept_methods(tmp_path):
    text = """
        question: q
        grid: {method: [dmd2, {name: sgmd, residual_weight: 0.5}]}
        include: [{method: dmd, nfe: 2, ema: 0.5}]
        """
    runs = load(tmp_path, text, nfe=1, ema=None).expand()
    assert [(run.nfe, run.ema) for run in runs] == [(1, None)] * 3
    sweep = load(tmp_path, text, **{"method.residual_weight": 0.25})
    sgmd = next(run for run in _resolvable(sweep) if run.method["name"] == "sgmd")
    assert sgmd.method["residual_weight"] == 0.25


def _resolvable(sweep: SweepConfig) -> list[RunConfig]:
    """Runs of the sgmd cells."""
    return sweep.model_copy(update={"exclude": ["method != 'sgmd'"]}).expand()


@pytest.mark.parametrize("baseline", [
    "{ema: null, reuse_rollout: false}",
    "{method: dmd2, ema: ~, reuse_rollout: false, nfe: 4.0}",
    "{method: {name: dmd2}, ema: null, reuse_rollout: false, adapter: null}",
])  # fmt: skip
def test_null_is_a_value_of_the_baseline(tmp_path, baseline):
    grid = "grid: {ema: [null, .5], reuse_rollout: [false, true]}"
    sweep = load(tmp_path, f"question: q\nbase: {{method: dmd2}}\n{grid}\nbaseline: {baseline}")
    assert len(sweep.expand()) == 4
    assert sweep.axes(sweep.expand()) == {"ema": [None, 0.5], "reuse_rollout": [False, True]}


@pytest.mark.parametrize(("baseline", "says"), [
    ("{ema: 'null'}", "the runs have ema null or 0.5"),
    ("{ema: '0.5', reuse_rollout: false}", "the runs have ema null or 0.5, reuse_rollout false"),
    ("{ema: 0.5, reuse_rollout: 0}", "reuse_rollout false or true"),
    ("{method.weigth: null, ema: 1}", "method.weigth nowhere"),
    ("{ema: null}", "the baseline {'ema': None} fits 2 rows, but must be one; also give reuse_"),
])  # fmt: skip
def test_a_baseline_must_be_one_row_before_anything_runs(tmp_path, baseline, says):
    grid = "grid: {ema: [null, .5], reuse_rollout: [false, true]}"
    sweep = load(tmp_path, f"question: q\nbase: {{method: dmd2}}\n{grid}\nbaseline: {baseline}")
    with pytest.raises(ConfigError) as error:
        sweep.expand()
    assert says in str(error.value)


def test_a_baseline_may_be_a_preset(tmp_path):
    text = "question: q\ngrid: {method: [dmd2, {name: dmd2, preset: paper}]}\nbaseline: "
    assert len(load(tmp_path, text + "{method: {name: dmd2, preset: paper}}").expand()) == 2
    assert len(load(tmp_path, text + "{method: dmd2, method.preset: null}").expand()) == 2
    with pytest.raises(ConfigError, match="fits 2 rows, but must be one; also give the preset"):
        load(tmp_path, text + "{method: dmd2}").expand()


def test_overrides_keep_a_methods_fields_if_only_its_name_is_swept():
    with_field = {"method": {"name": "a", "weight": 2}}
    assert apply_overrides({"method": "a"}, {"method.weight": 2}) == with_field
    assert apply_overrides(with_field, {"method": "b"}) == {"method": {"name": "b", "weight": 2}}


def test_a_dotted_key_through_a_value_is_refused():
    with pytest.raises(ConfigError, match="protocol.clips: protocol = 3: expected a mapping"):
        apply_overrides({"protocol": 3}, {"protocol.clips": 8})


def test_an_override_on_the_command_line_is_yaml():
    assert parse_override("student_lr=2e-6") == ("student_lr", 2e-6)
    assert parse_override("ema=null") == ("ema", None)
    assert parse_override("trackers=[]") == ("trackers", [])
    for wrong in ("nfe", "=2"):
        with pytest.raises(ConfigError, match="write key=value"):
            parse_override(wrong)


def test_the_reference_describes_every_key():
    lines = [line for line in reference().splitlines() if line.startswith("| `")]
    for name in RunConfig.model_fields:
        (line,) = (line for line in lines if line.startswith(f"| `{name}` "))
        assert len(line.split(" | ")[-1]) > 10, f"{name} has no description"
    assert "| `ema` | float >= 0, < 1 \\| null | `0.98` |" in reference()


@pytest.mark.parametrize("option", ["tres_per_task", "--tres-per-node", "gpus-per-socket"])
def test_sbatch_options_that_hide_the_gpus_of_a_node_are_refused(option):
    with pytest.raises(ValueError, match="gpus-per-node"):
        ClusterConfig.model_validate({"gpus": 2, "sbatch": {option: 4}})


def test_a_name_that_is_not_unicode_is_refused_in_words():
    with pytest.raises(ConfigError, match="not valid Unicode; .* set PYTHONUTF8=1"):
        validate(ClusterConfig, {"partition": "gr\udcc3"}, "s.yaml")
