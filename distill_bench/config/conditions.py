"""Conditions on runs, for `exclude` and `--only`: "method == 'a' and 1 < nfe <= 4"."""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from distill_bench.config.errors import ConfigError, hint
from distill_bench.config.schema import RunConfig
from distill_bench.expressions import ExpressionError, evaluate_expression, names_in


def _unless_null(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """A comparison that is false if either side is null."""
    return lambda left, right: left is not None and right is not None and compare(left, right)


GRAMMAR = {
    ast.Constant: lambda value: value,
    ast.List: list,
    ast.And: all,
    ast.Or: any,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: _unless_null(operator.lt),
    ast.LtE: _unless_null(operator.le),
    ast.Gt: _unless_null(operator.gt),
    ast.GtE: _unless_null(operator.ge),
    ast.In: lambda element, values: element in values,
    ast.NotIn: lambda element, values: element not in values,
}
ALLOWED = "allowed: keys of a run, literals, comparisons, in, and, or, not"


def check_condition(text: str) -> None:
    """Check the syntax and the keys of a condition.

    Raises:
        ConfigError: for a syntax error, or a key that no run has (it would be null everywhere).
    """
    known = list(RunConfig.model_fields)
    try:
        unknown = [name for name in names_in(text) if name not in known]
    except ExpressionError as error:
        raise ConfigError(f"{error}; {ALLOWED}") from error
    if unknown:
        raise ConfigError(f"{text!r}: unknown key {unknown[0]!r}{hint(unknown[0], known)}")


def holds(text: str, data: Mapping[str, Any]) -> bool:
    """Evaluate a condition on the keys of a run.

    `method` is the method's name. A missing key is null.

    Raises:
        ConfigError: if the condition is malformed, or compares values of different types.
    """

    def value_of(name: str) -> Any:
        value: Any = data
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value.get("name") if name == "method" and isinstance(value, Mapping) else value

    try:
        return bool(evaluate_expression(text, GRAMMAR, value_of))
    except ExpressionError as error:
        raise ConfigError(f"{error}; {ALLOWED}") from error
    except TypeError as error:
        raise ConfigError(f"{text!r}: {error}") from error
