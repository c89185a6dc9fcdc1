"""The border: what a sweep file may say, what a run's identity is, and that bad input ends in one line."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from distill_bench.config.conditions import holds
from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import group_id, hashed_fields, run_id
from distill_bench.config.overrides import apply_overrides
from distill_bench.config.resolve import evaluated_updates, load_run, method_of, resolve
from distill_bench.config.schema import AdapterConfig, ProtocolConfig, RunConfig
from distill_bench.config.sweep_file import load_sweep
from distill_bench.config.yaml_files import dump_yaml, parse_yaml
from distill_bench.method import Batch, Depth, Loss, Method, Nets


def sweep_file(folder: Path, text: str) -> Path:
    path = folder / "speed.yaml"
    path.write_text(text)
    return path


def expanded(folder: Path, text: str) -> list[RunConfig]:
    return load_sweep(sweep_file(folder, text)).expand()


# --- identity


def test_every_key_of_a_run_is_declared_in_or_out_of_the_id():
    for model in (RunConfig, ProtocolConfig, AdapterConfig):
        for name, field in model.model_fields.items():
            assert isinstance((field.json_schema_extra or {}).get("in_id"), bool), (
                f"{model.__name__}.{name}"
            )


def test_a_run_has_one_id_however_it_is_written():
    plain = resolve({"method": "dmd2"})
    assert run_id(
        resolve({"method": {"name": "dmd2"}, "student_lr": 1e-4, "guidance_scale": 3})
    ) == run_id(plain)
    assert run_id(plain).startswith("dmd2-s0-")


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
def test_what_changes_the_numbers_changes_the_id(change):
    assert run_id(resolve({"method": "dmd2"} | change)) != run_id(resolve({"method": "dmd2"}))


@pytest.mark.parametrize(
    "change", [{"log_every": 1}, {"checkpoint_every": 7}, {"threads": 2}, {"trackers": []}]
)
def test_what_does_not_change_the_numbers_leaves_the_id(change):
    assert run_id(resolve({"method": "dmd2"} | change)) == run_id(resolve({"method": "dmd2"}))


def test_a_group_is_a_run_without_its_seed():
    a, b = (resolve({"method": "dmd2", "seed": seed}) for seed in (0, 1))
    assert run_id(a) != run_id(b) and group_id(a) == group_id(b)


def test_the_identity_holds_the_method_with_every_field_and_the_teacher_by_content():
    config = resolve({"method": "sgmd"})
    assert config.method == {"name": "sgmd"} | vars(method_of(config))
    identity = hashed_fields(config)
    assert "teacher" not in identity and len(identity["teacher_hash"]) == 12


def test_a_teacher_counts_by_content_not_by_path(tiny_wan, tmp_path):
    import shutil

    def id_with(teacher: Path) -> str:
        return run_id(resolve({"method": "dmd2", "teacher": str(teacher), "frames": 5}))

    copy = shutil.copytree(tiny_wan, tmp_path / "elsewhere")
    assert id_with(copy) == id_with(tiny_wan)
    (copy / "prompts.txt").write_text("a red circle\n")
    assert id_with(copy) != id_with(tiny_wan)


def test_clips_must_fit_the_strides_and_patches_of_the_teacher(tiny_wan):
    """Wan's autoencoder makes 1 + (frames - 1) / 4 latents: eight frames would come back as five."""
    for key, value in (("frames", 8), ("height", 24), ("width", 8)):
        with pytest.raises(ConfigError, match=f"{key} {value} must be"):
            resolve({"method": "dmd2", "teacher": str(tiny_wan), "frames": 5} | {key: value})


