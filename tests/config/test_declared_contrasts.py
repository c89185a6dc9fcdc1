"""Declared contrasts: the rows that they select, and one line for each mistake before any run."""

import re
from pathlib import Path

import pytest

from distill_bench.config.analysis.contrasts import (
    ContrastConfig,
    Selectable,
    check_contrasts,
    contrast_terms,
)
from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import run_id
from distill_bench.config.reference import reference
from distill_bench.config.sweep_file import load_sweep
from distill_bench.config.validation import validate
from distill_bench.config.yaml_files import parse_yaml

SWEEP = """
question: which?
grid: {method: [dmd2, sgmd], stepping: [ode, renoise], fake_score_updates: [1, 5]}
seeds: 2
"""
STEPPING = "of: {stepping: ode}, minus: {stepping: renoise}, average_over: [fake_score_updates]"


def contrasts_of(tmp_path, text, sweep=SWEEP):
    path = tmp_path / "speed.yaml"
    path.write_text(sweep + text)
    loaded = load_sweep(path)
    loaded.expand()
    return loaded


def cells(steppings=("ode", "renoise"), cadences=(1, 5), seeds=(0, 1)):
    """Candidates of two methods, by id."""
    return {
        f"{method}-{stepping}-{k}-s{seed}": Selectable(
            {"method": {"name": method}, "stepping": stepping, "k": k, "seed": seed},
            f"{method}-{stepping}-{k}",
        )
        for seed in seeds
        for method in ("dmd2", "sgmd")
        for stepping in steppings
        for k in cadences
    }


def terms_of(candidates=None, **contrasts):
    """Contrast -> row -> weight."""
    configs = {
        name: validate(ContrastConfig, {"scores": ["fvd"]} | fields, name)
        for name, fields in contrasts.items()
    }
    terms = contrast_terms(configs, candidates or cells(), "speed")
    return {
        name: {term.runs[0].rpartition("-s")[0]: term.weight for term in rows}
        for name, rows in terms.items()
    }


ODE = {"of": {"method": "sgmd", "stepping": "ode", "k": 1}, "minus": "method == 'dmd2' and k == 1"}


def test_a_pair_is_one_row_minus_another():
    sides = {"of": "method == 'sgmd' and stepping == 'ode' and k == 1", "minus": {"method": "dmd2"}}
    sides["minus"] |= {"stepping": "ode", "k": 5}
    assert terms_of(a=sides) == {"a": {"sgmd-ode-1": 1.0, "dmd2-ode-5": -1.0}}


def test_an_average_has_equal_weights_over_the_values_of_its_keys():
    sides = {"of": {"stepping": "ode"}, "minus": {"stepping": "renoise"}}
    (weights,) = terms_of(a=sides | {"average_over": ["method", "k"]}).values()
    assert weights == {
        f"{method}-{stepping}-{k}": sign * 0.25
        for stepping, sign in (("ode", 1), ("renoise", -1))
        for method in ("dmd2", "sgmd")
        for k in (1, 5)
    }


def test_an_interaction_is_a_difference_of_differences():
    pairs = {
        method: {
            "of": {"method": method, "stepping": "ode", "k": 1},
            "minus": {"method": method, "stepping": "renoise", "k": 1},
        }
        for method in ("sgmd", "dmd2")
    }
    weights = terms_of(**pairs, both={"difference_of": ["sgmd", "dmd2"]})["both"]
    assert weights == {
        "sgmd-ode-1": 1.0,
        "sgmd-renoise-1": -1.0,
        "dmd2-ode-1": -1.0,
        "dmd2-renoise-1": 1.0,
    }


def test_a_selection_is_sampled_as_trained_unless_it_names_sampling():
    trained = cells(steppings=("renoise",), cadences=(1,))
    ways = {
        f"{run}/samplings/ode": Selectable(
            {**one.data, "sampling": {"stepping": "ode"}}, f"{one.row}/ode", as_trained=False
        )
        for run, one in trained.items()
    }
    own = {
        run: Selectable({**one.data, "sampling": {"stepping": "renoise"}}, one.row)
        for run, one in trained.items()
    }
    sides = {"of": {"method": "sgmd", "sampling.stepping": "ode"}, "minus": {"method": "sgmd"}}
    terms = contrast_terms(
        {"a": validate(ContrastConfig, sides | {"scores": ["fvd"]}, "a")}, own | ways, "speed"
    )
    assert {term.weight: term.runs for term in terms["a"]} == {
        1.0: tuple(run for run in ways if run.startswith("sgmd")),
        -1.0: tuple(run for run in own if run.startswith("sgmd")),
    }


def test_contrasts_do_not_change_the_runs(tmp_path):
    with_contrast = contrasts_of(
        tmp_path,
        f"contrasts: {{a: {{{STEPPING.replace('over: [', 'over: [method, ')}, scores: [fvd]}}}}",
    )
    plain = contrasts_of(tmp_path, "")
    assert list(map(run_id, with_contrast.expand())) == list(map(run_id, plain.expand()))


