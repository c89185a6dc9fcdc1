"""Conditions on runs, for `exclude` and `--only`: "method == 'a' and 1 < nfe <= 4"."""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from distill_bench.config.errors import ConfigError, hint
from distill_bench.config.overrides import matches, value_at
from distill_bench.config.schema import RunConfig
from distill_bench.expressions import ExpressionError, evaluate_expression, names_in


def _unless_null(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """A comparison that is false if either side is null."""
    return lambda left, right: left is not None and right is not None and compare(left, right)


def _contains(element: Any, values: Any) -> bool:
    """`element in values`; nothing is in null, and null is in no text."""
    if values is None or (element is None and isinstance(values, str)):
        return False
    if isinstance(values, str):
        return element in values
    return any(matches(element, value) for value in values)


GRAMMAR = {
    ast.Constant: lambda value: value,
    ast.List: list,
    ast.And: all,
    ast.Or: any,
    ast.Not: operator.not_,
    ast.Eq: matches,
    ast.NotEq: lambda left, right: not matches(left, right),
    ast.Lt: _unless_null(operator.lt),
    ast.LtE: _unless_null(operator.le),
    ast.Gt: _unless_null(operator.gt),
    ast.GtE: _unless_null(operator.ge),
    ast.In: _contains,
    ast.NotIn: lambda element, values: not _contains(element, values),
}
LITERALS = {"null": None, "true": True, "false": False}  # YAML's spelling; Python's is a constant
ALLOWED = "allowed: keys of a run, literals, comparisons, in, and, or, not"


def check_condition(text: str) -> None:
    """Check the syntax and the keys of a condition.

    Raises:
        ConfigError: for a syntax error, or a key that no run has (it would be null everywhere).
    """
    known = list(RunConfig.model_fields)
    try:
        unknown = [name for name in names_in(text) if name not in [*known, *LITERALS]]
    except ExpressionError as error:
        raise ConfigError(f"{error}; {ALLOWED}") from error
    if unknown:
        raise ConfigError(f"{text!r}: unknown key {unknown[0]!r}{hint(unknown[0], known)}")


def holds(text: str, data: Mapping[str, Any]) -> bool:
    """Evaluate a condition on the keys of a run.

    `method` is the method's name. A missing key is null. Null equals only null; `<`, `<=`, `>`,
    `>=` and `in` with null are false.

    Raises:
        ConfigError: if the condition is malformed, or compares values of different types.
    """

    def value_of(name: str) -> Any:
        return LITERALS[name] if name in LITERALS else value_at(data, name)

    try:
        return bool(evaluate_expression(text, GRAMMAR, value_of))
    except ExpressionError as error:
        raise ConfigError(f"{error}; {ALLOWED}") from error
    except TypeError as error:
        raise ConfigError(f"{text!r}: {error}") from error
