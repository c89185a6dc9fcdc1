"""Expressions in YAML files: the values of allowed syntax, and the refusal of all other."""

import ast
import operator

import pytest

from distill_bench.expressions import ExpressionError, evaluate_expression, names_in

GRAMMAR = {
    ast.Constant: lambda value: value,
    ast.List: list,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.And: all,
    ast.Or: any,
    ast.Not: operator.not_,
    ast.Lt: operator.lt,
    ast.Eq: operator.eq,
    ast.In: lambda left, right: left in right,
}
VALUES = {"n": 6, "run.lr": 0.5, "name": "dmd"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n - 2", 4),
        ("2 - n", -4),
        ("n / 4 - 1", 0.5),
        ("-n + run.lr", -5.5),
        ("1 < n < 7", True),
        ("7 < n < 9", False),
        ("1 < n < 3", False),
        ("name in ['dmd', 'sid']", True),
        ("name in ('sid',)", False),
        ("n == 6 and name == 'sid'", False),
        ("n == 7 or name == 'dmd'", True),
        ("not n == 7", True),
    ],
)
def test_an_expression_has_the_value_that_python_gives_it(text, value):
    assert evaluate_expression(text, GRAMMAR, VALUES.__getitem__) == value


def test_a_negative_number_is_a_constant_even_without_a_minus_in_the_grammar():
    grammar = {kind: value for kind, value in GRAMMAR.items() if kind is not ast.USub}
    for text, value in (("-2", -2), ("-0.5", -0.5), ("[-1, 2]", [-1, 2]), ("1 - -2", 3)):
        assert evaluate_expression(text, grammar, VALUES.__getitem__) == value
    with pytest.raises(ExpressionError, match="'-n' is not allowed"):
        evaluate_expression("1 - -n", grammar, VALUES.__getitem__)


def test_the_rest_of_a_decided_condition_is_not_evaluated():
    assert evaluate_expression("n == 6 or missing", GRAMMAR, VALUES.__getitem__) is True
    assert evaluate_expression("n == 7 and missing", GRAMMAR, VALUES.__getitem__) is False


@pytest.mark.parametrize(
    "text",
    [
        "n * 2",
        "n > 1",
        "f(n)",
        "n[0]",
        "1 if n else 2",
        "f(n).x",
        "{1}",
        "(lambda: 1)()",
        "+n",
        "+1",
    ],
)
def test_syntax_outside_the_grammar_is_refused(text):
    with pytest.raises(ExpressionError, match="is not allowed"):
        evaluate_expression(text, GRAMMAR, VALUES.__getitem__)


@pytest.mark.parametrize(
    ("text", "missing", "refused"),
    [
        ("n - 2", ast.Constant, "2"),
        ("name in [n, name]", ast.List, r"\[n, name\]"),
        ("n == 6 and n", ast.And, "n == 6 and n"),
        ("not n", ast.Not, "not n"),
        ("n - n", ast.Sub, "n - n"),
        ("n < n", ast.Lt, "n < n"),
    ],
)
def test_a_part_of_the_grammar_that_is_missing_is_named(text, missing, refused):
    grammar = {kind: value for kind, value in GRAMMAR.items() if kind is not missing}
    with pytest.raises(ExpressionError, match=f"'{text[:1]}.*: '{refused}' is not allowed"):
        evaluate_expression(text, grammar, VALUES.__getitem__)


@pytest.mark.parametrize("text", ["n +", "n\0", "x = 1", "(" * 500 + ")" * 500, "-" * 100_000])
def test_text_that_is_no_expression_is_refused_in_one_line(text):
    with pytest.raises(ExpressionError) as error:
        evaluate_expression(text, GRAMMAR, VALUES.__getitem__)
    assert "\n" not in str(error.value)


def test_names_are_given_by_their_first_part():
    assert set(names_in("run.lr.x + n < 2 or 'run2'")) == {"run", "n"}
