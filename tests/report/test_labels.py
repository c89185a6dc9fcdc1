"""Labels of rows read as in the field, say only what varies, and are all different."""

import json
from itertools import product
from random import Random

import pandas as pd
import pytest
from stores import load_results, update_json, write_run, write_store

from distill_bench.config.identity import default_title
from distill_bench.registry import methods
from distill_bench.report.labels import (
    LONGEST,
    Declared,
    is_word,
    key_title,
    label_rows,
    name_value,
    parse_number,
    show_value,
    symbols,
)
from distill_bench.report.rows import parse_keys


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("stepping", "ode", "ODE"),
        ("stepping", "renoise", "renoise"),
        ("fake_score_updates", "5", "K=5"),
        ("guidance_scale", "3.0", "w=3"),
        ("guidance_scale", '{"high_noise": 4.0, "low_noise": 3.5}', "w=4+3.5"),
        (
            "protocol.teacher_guidance",
            '{"high_noise": 4.0, "low_noise": 3.0}',
            "teacher guidance 4+3",
        ),
        ("nfe", "1", "1 step"),
        ("nfe", "4", "4 steps"),
        ("student_lr", "0.0005", "student lr 5e-4"),
        ("fake_score_lr", "0.00025", "fake-score lr 2.5e-4"),
        ("ema", "", "no EMA"),
        ("ema", "0.98", "EMA 0.98"),
        ("fake_score", "exact", "exact fake score"),
        ("reuse_rollout", "graph", "shared graph"),
        ("negative_prompt", "", "no negative prompt"),
        ("negative_prompt", "default", "negative prompt default"),
        ("negative_prompt", "file:/home/me/still.txt", "negative prompt still.txt"),
        ("negative_prompt", "静止" * 40, f"negative prompt {'静止' * 23}静…"),
        ("prompts", "/home/me/prompts.txt", "prompts.txt"),
        ("method.residual_weight", "0.1", "residual weight 0.1"),
        ("sharding", "False", "no sharding"),
        ("sharding", "True", "sharding"),
        ("method.kernel_kind", "two_sided_box", "two sided box"),
        ("teacher", "owner/wan_small", "owner/wan small"),
        ("prompts", "x" * LONGEST, "x" * LONGEST),
        ("prompts", "x" * (LONGEST + 1), "x" * (LONGEST - 1) + "…"),
    ],
)
def test_a_setting_has_the_spelling_of_the_trade(key, value, text):
    assert name_value(key, value) == text


def test_learning_rates_are_in_scientific_notation():
    texts = [show_value(value, "student_lr") for value in ("1e-4", "0.0010", "9.9999e-5", "0")]
    assert texts == ["1e-4", "1e-3", "1e-4", "0"]
    assert show_value("0.0001", "weight_decay") == "0.0001"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "True", "", "ode", "1,5"])
def test_only_finite_numbers_are_numbers(text):
    assert parse_number(text) is None
    assert is_word(text) == (text not in ("True", ""))
    assert show_value(text) == (text or "—")


@pytest.mark.parametrize(
    "value", ["1", "-2.5e-3", '{"high_noise": 4.0, "low_noise": 3.5}', "False"]
)
def test_numbers_and_switches_are_no_words(value):
    assert not is_word(value)


def test_symbols_are_explained_once():
    assert key_title("fake_score_updates") == "K (fake-score updates)"
    keys = ["stepping", "fake_score_updates", "guidance_scale"]
    assert symbols(keys) == "K: fake-score updates; w: guidance scale"
    assert symbols(["nfe"]) == ""
    assert key_title("nfe") == "steps"
    assert key_title("sampling.nfe") == "sampled steps"


def rows(*lines, keys=("method", "stepping", "fake_score_updates")):
    return pd.DataFrame(lines, columns=list(keys), dtype=str)


def texts(*arguments) -> list[str]:
    return [label.text for label in label_rows(*arguments)]


