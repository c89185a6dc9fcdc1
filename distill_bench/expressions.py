"""Evaluates expressions in YAML files, in a small and safe subset of Python's syntax."""

import ast
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Grammar = Mapping[type[ast.AST], Callable[..., Any]]  # operators, and ast.Constant and ast.List


class ExpressionError(ValueError):
    """An expression with invalid or forbidden syntax; the message is one line."""


def evaluate_expression(text: str, grammar: Grammar, value_of: Callable[[str], Any]) -> Any:
    """Value of an expression.

    Args:
        grammar: function of each syntax node that is allowed. Binary operators and comparisons take
            two values, unary operators one, `ast.And` and `ast.Or` an iterator (so that they can
            stop early), `ast.List` a list, and `ast.Constant` the constant.
        value_of: value of a name; dotted names are passed whole, as in "protocol.clips".

    Raises:
        ExpressionError: if the text is not an expression, or uses syntax outside the grammar.
    """

    def refused(node: ast.AST) -> ExpressionError:
        return ExpressionError(f"{text!r}: {ast.unparse(node)!r} is not allowed")

    def function(kind: type[ast.AST], node: ast.AST) -> Callable[..., Any]:
        if kind not in grammar:
            raise refused(node)
        return grammar[kind]

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Expression():
                return value(node.body)
            case ast.Constant():
                return function(ast.Constant, node)(node.value)
            case ast.List() | ast.Tuple():
                return function(ast.List, node)([value(element) for element in node.elts])
            case ast.BoolOp():
                return function(type(node.op), node)(value(operand) for operand in node.values)
            case ast.UnaryOp():
                return function(type(node.op), node)(value(node.operand))
            case ast.BinOp():
                return function(type(node.op), node)(value(node.left), value(node.right))
            case ast.Compare():
                terms = [value(node.left), *map(value, node.comparators)]
                comparisons = zip(node.ops, terms[:-1], terms[1:], strict=True)
                return all(function(type(op), node)(left, right) for op, left, right in comparisons)
        if (name := _dotted_name(node)) is not None:
            return value_of(name)
        raise refused(node)

    try:
        return value(_parse(text))
    except (RecursionError, MemoryError) as error:
        raise ExpressionError(f"{text!r}: nested too deeply") from error


def names_in(text: str) -> Iterator[str]:
    """First part of each name in an expression: "protocol" for "protocol.clips".

    Raises:
        ExpressionError: if the text is not an expression.
    """
    return (node.id for node in ast.walk(_parse(text)) if isinstance(node, ast.Name))


def _parse(text: str) -> ast.Expression:
    try:
        tree = ast.parse(text, mode="eval")
        tree.body = _Negatives().visit(tree.body)
        return tree
    except SyntaxError as error:
        raise ExpressionError(f"{text!r}: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:  # ValueError: a null byte
        raise ExpressionError(f"{text!r}: {error or 'nested too deeply'}") from error


class _Negatives(ast.NodeTransformer):
    """Makes `-1` a constant, which Python parses as an operator and a constant."""

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        match node:
            case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as number)):
                return ast.Constant(-number)
        return self.generic_visit(node)


def _dotted_name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (parent := _dotted_name(node.value)) is not None:
        return f"{parent}.{node.attr}"
    return None