def test_a_resolved_run_survives_its_own_yaml(tmp_path):

    config = resolve({"method": "sgmd", "student_lr": 3e-7})
    (tmp_path / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    assert load_run(tmp_path) == config and run_id(load_run(tmp_path)) == run_id(config)


def test_fields_of_a_method_take_what_yaml_has_for_them():
    """Whole numbers for real ones, lists for tuples, and numbers for coefficients; every coefficient that has a value passes."""
    assert (
        resolve({"method": {"name": "sgmd", "residual_weight": 1}}).method["residual_weight"] == 1.0
    )
    assert resolve({"method": {"name": "gradient_template", "a": 0, "b": 0.5}}).method["b"] == "0.5"
    assert method_of(
        resolve({"method": {"name": f"{__file__}:Listed", "depths": [0.5, 1]}})
    ).depths == (0.5, 1.0)
    for expression in ("sigma/(1-sigma)", "1/(1-sigma)", "(1-sigma)**-1", "1/(n-1)", "-n", "2"):
        assert (
            resolve({"method": {"name": "gradient_template", "a": expression}}).method["a"]
            == expression
        )


@dataclass(frozen=True)
class Listed(Method):
    """A method with a tuple for a field."""

    paper: ClassVar[str] = "none"
    depths: tuple[Depth, ...] = (0.5,)

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        raise NotImplementedError


def test_what_has_no_effect_makes_no_run_of_its_own():
    plain, exact = (
        resolve({"method": "consistency", "fake_score": kind}) for kind in ("trained", "exact")
    )
    assert (
        run_id(plain)
        == run_id(exact)
        == run_id(resolve({"method": "consistency", "reuse_rollout": True}))
    )
    given = {
        "method": {"name": "sgmd", "preset": "paper"},
        "teacher": "gaussian",
        "fake_score": "exact",
    }
    assert run_id(resolve(given)) == run_id(resolve(given | {"reuse_rollout": False}))


# --- expansion


def test_a_grid_is_every_combination_by_every_seed_and_includes_come_beside_it(tmp_path):
    runs = expanded(
        tmp_path,
        """
        question: which?
        base: {student_updates: 4}
        grid: {method: [dmd2, sgmd], fake_score_updates: [1, 5]}
        include: [{method: dmd, nfe: 2}]
        exclude: ["method == 'sgmd' and fake_score_updates > 1"]
        seeds: 2
        """,
    )
    cells = {(r.method["name"], r.fake_score_updates, r.nfe) for r in runs}
    assert cells == {("dmd2", 1, 4), ("dmd2", 5, 4), ("sgmd", 1, 4), ("dmd", 5, 2)}
    assert (
        len(runs) == 8
        and {r.seed for r in runs} == {0, 1}
        and {r.student_updates for r in runs} == {4}
    )


def test_what_is_zipped_varies_together(tmp_path):
    text = """
        question: which?
        grid: {method: [dmd2, sgmd]}
        zip: [{fake_score_updates: 5}, {fake_score_updates: 1, fake_score_lr: 5e-4}]
        """
    cells = [
        (r.method["name"], r.fake_score_updates, r.fake_score_lr) for r in expanded(tmp_path, text)
    ]
    assert cells == [("dmd2", 5, 1e-4), ("dmd2", 1, 5e-4), ("sgmd", 5, 1e-4), ("sgmd", 1, 5e-4)]
    runs = load_sweep(sweep_file(tmp_path, text), {"fake_score_lr": 2e-4}).expand()
    assert {(r.fake_score_updates, r.fake_score_lr) for r in runs} == {(5, 2e-4), (1, 2e-4)}
    with pytest.raises(ConfigError, match="method is on two axes"):
        expanded(tmp_path, text.replace("{fake_score_updates: 5}", "{method: dmd}"))
    two = """
        question: which?
        zip:
          - [{method: dmd2, student_lr: 1e-3}, {method: sgmd, student_lr: 2e-3}]
          - [{fake_score_updates: 5}, {fake_score_updates: 1}]
        """
    cells = [
        (r.method["name"], r.student_lr, r.fake_score_updates) for r in expanded(tmp_path, two)
    ]
    assert cells == [("dmd2", 1e-3, 5), ("dmd2", 1e-3, 1), ("sgmd", 2e-3, 5), ("sgmd", 2e-3, 1)]
    with pytest.raises(ConfigError, match="zip"):
        expanded(tmp_path, "question: q\nzip: [1, 2]\n")
    with pytest.raises(ConfigError, match="unknown key 'fake_score_lrr'"):
        expanded(tmp_path, text.replace("fake_score_lr:", "fake_score_lrr:"))


def test_cells_that_are_one_run_are_made_once(tmp_path):
    text = "question: q\nbase: {method: dmd2}\ngrid: {student_lr: [1e-4, 0.0001]}\ninclude: [{student_lr: 1.0e-4}]\n"
    assert len(expanded(tmp_path, text)) == 1


def test_a_method_field_can_be_swept(tmp_path):
    runs = expanded(
        tmp_path, "question: q\nbase: {method: sgmd}\ngrid: {method.residual_weight: [0, 0.1]}\n"
    )
    assert [r.method["residual_weight"] for r in runs] == [0.0, 0.1]


def test_an_override_lies_over_base_and_grid(tmp_path):
    path = sweep_file(
        tmp_path,
        "question: q\nbase: {method: dmd2, nfe: 2}\ngrid: {fake_score_updates: [1, 5]}\nseeds: 3\n",
    )
    sweep = load_sweep(
        path, {"nfe": 1, "fake_score_updates": 2, "seeds": 1, "cluster.hours": 2.5, "name": "other"}
    )
    (run,) = sweep.expand()
    assert (run.nfe, run.fake_score_updates, sweep.cluster.hours, sweep.name) == (
        1,
        2,
        2.5,
        "other",
    )


def test_merge_keeps_a_methods_fields_where_only_its_name_is_swept():
    assert apply_overrides({"method": "a"}, {"method.weight": 2}) == {
        "method": {"name": "a", "weight": 2}
    }
    assert apply_overrides({"method": {"name": "a", "weight": 2}}, {"method": "b"}) == {
        "method": {"name": "b", "weight": 2}
    }


@pytest.mark.parametrize(
    "updates, evaluations, expected",
    [(100, 4, [25, 50, 75, 100]), (10, 3, [4, 7, 10]), (2, 4, [1, 2]), (7, 1, [7])],
)
def test_students_are_kept_evenly_and_at_the_end(updates, evaluations, expected):
    assert (
        evaluated_updates(
            resolve({"method": "dmd2", "student_updates": updates, "evaluations": evaluations})
        )
        == expected
    )


# --- YAML


def test_numbers_and_booleans_are_those_of_yaml_1_2():
    text = "{a: 2e-6, b: 1e3, c: no, d: true, e: 08, f: 12:30, g: .5, h: -3, i: null}"
    expected = {
        "a": 2e-6,
        "b": 1000.0,
        "c": "no",
        "d": True,
        "e": 8,
        "f": "12:30",
        "g": 0.5,
        "h": -3,
        "i": None,
    }
    assert json.dumps(parse_yaml(text)) == json.dumps(expected)


@pytest.mark.parametrize(
    "text, says",
    [
        (
            "question: q\nbase: {method: dmd2, student_ltr: 1e-4}",
            "unknown key 'student_ltr' (did you mean 'student_lr'?)",
        ),
        (
            "question: q\nbase: {method: dmd2, protocol: {clip: 3}}",
            "unknown key 'protocol.clip' (did you mean 'clips'?)",
        ),
        ("question: q\nbase: {method: dmd2}\ngrd: {}", "unknown key 'grd' (did you mean 'grid'?)"),
        (
            "question: q\nbase: {method: dmd2}\ngrid: {fake_score_update: [1]}",
            "did you mean 'fake_score_updates'",
        ),
        ("question: q\nbase: {method: dmd2, student_lr: fast}", "student_lr = 'fast'"),
        (
            "question: q\nbase: {method: dmd2, compile: 'yes'}",
            "run: compile = 'yes': Input should be true or false",
        ),
        (
            "question: q\nbase: {method: dmd2, reuse_rollout: 2}",
            "run: reuse_rollout = 2: Input should be true or false or 'graph'",
        ),
        ("question: q\nbase: {method: dmd2, student_updates: 5.5}", "student_updates = 5.5"),
        ("question: q\nbase: {method: dmd2, nfe: 0}", "nfe = 0"),
        ("question: q\nbase: {method: dmd2, stepping: euler}", "stepping = 'euler'"),
        ("question: q\nbase: {method: dmd3}", "no method called 'dmd3' (did you mean 'dmd"),
        (
            "question: q\nbase: {method: {name: sgmd, lambda: 1}}",
            "method.lambda: SGMD has no such field",
        ),
        (
            "question: q\nbase: {method: {name: sgmd, weighting: mine}}",
            "method: weighting = 'mine'",
        ),
        (
            "question: q\nbase: {method: {name: sgmd, residual_weight: '0.2'}}",
            "method: residual_weight = '0.2'",
        ),
        (
            "question: q\nbase: {method: {name: sgmd, residual_weight: true}}",
            "method: residual_weight = True",
        ),
        (
            "question: q\nbase: {method: {name: sgmd, residual_weight: -1}}",
            "method: residual_weight = -1",
        ),
        (
            "question: q\nbase: {method: {name: sgmd, residual_weight: 1e999}}",
            "method.residual_weight = inf",
        ),
        ("question: q\nbase: {method: sgmd, student_lr: 1e999}", "student_lr = inf"),
        ("question: q\nbase: {method: {name: consistency, steps: 0}}", "method: steps = 0"),
        ("question: q\nbase: {method: {name: consistency, steps: 8.0}}", "method: steps = 8.0"),
        ("question: q\nbase: {method: {name: f_distill, bins: 0}}", "method: bins = 0"),
        (
            "question: q\nbase: {method: {name: f_distill, feature_depth: 7}}",
            "method: feature_depth = 7",
        ),
        (
            "question: q\nbase: {method: {name: f_distill, ratio_low: 30}}",
            "method: ratio_low 30 must be below ratio_high 20",
        ),
        (
            "question: q\nbase: {method: {name: dmd2, feature_depth: 0}}",
            "method: feature_depth = 0",
        ),
        (
            "question: q\nbase: {method: {name: dmd2, discriminator_lr: -1}}",
            "method: discriminator_lr = -1",
        ),
        ("question: q\nbase: {method: {name: ida, keep: 5}}", "method: keep = 5"),
        (
            "question: q\nbase: {method: {name: dmd, regression_weight: -1}}",
            "method: regression_weight = -1",
        ),
        (
            "question: q\nbase: {method: {name: dp_dmd, anchor: 50}}",
            "method: anchor 50 must be at most teacher_steps 30",
        ),
        (
            "question: q\nbase: {method: {name: gradient_template, teacher_stop_gradient: 'no'}}",
            "teacher_stop_gradient = 'no'",
        ),
        (
            "question: q\nbase: {method: {name: gradient_template, a: 1/0}}",
            "method: a '1/0' is not a finite number at n = 0.37",
        ),
        (
            "question: q\nbase: {method: {name: gradient_template, b: 10**400*n}}",
            "method: b '10**400*n' is not a finite number",
        ),
        (
            "question: q\nbase: {method: {name: gradient_template, b: 9**9**9**9}}",
            "method: b '9**9**9**9' is not a finite number",
        ),
        ("question: q\nbase: {method: {name: gradient_template, b: 1e999}}", "method.b = inf"),
        (
            "question: q\nbase: {method: {name: gradient_template, lam: (-1)**0.5}}",
            "method: lam '(-1)**0.5' is not a finite number",
        ),
        (
            "question: q\nbase: {method: {name: gradient_template, lam: 'True*n'}}",
            "may hold n, sigma, numbers",
        ),
        ("question: q\nbase: {method: {name: gradient_template, lam: true}}", "method: lam = True"),
        (
            "question: q\nbase: {method: {name: gradient_template, a: 1/(n-1), normaliser: none}}",
            "at n = 1, sigma",
        ),
        (
            "question: q\nbase: {method: ida, teacher: gaussian}",
            "teacher 'gaussian': ida averages weights of two roles",
        ),
        (
            "question: q\nbase: {method: f_distill, teacher: gaussian, fake_score: exact}",
            "f_distill has modules of its own",
        ),
        ("question: q\nbase: {method: dmd2, teacher: /nowhere}", "no teacher '/nowhere'"),
        (
            "question: q\nbase: {method: dmd2, sigma_min: 0.99}",
            "sigma_min 0.99 must be below sigma_max 0.98",
        ),
        (
            "question: q\nbase: {method: dmd2, accumulation: 3}",
            "batch_size 8 must be a multiple of accumulation 3",
        ),
        ("question: q\nbase: {student_updates: 3}", "method is missing"),
        ("question: q\nbase: {method: 3}", "method.name is 3"),
        ("question: q\nbase: [dmd2]", "base = ['dmd2']: a mapping"),
        ("question: q\nname: ../evil\nbase: {method: dmd2}", "name = '../evil'"),
        (
            "question: q\nbase: {method: dmd2, protocol: {evaluators: [fvdd]}}",
            "no evaluator called 'fvdd' (did you mean 'fvd'?)",
        ),
        ("question: q\nbase: {method: dmd2, protocol: {clips: 1}}", "protocol.clips = 1"),
        (
            "question: q\nbase: {method: dmd2, trackers: [wandbb]}",
            "trackers: 'wandbb' is no tracker of accelerate",
        ),
        ("question: q\nbase: {method: dmd2, height: 33}", "height 33 must be a multiple of 8"),
        ("question: q\nbase: {method: dmd2, frames: 9}", "frames 9 must be a multiple of 2"),
        ("question: q\nbase: {method: dmd2, seed: 3}", "seed is no key of a cell"),
        (
            "question: q\nbase: {method: dmd2}\nbaseline: {nfe: 3}",
            "no run is the baseline {'nfe': 3}",
        ),
        (
            "question: q\nbase: {method: dmd2}\nexclude: ['nfee == 4']",
            "'nfee == 4': unknown key 'nfee' (did you mean 'nfe'?)",
        ),
        ("question: q\nbase: {method: dmd2}\ngrid: {nfe: []}", "grid.nfe is empty"),
        ("question: q\nbase: {method: dmd2}\nseeds: 0", "the grid is empty"),
        ("question: q\nbase: {method: dmd2}\nexclude: ['nfe == 4']", "the grid is empty"),
        (
            "question: q\nbase: {method: dmd2}\nexclude: ['nfe + 1 > 4']",
            "'nfe + 1 > 4': 'nfe + 1' is not allowed; allowed are keys",
        ),
        ("question: q\nbase: {method: dmd2}\ncluster: {hours: 0}", "cluster.hours = 0"),
        ("base: {method: dmd2}", "question"),
        ("question: q\nnfe: 1\nnfe: 2", 'not YAML in line 3: found duplicate key "nfe"'),
        ("question: [q", "not YAML in line"),
        ("- 1\n- 2", "a sweep file is a mapping"),
    ],
)
def test_bad_input_is_one_line_that_names_the_thing(text, says, tmp_path):
    with pytest.raises(ConfigError) as error:
        expanded(tmp_path, text)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_expression_compares_and_nothing_else():
    data = {"method": {"name": "a", "weight": 2}, "nfe": 4}
    assert holds("method == 'a' and 1 < nfe <= 4 and not method.weight in [1, 3]", data)
    assert not holds("nfe != 4 or missing == 1", data)
    with pytest.raises(ConfigError, match="__import__"):
        holds("__import__('os')", data)
