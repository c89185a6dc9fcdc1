"""TODO: config.conditions."""

import ast
import operator
from collections.abc import Mapping
from typing import Any

from distill_bench.config.errors import ConfigError, hint
from distill_bench.config.schema import RunConfig

_COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def check_condition(text: str) -> None:
    """ConfigError where an expression names a key that no run has: it would hold for none, and say nothing.

    What is wrong with its form is said when it is evaluated.
    """
    try:
        names = [
            node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)
        ]
    except SyntaxError as error:
        raise ConfigError(f"cannot evaluate {text!r}: {error.msg}") from error
    for name in names:
        if name not in RunConfig.model_fields:
            raise ConfigError(
                f"{text!r}: unknown key {name!r}{hint(name, list(RunConfig.model_fields))}"
            )


def evaluate_expression(text: str, data: Mapping[str, Any]) -> bool:
    """A condition over dotted keys, literals, comparisons, `and`, `or`, `not`; nothing else is run."""

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Expression():
                return value(node.body)
            case ast.Constant():
                return node.value
            case ast.List() | ast.Tuple():
                return [value(e) for e in node.elts]
            case ast.Name():
                found = data.get(node.id)
                return (
                    found.get("name") if node.id == "method" and isinstance(found, dict) else found
                )
            case ast.Attribute():
                found = (
                    data.get(node.value.id)
                    if isinstance(node.value, ast.Name)
                    else value(node.value)
                )
                return found.get(node.attr) if isinstance(found, dict) else None
            case ast.BoolOp():
                return (all if isinstance(node.op, ast.And) else any)(value(v) for v in node.values)
            case ast.UnaryOp(op=ast.Not()):
                return not value(node.operand)
            case ast.Compare():
                terms = [value(node.left), *(value(c) for c in node.comparators)]
                pairs = zip(node.ops, terms[:-1], terms[1:], strict=True)
                return all(_COMPARE[type(op)](a, b) for op, a, b in pairs)
        raise ConfigError(
            f"{text!r} may hold keys, literals, comparisons, and, or, not; not {type(node).__name__}"
        )

    try:
        return bool(value(ast.parse(text, mode="eval")))
    except (SyntaxError, TypeError) as error:
        raise ConfigError(f"cannot evaluate {text!r}: {error}") from error