def test_a_label_names_method_stepping_and_cadence():
    table = rows(("sgmd", "ode", "1"), ("sgmd", "renoise", "1"), ("dmd2", "ode", "5"))
    titles = {"sgmd": "SGMD", "dmd2": "DMD2"}
    labels = label_rows(table, "fake_score_updates", titles)
    assert [label.text for label in labels] == ["SGMD, ODE, K=1", "SGMD, renoise, K=1", "DMD2, K=5"]
    assert labels[0].series == labels[0].stem == "SGMD, ODE" and labels[0].settings == {}


def test_a_preset_follows_the_name_of_its_method():
    keys = ("method", "method.preset", "fake_score_lr")
    table = rows(("sgmd", "paper", "1e-4"), ("sgmd", "shared", "1e-4"), keys=keys)
    assert texts(table, None, {"sgmd shared": "SGMD, one graph"}) == [
        "SGMD paper",
        "SGMD, one graph",
    ]


def test_rows_of_two_methods_with_one_display_name_differ():
    table = rows(("a", "ode", "1"), ("b", "ode", "1"))
    first, second = texts(table, None, {"a": "Same", "b": "Same"})
    assert first.startswith("Same [method=a") and second.startswith("Same [method=b")


def test_a_declared_label_stands_for_the_keys_of_its_cell():
    table = rows(("sgmd", "ode", "1"), ("sgmd", "ode", "5"), ("dmd2", "renoise", "5"))
    given = Declared("The paper's", frozenset(["method", "stepping"]))
    whole = Declared("DMD2 of the paper", frozenset(table.columns))
    assert texts(table, "fake_score_updates", {}, [given, given, whole]) == [
        "The paper's, K=1",
        "The paper's, K=5",
        "DMD2 of the paper",
    ]


@pytest.mark.parametrize(
    ("covered", "text", "stem", "numbers"),
    [
        (["stepping"], "SGMD, Ours, student lr 1e-4, K=1, 1 step", "SGMD, Ours", "student lr, K"),
        (["student_lr", "nfe"], "SGMD, Ours, ODE, K=1", "SGMD, Ours, ODE", "K"),
        (
            ["method.name", "stepping"],
            "Ours, student lr 1e-4, K=1, 1 step",
            "Ours",
            "student lr, K",
        ),
        (["method.preset", "student_lr"], "Ours, ODE, K=1, 1 step", "Ours, ODE", "K"),
    ],
)
def test_a_declared_label_follows_the_method_unless_it_stands_for_it(covered, text, stem, numbers):
    """It stands for the keys of its cell and no others; the axis may be one of them."""
    keys = ("method", "student_lr", "stepping", "fake_score_updates", "nfe")
    table = rows(
        ("sgmd", "1e-4", "ode", "1", "1"),
        ("sgmd", "2e-4", "sde", "1", "1"),
        ("sgmd", "2e-4", "ode", "5", "1"),
        ("sgmd", "2e-4", "ode", "7", "1"),
        ("sgmd", "2e-4", "sde", "7", "1"),
        keys=keys,
    )
    label, *_ = label_rows(table, "nfe", {}, [Declared("Ours", frozenset(covered)), *[None] * 4])
    assert (label.text, label.stem, ", ".join(label.settings)) == (text, stem, numbers)
    words = {"student lr": "student lr 1e-4", "K": "K=1"}
    assert label.settings == {title: words[title] for title in label.settings}


