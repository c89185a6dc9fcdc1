"""Values of presets and defaults, written down a second time, so that none changes unnoticed.

They are pins: they hold a preset against this list, not against the source that it cites.
"""

import pytest

from distill_bench.method import Method
from distill_bench.methods.consistency import Consistency
from distill_bench.methods.f_distill import FDistill
from distill_bench.methods.sgmd import SGMD
from distill_bench.registry import find_method, methods

# Habits of a code, in all of its presets: fake-score updates per student update, and others.
CODES = {
    "FastGen@34f30e8": {
        "fake_score_updates": 4,
        "student_input": "real_data",
    },  # 4 : 1, noised data
    "FastVideo@2f3d407": {"fake_score_updates": 5, "exit_step": "random", "score_levels": "batch"},
    "LightX2V@f8aee98, trick": {"fake_score_updates": 5, "stepping": "ode"},
    "LightX2V@f8aee98, configs": {"fake_score_updates": 5, "stepping": "ode"},
    "LightX2V@f8aee98, lightx2v_train": {"fake_score_updates": 1, "stepping": "ode"},  # SGMD, 1 : 1
    "LightX2V@f8aee98, trainers/sgmd.py": {"fake_score_updates": 5, "stepping": "ode"},
    "Self-Forcing@33593df": {"fake_score_updates": 5},
    "DMD2@8d8fa55": {"fake_score_updates": 5},
    "SiD@01fbb13": {"fake_score_updates": 1},
}
WITHOUT_FAKE_SCORE = ("consistency",)

# Values of single presets.
LISTED = {
    ("consistency", "paper"): {"steps": 18, "distance": "mse", "weight": "one"},  # CIFAR: s_0 .. N
    ("consistency", "fastgen"): {"distance": "pseudo_huber", "target": "student"},
    ("dmd", "paper"): {"regression_weight": 0.25, "distance": "lpips"},
    ("dmd2", "fastgen"): {  # configs/experiments/WanT2V: gan_loss_weight_gen
        "gan": "teacher",
        "gan_weight": 0.03,
        "discriminator_weight": 1.0,
        "discriminator_lr": 1e-4,
        "denoise": "x0",
    },
    ("dmd2", "paper"): {"gan": "fake_score", "gan_weight": 5e-3, "denoise": "noise"},
    ("dp_dmd", "lightx2v"): {  # div_loss: weight, teacher_inference_steps, anchor_step
        "diversity_weight": 0.05,
        "teacher_steps": 40,
        "anchor": 10,
    },
    ("ida", "lightx2v"): {"keep": 0.97},
    ("gradient_template", "fastvideo"): {"a": "1/n", "normaliser": "batch"},
    ("sgmd", "paper"): {"weighting": "c_t", "residual_space": "x0", "correction": "x0"},
    ("sgmd", "official"): {
        "weighting": "inv_n",
        "residual_space": "x0_over_sigma",
        "correction": "velocity",
    },
    ("sid", "paper"): {"alpha": 1.2},
    ("sid", "video"): {"alpha": 1.0},
    ("tsg_fisher", "paper"): {"weighting": "c_t"},
    ("tsg_fisher", "lightx2v"): {"weighting": "inv_n"},
    ("tsg_sim", "paper"): {"alpha": 1.0},
}


@pytest.mark.parametrize("cell", LISTED, ids="-".join)
def test_a_preset_has_the_listed_values(cell):
    name, preset = cell
    method = find_method(name)
    overrides = method.presets[preset].overrides
    own = {key.partition(".")[2]: value for key, value in overrides.items() if "method." in key}
    assert {key: own.get(key) for key in LISTED[cell]} == LISTED[cell]


def test_presets_of_a_code_have_its_habits():
    found = set()
    for name in (
        "dmd2",
        "dp_dmd",
        "f_distill",
        "gradient_template",
        "ida",
        "sgmd",
        "sid",
        "tsg_fisher",
    ):
        for preset in find_method(name).presets.values():
            for code, habits in CODES.items():
                if preset.source.startswith(code):
                    found.add(code)
                    assert habits.items() <= preset.overrides.items(), (name, preset.source)
    assert found == CODES.keys()


def test_defaults_are_the_listed_ones():
    assert SGMD().residual_weight == 0.1  # lambda, arXiv:2605.30116 and LightX2V
    assert FDistill().ratio_high == 20.0  # FastGen@34f30e8, f_distill.py
    assert Consistency().steps == 32


@pytest.mark.parametrize("name", methods())
def test_a_method_that_changes_weights_after_an_update_says_that_it_mixes_them(name):
    """Adapters of two roles cannot be mixed, so a run with both is refused."""
    method = find_method(name)
    changes = method.after_student_update is not Method.after_student_update
    assert method.mixes_weights is changes


def test_the_averages_of_f_distill_are_part_of_a_checkpoint():
    assert "ratio" in FDistill().modules(2)["histogram"].state_dict()
