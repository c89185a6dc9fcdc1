"""Mutants that mutmut lacks: constants, tables, defaults, and gradients that are switched off.

mutmut mutates bodies of functions. Here a mutant is the text of a module with one other value.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CODE = ("distill_bench", "methods", "eval")
PROSE = ("Citation", "TypeVar", "logging.getLogger")  # calls whose arguments change no result
SKIPPED = ("__all__", "title")
Choices = Mapping[str, list[tuple[str, ...]]]


class Mutant(NamedTuple):
    """A module with one other value; `place` and `change` as the report shows them."""

    place: str
    change: str
    source: str


def read_choices(module: str) -> Choices:
    """Name of a field or argument -> the texts that its `Literal` allows, those of `module` first.

    The keys of a preset are fields of the method, or of the run's config.
    """
    paths = [ROOT / module, *(p for folder in CODE for p in (ROOT / folder).rglob("*.py"))]
    nodes = [node for path in paths for node in _nodes(path)]
    aliases = {
        node.targets[0].id: _literal(node.value)
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    choices: dict[str, list[tuple[str, ...]]] = {}
    for node in nodes:
        if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation:
            name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            names = [n.id for n in ast.walk(node.annotation) if isinstance(n, ast.Name)]
            texts = [_literal(node.annotation), *(aliases.get(name, ()) for name in names)]
            choices.setdefault(name, []).extend(filter(None, texts))
    return choices


@cache
def _nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text("utf-8"))))


def _literal(node: ast.AST) -> tuple[str, ...]:
    """Texts of the first `Literal["a", "b"]` in an annotation; empty without one."""
    for part in ast.walk(node):
        if isinstance(part, ast.Subscript) and ast.unparse(part.value) == "Literal":
            values = [getattr(n, "value", None) for n in ast.walk(part.slice)]
            return tuple(value for value in values if isinstance(value, str))
    return ()


class _Edits(ast.NodeVisitor):
    """Collects (place, first node or position, last position, new text)."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.scope: list[str] = []
        self.functions = 0  # that the current node lies in
        self.edits: list[tuple[str, tuple[int, int], tuple[int, int], str]] = []

    def _add(self, name: str, first: tuple[int, int], last: tuple[int, int], text: str) -> None:
        self.edits.append((".".join([*self.scope, *([name] if name else [])]), first, last, text))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.scope.append(node.name)
        arguments = node.args
        positional = [*arguments.posonlyargs, *arguments.args]
        pairs = [*zip(reversed(positional), reversed(arguments.defaults), strict=False)]
        pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        for argument, default in pairs:
            if default is not None:
                self._values("", default, argument.arg)
        self.functions += 1
        self.generic_visit(node)
        self.functions -= 1
        self.scope.pop()

    def visit_Assign(self, node: ast.Assign | ast.AnnAssign) -> None:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        name = ast.unparse(target)
        if not self.functions and name not in SKIPPED and node.value is not None:
            self._values(name, node.value, name)
        self.generic_visit(node)

    visit_AnnAssign = visit_Assign

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr == "detach":
            line, column = _end(function)
            self._add("", (line, column - len(".detach")), _end(node), "")
        elif ast.unparse(function) in ("torch.no_grad", "torch.inference_mode"):
            self._add("", _start(node), _end(node), "torch.enable_grad()")
        self.generic_visit(node)

    def _values(self, place: str, node: ast.AST, name: str) -> None:
        """Other numbers, booleans and texts in a value; `name` is of the field or argument."""
        if isinstance(node, ast.Constant):
            text = self._other(node.value, name)
            if text is not None:
                self._add(place, _start(node), _end(node), text)
        elif _calls(node, "Preset"):  # the first argument is its source
            for part in ast.walk(node):
                if isinstance(part, ast.Dict):  # a wrong key is refused
                    for key, value in zip(part.keys, part.values, strict=True):
                        self._values(place, value, key.value.rpartition(".")[2])
        elif isinstance(node, ast.Dict) and any(_calls(value, "Preset") for value in node.values):
            for value in node.values:
                self._values(place, value, "")
        elif not (isinstance(node, ast.JoinedStr) or _calls(node, *PROSE) or _literal(node)):
            for part in ast.iter_child_nodes(node):
                self._values(place, part, name)

    def _other(self, value: object, name: str) -> str | None:
        """Text of another value of this type; None for prose and signs."""
        if isinstance(value, bool):
            return str(not value)
        if isinstance(value, int):
            return str(value + 1)
        if isinstance(value, float):
            return repr(2 * value or 1.0)
        if not isinstance(value, str):
            return None
        for texts in self.choices.get(name, ()):
            if value in texts and len(texts) > 1:
                return repr(texts[(texts.index(value) + 1) % len(texts)])
        is_prose = bool(set(value) & set(" \n")) or not any(map(str.isalnum, value))
        return None if is_prose else repr(f"XX{value}XX")


def _calls(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in names


def _start(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


def mutants_of(source: str, choices: Choices) -> Iterator[Mutant]:
    """Every mutant of a module."""
    edits = _Edits(choices)
    edits.visit(ast.parse(source))
    lines = source.encode().splitlines(keepends=True)
    for place, (first, begin), (last, end), text in edits.edits:
        before = b"".join(lines[first - 1 : last])
        tail = lines[last - 1][end:]
        after = lines[first - 1][:begin] + text.encode() + tail
        mutated = b"".join([*lines[: first - 1], after, *lines[last:]]).decode()
        shown = (re.sub("  #.*", "", side.decode()).split() for side in (before, after))
        yield Mutant(place or "module", " -> ".join(map(" ".join, shown)), mutated)