def test_a_null_is_named_only_where_two_labels_would_be_equal():
    """The value that most rows have is not named."""
    keys = ("method", "sharding_factor", "nfe")
    lines = [("a", "1", "1"), ("a", "1", "2"), ("a", "1", "4")]
    assert texts(rows(*lines, ("a", "", "8"), keys=keys), "nfe")[-1] == "A, 8 steps"
    labels = label_rows(rows(*lines, ("a", "", "1"), keys=keys), "nfe")
    assert [label.text for label in labels] == [
        "A, 1 step",
        "A, 2 steps",
        "A, 4 steps",
        "A, sharding factor null, 1 step",
    ]
    assert labels[-1].settings == {"sharding factor": "sharding factor null"}
    both = [(method, *values) for method in "ab" for _, *values in [*lines, ("a", "", "1")]]
    label = texts(rows(*both, keys=keys), "nfe", {"a": "Same", "b": "Same"})[-1]
    assert label == "Same, sharding factor null [method=b, sharding_factor=, nfe=1], 1 step"


def test_a_number_is_hidden_where_most_rows_of_the_same_method_have_it():
    lines = [("a", "1", "1"), ("a", "1", "2"), ("a", "2", "2")]
    lines += [("b", "2", nfe) for nfe in "1248"]
    table = rows(*lines, ("b", "1", "8"), keys=("method", "depth", "nfe"))
    assert texts(table, "nfe") == [
        *("A, 1 step", "A, 2 steps", "A, depth 2, 2 steps"),
        *("B, 1 step", "B, 2 steps", "B, 4 steps", "B, 8 steps", "B, depth 1, 8 steps"),
    ]


def test_a_setting_that_varies_with_the_axis_alone_is_not_named():
    table = rows(("a", "1e-4", "1"), ("a", "2e-4", "2"), keys=("method", "student_lr", "nfe"))
    assert texts(table, "nfe") == ["A, 1 step", "A, 2 steps"]
    assert texts(table, None) == ["A, student lr 1e-4", "A, student lr 2e-4"]


def test_an_axis_of_sampling_has_a_place_also_where_sampling_is_as_in_training():
    table = rows(("a", "4", "4"), ("a", "4", "8"), keys=("method", "nfe", "sampling.nfe"))
    assert texts(table, "sampling.nfe") == ["A, sampled 4 steps", "A, sampled 8 steps"]
    assert texts(table, None) == ["A", "A, sampled 8 steps"]


def test_a_row_without_a_place_on_the_axis_also_names_its_unusual_words():
    keys = ("method", "student_lr", "stepping", "ema", "fake_score", "nfe")
    common = ("0.98", "exact")
    table = rows(
        *(("a", "1e-4", "ode", *common, nfe) for nfe in "124"),
        ("a", "2e-4", "sde", "0.9", "exact", ""),
        ("a", "3e-4", "ode", *common, ""),
        keys=keys,
    )
    labels = ["A, 1 step", "A, 2 steps", "A, 4 steps"]
    assert texts(table, "nfe") == [*labels, "A, student lr 2e-4, sde", "A, student lr 3e-4"]


def test_fields_of_the_method_come_before_fields_of_the_run_and_are_not_compared_with_others():
    """The order, 2 of one method and 1 of the other, belongs to the methods; stepping does not."""
    keys = ("method", "student_lr", "method.weight", "method.order", "stepping")
    table = rows(
        ("a", "1e-4", "1", "2", "ode"),
        ("a", "2e-4", "2", "2", "ode"),
        ("b", "2e-4", "3", "1", "sde"),
        keys=keys,
    )
    assert texts(table, None) == ["A, weight 1", "A, weight 2", "B, sde"]


@pytest.mark.parametrize("seed", range(20))
def test_labels_of_different_rows_are_different_and_begin_with_their_method(seed):
    """Also if two methods have one display name."""
    keys = ("method", "method.w", "stepping", "ema", "student_lr", "nfe")
    values = (["a", "b"], ["", "1"], ["ode", "sde"], ["", "0.9"], ["1e-4", "2e-4"], ["", "1", "2"])
    random = Random(seed)
    lines = random.sample(list(product(*values)), 1 + seed)
    axis = random.choice([None, "nfe", "student_lr"])
    titles = {"a": "Same", "b": "Same"} if seed % 2 else {"a": "One", "b": "Two"}
    labels = label_rows(rows(*lines, keys=keys), axis, titles)
    assert len({label.text for label in labels}) == len(lines)
    for (method, *_), label in zip(lines, labels, strict=True):
        assert label.stem.split(", ")[0] == titles[method] and label.series.startswith(
            titles[method]
        )
        assert label.text.startswith(label.series)


