"""Bad sweep files: each error is one line with the key, the value and the allowed values."""

from pathlib import Path

import pytest

from distill_bench.config.errors import ConfigError
from distill_bench.config.sweep_file import load_sweep

# keys of a run beside `method: dmd2`, part of the message
RUN_KEYS = [
    ("student_ltr: 1e-4", "unknown key 'student_ltr' (did you mean 'student_lr'?)"),
    ("protocol: {clip: 3}", "unknown key 'protocol.clip' (did you mean 'clips'?)"),
    ("student_lr: fast", "student_lr = 'fast'"),
    ("compile: 'yes'", "run: compile = 'yes': Input should be true or false or 'network'"),
    ("reuse_rollout: 2", "run: reuse_rollout = 2: Input should be true or false or 'graph'"),
    ("student_updates: 5.5", "student_updates = 5.5"),
    ("nfe: 0", "nfe = 0"),
    ("stepping: euler", "stepping = 'euler'"),
    ("teacher: /nowhere", "no teacher '/nowhere'"),
    ("student: run:dmd2-s0-1", "to start from the student of a run, write init: dmd2-s0-1"),
    ("sigma_min: 0.99", "sigma_min 0.99 must be below sigma_max 0.98"),
    ("accumulation: 3", "batch_size 8 must be a multiple of accumulation 3"),
    ("protocol: {evaluators: [fvdd]}", "no evaluator called 'fvdd' (did you mean 'fvd'?)"),
    ("protocol: {clips: 1}", "protocol.clips = 1"),
    ("trackers: [wandbb]", "trackers: 'wandbb' is not a tracker of accelerate"),
    ("height: 33", "height 33 must be a multiple of 4"),
    ("frames: 9", "frames 9 must be a multiple of 8"),
    ("seed: 3", "seed cannot be set per cell"),
]

# keys of `method`, part of the message
METHOD_KEYS = [
    ("name: sgmd, lambda: 1", "method.lambda: SGMD has no such field"),
    ("name: sgmd, weighting: mine", "method: weighting = 'mine'"),
    ("name: sgmd, residual_weight: '0.2'", "method: residual_weight = '0.2'"),
    ("name: sgmd, residual_weight: true", "method: residual_weight = True"),
    ("name: sgmd, residual_weight: -1", "method: residual_weight = -1"),
    ("name: sgmd, residual_weight: 1e999", "method.residual_weight = inf"),
    ("name: consistency, steps: 0", "method: steps = 0"),
    ("name: consistency, steps: 8.0", "method: steps = 8.0"),
    ("name: f_distill, bins: 0", "method: bins = 0"),
    ("name: f_distill, feature_depth: 7", "method: feature_depth = 7"),
    ("name: f_distill, ratio_low: 30", "method: ratio_low 30 must be below ratio_high 20"),
    ("name: dmd2, feature_depth: 0", "method: feature_depth = 0"),
    ("name: dmd2, discriminator_lr: -1", "method: discriminator_lr = -1"),
    ("name: ida, keep: 5", "method: keep = 5"),
    ("name: dmd, regression_weight: -1", "method: regression_weight = -1"),
    ("name: dp_dmd, anchor: 50", "method: anchor 50 must be at most teacher_steps 30"),
    ("name: gradient_template, teacher_stop_gradient: 'no'", "teacher_stop_gradient = 'no'"),
    ("name: gradient_template, a: 1/0", "method: a '1/0' is not a finite number at n = 0.37"),
    ("name: gradient_template, b: 10**400*n", "method: b '10**400*n' is not a finite number"),
    ("name: gradient_template, b: 9**9**9**9", "method: b '9**9**9**9' is not a finite number"),
    ("name: gradient_template, b: 1e999", "method.b = inf"),
    ("name: gradient_template, lam: (-1)**0.5", "method: lam '(-1)**0.5' is not a finite number"),
    ("name: gradient_template, lam: 'True*n'", "may hold n, sigma, numbers"),
    ("name: gradient_template, lam: true", "method: lam: coefficient 'True' may hold"),
    ("name: gradient_template, a: 1/(n-1), normaliser: none", "at n = 1, sigma"),
]

# sweep file, part of the message
SWEEP_FILES = [
    ("question: q\nbase: {method: dmd2}\ngrd: {}", "unknown key 'grd' (did you mean 'grid'?)"),
    (
        "question: q\nbase: {method: dmd2}\ngrid: {fake_score_update: [1]}",
        "did you mean 'fake_score_updates'",
    ),
    ("question: q\nbase: {method: dmd3}", "no method called 'dmd3' (did you mean 'dmd"),
    ("question: q\nbase: {method: sgmd, student_lr: 1e999}", "student_lr = inf"),
    (
        "question: q\nbase: {method: ida, teacher: gaussian}",
        "teacher 'gaussian': ida averages weights of two roles",
    ),
    (
        "question: q\nbase: {method: f_distill, teacher: gaussian, fake_score: exact}",
        "f_distill has modules of its own",
    ),
    ("question: q\nbase: {student_updates: 3}", "method is missing"),
    ("question: q\nbase: {method: 3}", "method.name is 3"),
    ("question: q\nbase: [dmd2]", "base = ['dmd2']: expected a mapping"),
    ("question: q\nname: ../evil\nbase: {method: dmd2}", "name = '../evil'"),
    (
        "question: q\nbase: {method: dmd2}\nbaseline: {nfe: 3}",
        "no run matches the baseline {'nfe': 3}",
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
        "'nfe + 1 > 4': 'nfe + 1' is not allowed; allowed: keys",
    ),
    ("question: q\nbase: {method: dmd2}\ncluster: {hours: 0}", "cluster.hours = 0"),
    ("base: {method: dmd2}", "question"),
    ("question: q\nnfe: 1\nnfe: 2", 'not YAML in line 3: found duplicate key "nfe"'),
    ("question: [q", "not YAML in line"),
    ("- 1\n- 2", "a sweep file is a mapping"),
]


def message(text: str, folder: Path) -> str:
    """The error of a sweep file, checked to be one line."""
    path = folder / "speed.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_sweep(path).expand()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("keys", "says"), RUN_KEYS)
def test_a_wrong_key_of_a_run_is_named(keys, says, tmp_path):
    assert says in message(f"question: q\nbase: {{method: dmd2, {keys}}}", tmp_path)


@pytest.mark.parametrize(("keys", "says"), METHOD_KEYS)
def test_a_wrong_key_of_a_method_is_named(keys, says, tmp_path):
    assert says in message(f"question: q\nbase: {{method: {{{keys}}}}}", tmp_path)


@pytest.mark.parametrize(("text", "says"), SWEEP_FILES)
def test_a_wrong_sweep_file_is_refused(text, says, tmp_path):
    assert says in message(text, tmp_path)
