"""Conditions of `exclude` and `--only`."""

import pytest

from distill_bench.config.conditions import check_condition, holds
from distill_bench.config.errors import ConfigError

RUN = {"method": {"name": "a", "weight": 2}, "nfe": 4, "ema": None, "protocol": {"clips": 8}}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("method == 'a' and 1 < nfe <= 4 and not method.weight in [1, 3]", True),
        ("nfe != 4 or missing == 1", False),
        ("method.missing == 1 or protocol.clips >= 8", True),
        ("nfe in (2, 4)", True),
        ("method not in ['a', 'b']", False),
        ("-nfe < 0", None),
    ],
)
def test_a_condition_compares_keys_and_literals(condition, expected):
    if expected is None:
        with pytest.raises(ConfigError, match="'-nfe' is not allowed"):
            holds(condition, RUN)
    else:
        assert holds(condition, RUN) is expected


@pytest.mark.parametrize("comparison", ["<", "<=", ">", ">="])
def test_null_is_neither_above_nor_below_a_number(comparison):
    assert not holds(f"ema {comparison} 0.1", RUN)
    assert not holds(f"0.1 {comparison} ema", RUN)
    assert not holds(f"missing {comparison} 0.1", RUN)


@pytest.mark.parametrize("condition", [
    "ema > 0.1", "not ema == null", "ema in [0.1, 0.2]", "1 in ema", "ema in 'abc'",
    "1 in missing.key", "0 < ema < 1", "missing.key >= 1", "ema == false", "null in [0, false]",
])  # fmt: skip
def test_null_does_not_match(condition):
    assert not holds(condition, RUN)
    check_condition(condition.replace("missing.key", "protocol.key"))


def test_yaml_words_and_numbers_mean_what_they_mean_in_yaml():
    data = RUN | {"compile": True, "trackers": ["a"]}
    assert holds("compile == true and compile == True and ema == null and nfe == 4.0", data)
    assert holds("nfe in [4.0, 8] and 'a' in trackers and 'b' not in trackers", data)
    assert not holds("compile == 1 or nfe == '4' or compile in [1, 'true']", data)


def test_null_equals_only_null():
    assert holds("ema == None", RUN)
    assert not holds("ema == 0", RUN)
    assert holds("ema != 0", RUN)


@pytest.mark.parametrize(
    "condition",
    [
        "__import__('os')",
        "nfe + 1 > 4",
        "[x for x in nfe]",
        "nfe if nfe else 1",
        "f'{nfe}' == '4'",
        "method.name.upper() == 'A'",
        "(lambda: 1)() == 1",
        "method['name'] == 'a'",
    ],
)
def test_other_syntax_is_not_evaluated(condition):
    with pytest.raises(ConfigError, match=r"is not allowed; allowed: keys") as error:
        holds(condition, RUN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("nfe ==", "'nfe ==': invalid syntax"),
        ("nfe > 'a'", "\"nfe > 'a'\": '>' not supported between"),
        ("nfe in 3", "is not iterable"),
    ],
)
def test_a_malformed_condition_is_refused_in_one_line(condition, says):
    with pytest.raises(ConfigError) as error:
        holds(condition, RUN)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_key_is_refused_with_a_suggestion():
    check_condition("method == 'a' and protocol.clips > 2")
    with pytest.raises(ConfigError, match=r"unknown key 'nfee' \(did you mean 'nfe'\?\)"):
        check_condition("nfee == 4")
    with pytest.raises(ConfigError, match="invalid syntax"):
        check_condition("nfe = 4")


def test_negative_numbers_compare():
    assert holds("nfe > -1 and not ema > -1 and nfe not in [-4, -0.5]", {"nfe": 4, "ema": None})
    assert not holds("ema < -1 or nfe < -1", {"nfe": 4, "ema": None})