@pytest.mark.parametrize(
    ("name", "title"),
    [("dmd2", "DMD2"), ("sgmd", "SGMD"), ("ida", "IDA"), ("consistency", "Consistency")],
)
def test_a_name_without_a_title_is_spelt_as_an_acronym_or_a_word(name, title):
    assert default_title(name) == title
    assert default_title("decoupled_dmd") == "Decoupled DMD"


def test_installed_methods_have_different_display_names():
    titles = [method.title or default_title(name) for name, method in methods().items()]
    assert len(set(titles)) == len(titles)
    assert {"SiD", "DMD2", "SGMD", "TSG-Fisher", "f-distill"} <= set(titles)


def test_display_names_and_labels_come_from_the_sweep_and_keys_stay_in_the_data(tmp_path):
    store = write_store(tmp_path, [])
    run_ids = [write_run(store, "alpha", 0, cadence, 4.0) for cadence in (1, 5)]
    labels = {run_ids[1]: {"label": "Slow", "keys": ["method", "fake_score_updates"]}}
    update_json(
        store / "sweeps" / "speed.json", run_ids=run_ids, titles={"alpha": "AlphA"}, labels=labels
    )
    results = load_results(store, tmp_path / "data")
    assert [row.label for row in results.students] == ["AlphA, K=1", "Slow"]
    assert set(results.runs["method"]) == {"alpha", "data", "teacher"}
    assert [row.name for row in results.students] == [
        "method=alpha,fake_score_updates=1",
        "method=alpha,fake_score_updates=5",
    ]
    assert json.loads((tmp_path / "data" / "sweep.json").read_text())["labels"] == labels


def test_guidance_by_expert_is_one_setting_beside_guidance_of_the_whole_teacher(tmp_path):
    """Rows of a number, which have no value of an expert, stay apart."""
    store = write_store(tmp_path, [])
    scales = [3.0, 2.0, {"high_noise": 4.0, "low_noise": 3.0}]
    run_ids = [write_run(store, "alpha", 0, 1, 4.0, guidance_scale=scale) for scale in scales]
    update_json(store / "sweeps" / "speed.json", run_ids=run_ids, axes={"guidance_scale": scales})
    results = load_results(store, tmp_path / "data")
    assert [row.label for row in results.students] == ["Alpha, w=3", "Alpha, w=2", "Alpha, w=4+3"]
    assert {row.stem for row in results.students} == {"Alpha"}
    for row, scale in zip(results.students, scales, strict=True):
        assert parse_keys(row.name)["guidance_scale"] == scale
        assert row.matches({"guidance_scale": scale})
        assert len(row.runs) == 1


def test_a_row_names_how_it_is_sampled_only_if_it_was_trained_otherwise():
    keys = ("method", "stepping", "sampling.stepping", "sampling.nfe", "nfe")
    frame = rows(
        ("dmd2", "ode", "ode", "4", "4"),
        ("dmd2", "ode", "renoise", "4", "4"),
        ("dmd2", "renoise", "renoise", "4", "4"),
        ("dmd2", "renoise", "ode", "8", "4"),
        ("dmd2", "renoise", "0.5", "8", "4"),
        keys=keys,
    )
    assert [label.text for label in label_rows(frame, None)] == [
        "DMD2, ODE",
        "DMD2, ODE, sampled renoise",
        "DMD2, renoise",
        "DMD2, renoise, sampled ODE, sampled 8 steps",
        "DMD2, renoise, sampled stepping 0.5, sampled 8 steps",
    ]