def test_a_preset_selects_a_row(tmp_path):
    sweep = """
    question: which?
    grid: {method: [{name: sgmd, preset: paper}, {name: sgmd, preset: official}]}
    """
    sides = "of: {method: {name: sgmd, preset: paper}}, minus: \"method.preset == 'official'\""
    contrasts_of(tmp_path, f"contrasts: {{a: {{{sides}, scores: [fvd]}}}}", sweep)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (f"{STEPPING}, scores: [fvd]", "of {'stepping': 'ode'} selects 4 rows, which differ in"),
        ("of: {nfe: 3}, minus: {nfe: 4}, scores: [fvd]", "selects no row; the runs have nfe 4"),
        ("of: 'nfe == 3', minus: {nfe: 4}, scores: [fvd]", "of 'nfe == 3' selects no row"),
        ("of: {stepping: ode}, minus: {steping: ode}, scores: [fvd]", "did you mean 'stepping'"),
        ("of: 'steping == 1', minus: {nfe: 4}, scores: [fvd]", "unknown key 'steping'"),
        ("of: 'nfe ==', minus: {nfe: 4}, scores: [fvd]", "invalid syntax"),
        ("of: {nfe: 4}, minus: {nfe: 4}, average_over: [nef], scores: [fvd]", "unknown key 'nef'"),
        ("of: {nfe: 4}, scores: [fvd]", "give `of` and `minus`, or `difference_of`"),
        ("difference_of: [b, c], scores: [fvd]", "difference_of names 'b', which is no contrast"),
        ("difference_of: [b], scores: [fvd]", "difference_of"),
        ("of: {nfe: 4}, minus: {nfe: 4}", "scores"),
        ("of: {nfe: 4}, minus: {nfe: 4}, scores: []", "scores"),
        (
            "of: {nfe: 4}, minus: {nfe: 4}, scores: [a], score: [b]",
            "unknown key 'contrasts.a.score'",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path, fields, message):
    with pytest.raises(ConfigError) as caught:
        contrasts_of(tmp_path, f"contrasts: {{a: {{{fields}}}}}")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "contrasts.a" in str(caught.value)


def test_sides_without_a_common_seed_are_refused():
    one = "method == 'sgmd' and stepping == 'ode' and k == 1 and seed == 0"
    other = "method == 'dmd2' and stepping == 'ode' and k == 1 and seed "
    (terms,) = terms_of(a={"of": one, "minus": f"{other} < 2"}).values()
    assert terms == {"sgmd-ode-1": 1.0, "dmd2-ode-1": -1.0}
    with pytest.raises(ConfigError, match="contrasts.a: its rows share no seed"):
        terms_of(a={"of": one, "minus": f"{other} > 0"})


def test_sides_must_average_over_the_same_values():
    rows = {run: one for run, one in cells().items() if "renoise-5" not in run}
    sides = {"of": {"stepping": "ode"}, "minus": {"stepping": "renoise"}}
    with pytest.raises(ConfigError, match=r"different values of method, k: only one has .*5\]"):
        terms_of(rows, a=sides | {"average_over": ["method", "k"]})


def test_a_row_minus_itself_is_refused():
    side = {"method": "sgmd", "stepping": "ode", "k": 1}
    with pytest.raises(ConfigError, match="both sides are the same rows"):
        terms_of(a={"of": side, "minus": dict(side)})


def test_the_reference_of_keys_describes_contrasts():
    section = reference().split("### `contrasts`")[1].split("###")[0]
    assert all(f"`{key}`" in section for key in ContrastConfig.model_fields)


def test_sampling_of_a_sweep_is_selected_by_its_keys(tmp_path):
    text = """
sampling: [{stepping: [ode, renoise]}]
contrasts:
  trained by renoise:
    of: {method: sgmd, stepping: renoise, fake_score_updates: 1, sampling.stepping: ode}
    minus: {method: sgmd, stepping: renoise, fake_score_updates: 1}
    scores: [fvd]
  trained by ode:
    of: {method: sgmd, stepping: ode, fake_score_updates: 1}
    minus: {method: sgmd, stepping: ode, fake_score_updates: 1, sampling.stepping: renoise}
    scores: [fvd]
  both: {difference_of: [trained by renoise, trained by ode], scores: [fvd]}
"""
    assert list(contrasts_of(tmp_path, text).contrasts)[-1] == "both"


def test_the_example_of_the_readme_is_valid():
    text = (Path(__file__).parents[2] / "sweeps" / "README.md").read_text()
    (example,) = re.findall(r"```yaml\n(contrasts:.*?)```", text, re.DOTALL)
    contrasts = {
        name: validate(ContrastConfig, fields, name)
        for name, fields in parse_yaml(example)["contrasts"].items()
    }
    check_contrasts(contrasts, "README")
    assert len(contrasts) == 5
