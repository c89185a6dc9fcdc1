"""YAML as sweep files and run.yaml use it: types of YAML 1.2, one-line errors, lossless writing."""

import json

import pytest
import yaml

from distill_bench.config.errors import ConfigError
from distill_bench.config.sweep_file import load_sweep
from distill_bench.config.yaml_files import dump_yaml, load_written, load_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-6", 2e-6),
        ("1e3", 1000.0),
        ("1.5E-3", 0.0015),
        (".5", 0.5),
        ("5.", 5.0),
        ("+3", 3),
        ("-3", -3),
        ("08", 8),
        ("0o7", 7),
        ("0x10", 16),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("12:30", "12:30"),
        ("2026-11-29", "2026-11-29"),
        ("1e999", float("inf")),
        ("'0.5'", "0.5"),
    ],
)
def test_scalars_have_the_types_of_yaml_1_2(text, value):
    parsed = parse_yaml(f"key: {text}")["key"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_merge_keys_are_read_and_explicit_keys_win(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text(
        """
defaults: &short {teacher: gaussian, student_updates: 4, nfe: 2}
question: q?
base:
  <<: *short
  nfe: 1
grid: {method: [dmd2]}
"""
    )
    (run,) = load_sweep(path).expand()
    assert (run.teacher, run.student_updates, run.nfe) == ("gaussian", 4, 1)
    several = parse_yaml("a: {<<: [{x: 1}, {x: 2, y: 3}], z: 4}")
    assert several == {"a": {"x": 1, "y": 3, "z": 4}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", 'not YAML in line 3: found duplicate key "a"'),
        ("question: [q", "not YAML in line 1: expected ',' or ']'"),
        ("a: 1\nmethod: {{name}}", "not YAML in line 2: a key is a mapping; put text with braces"),
        (
            "a: 1\nprompts: {{root}}/p.txt",
            "not YAML in line 2: expected <block end>, but found '<scalar>'; put text with",
        ),
        ("a: {{name}}: 1", "not YAML in line 1: mapping values are not allowed here"),
        ("? [a, b]\n: 1", "a key must be text or a number, not ('a', 'b')"),
        ("a: *nowhere", "not YAML in line 1: found undefined alias 'nowhere'"),
        ("a: !!python/object:os.system x", "not YAML in line 1: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "not YAML in line 2: expected a single document in the stream, but"),
        ("a: {<<: 3}", "not YAML in line 1: expected a mapping or list of mappings for merging"),
        ("\ta: 1", "not YAML in line 1: found character '\\t'"),
        ("a: &x [*x]", "not YAML: nested too deeply"),
        ("a: !!binary aGk=", "b'hi' is a bytes; write text, a number"),
        ("a: !!set {x, y}", "{"),
        ("a: !!int x", "not YAML: invalid literal for int()"),
        ("a: " + "1" * 5000, "not YAML: Exceeds the limit"),
        ("a: \x07", "not YAML: special characters are not allowed"),
        ("[" * 5000, "not YAML: nested too deeply"),
    ],
)
def test_an_error_is_one_line_with_its_line_number(text, says, tmp_path):
    with pytest.raises(ConfigError) as error:
        parse_yaml(text)
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^{path}: "):
        load_yaml(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"cannot read {tmp_path}/none.yaml: No such file"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "latin1.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=f"cannot read {tmp_path}/latin1.yaml: 'utf-8' codec"):
        load_yaml(tmp_path / "latin1.yaml")


@pytest.mark.parametrize("separator", ["\x85", "\u2028", "\u2029"])
def test_only_a_line_feed_ends_a_line_of_yaml(separator):
    word = f"a{separator}b"
    text = (
        f"plain: {word} # {word}\nquoted: '{word}'\ndouble: \"{word}\"\nblock: |\n  {word}\n  c\n"
    )
    keys = ("plain", "quoted", "double")
    assert parse_yaml(text) == dict.fromkeys(keys, word) | {"block": f"{word}\nc\n"}
    assert parse_yaml("a: 1\r\nb: 2\r\n") == {"a": 1, "b": 2}


TEXTS = [
    *("0.5", "1e-1", ".5e3", "0x10", "no", "true", "null", "~", "", "12:30", "2026-11-29"),
    *(" x", "a: b", "# c", "é漢🐈", "a\nb\n", "\u2028 u", "\x85", "\x07", "'\""),
    *("<<", "=", "%", "{{a}}", "w " * 300),
]


def test_written_data_are_read_back_unchanged_and_in_order():
    data = {
        "z": TEXTS,
        "a": {"small": 1e-6, "large": 1e22, "zero": -0.0, "whole": 3.0, "count": 10**20},
        "m": [None, True, [], {}],
    }
    text = dump_yaml(data)
    assert json.dumps(parse_yaml(text)) == json.dumps(data)
    assert text.isascii()


def test_numbers_in_run_yaml_are_numbers_to_readers_of_yaml_1_1():
    numbers = {"a": 1e-6, "b": 1e22, "c": 3.0, "d": 7, "e": 1.5e-7}
    assert yaml.safe_load(dump_yaml(numbers)) == numbers


WRITTEN = {
    "method": {"name": "dmd2", "preset": None},
    "1": 2e-6,
    1: [1, 1.0, True, "no", "- x", "a: b", "\u2028"],
    "text": "one\n\ntwo\n",
    "empty": {},
    "deep": [{"a": [[], {"b": -0.0}]}],
}


def test_a_written_file_is_read_as_any_other(tmp_path):
    """Key by key, from texts that earlier files had too; each caller has values of its own."""
    for number, content in enumerate([WRITTEN, {"1": 3}, {1: 3}, {}, [1], "x"]):
        path = tmp_path / f"{number}.yaml"
        path.write_text(dump_yaml(content))
        assert repr(load_written(path)) == repr(load_yaml(path)) == repr(content)
    one, other = (load_written(tmp_path / "0.yaml") for _ in range(2))
    one["deep"].clear()
    assert other == WRITTEN


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: 2\na: 3\n",
        "a: &x [1]\nb: *x\n",
        "a: {b: 1}\n# note\nc: 0x10\n",
        "a:\n  b: 1\n c: 2\n",
        "a: [1,\n2]\n",
        "a: |\n  x\n\nb: 1\n",
        "a: b: c\n",
        "---\na: 1\n...\n",
        "",
    ],
)
def test_an_edited_file_is_checked_as_any_other(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    results = []
    for load in (load_yaml, load_written):
        try:
            results.append(repr(load(path)))
        except ConfigError as error:
            results.append(str(error))
    assert results[0] == results[1]
