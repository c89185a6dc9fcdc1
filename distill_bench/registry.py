"""Finds methods and evaluators: the file name is the registry.

A plugin is a file in `methods/` or `eval/`, an entry point of the group `distill_bench.methods` or
`distill_bench.evaluators`, `module:Class`, or `path/to/file.py:Class`.
"""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_bench.evaluator import Evaluator
    from distill_bench.method import Method

KINDS = {  # kind -> (package of the built-in files, entry-point group, base class: imported late, torch takes seconds)
    "method": ("distill_bench.methods", "distill_bench.methods", "distill_bench.method:Method"),
    "evaluator": (
        "distill_bench.eval",
        "distill_bench.evaluators",
        "distill_bench.evaluator:Evaluator",
    ),
}


class RegistryError(ValueError):
    """No such plugin; the message is one line and names the known ones."""


def methods() -> "dict[str, type[Method]]":
    """Every installed method by name."""
    return _all("method")


def evaluators() -> "dict[str, type[Evaluator]]":
    """Every installed evaluator by name."""
    return _all("evaluator")


def find_method(name: str) -> "type[Method]":
    """The method class called `name`, or at `module:Class` or `path/to/file.py:Class`."""
    return _find("method", name)


def find_evaluator(name: str) -> "type[Evaluator]":
    """The evaluator class called `name`, or at `module:Class` or `path/to/file.py:Class`."""
    return _find("evaluator", name)


def method_file(name: str) -> Path | None:
    """The file of a method, without importing it; None where it cannot be found."""
    where = name.rpartition(":")[0]
    if where.endswith(".py"):
        return Path(where)
    entry = next(
        (
            e.value.partition(":")[0]
            for e in entry_points(group=KINDS["method"][1])
            if e.name == name
        ),
        name,
    )
    try:
        spec = importlib.util.find_spec(where or _built_in("method").get(name, entry))
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _built_in(kind: str) -> dict[str, str]:
    package = importlib.import_module(KINDS[kind][0])
    return {m.name: f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__)}


def _all(kind: str) -> dict[str, type]:
    names = [*sorted(_built_in(kind)), *sorted(e.name for e in entry_points(group=KINDS[kind][1]))]
    return {name: _find(kind, name) for name in names}


def _find(kind: str, name: str) -> type:
    where, _, class_name = KINDS[kind][2].partition(":")
    base = getattr(importlib.import_module(where), class_name)
    built_in = _built_in(kind)
    if ":" in name:
        where, _, class_name = name.rpartition(":")
        if where.endswith(".py") and not Path(where).is_file():
            raise RegistryError(f"no plugin file {where}")
        module = _loaded(
            kind,
            where,
            lambda: (
                _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
            ),
        )
        found = getattr(module, class_name, None)
        if found is None:
            raise RegistryError(
                f"no class {class_name!r} in {where}; it has: {', '.join(_classes(module, base)) or 'none'}"
            )
    elif name in built_in:
        module = _loaded(kind, built_in[name], lambda: importlib.import_module(built_in[name]))
        classes = _classes(module, base)
        if len(classes) != 1:
            raise RegistryError(
                f"{module.__file__} must hold one {kind}, its only {base.__name__}; found: {', '.join(classes) or 'none'}"
            )
        (found,) = classes.values()
    else:
        points = {e.name: e for e in entry_points(group=KINDS[kind][1])}
        if name not in points:
            known = sorted({*built_in, *points})
            near = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise RegistryError(f"no {kind} called {name!r}{hint}; known: {', '.join(known)}")
        found = _loaded(kind, points[name].value, points[name].load)
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise RegistryError(
            f"{name!r} is no {kind}: it must be a subclass of {base.__module__}.{base.__name__}"
        )
    return found


def _classes(module: ModuleType, base: type) -> dict[str, type]:
    return {
        n: c
        for n, c in vars(module).items()
        if inspect.isclass(c)
        and issubclass(c, base)
        and c is not base
        and c.__module__ == module.__name__
    }


def _loaded(kind: str, where: str, load: Callable[[], Any]) -> Any:
    """What `load` gives; whatever goes wrong in a plugin's own code is one line that names it."""
    try:
        return load()
    except Exception as error:
        said = (str(error).strip() or "no message").splitlines()[0]
        raise RegistryError(
            f"cannot load the {kind} {where}: {type(error).__name__}: {said}"
        ) from error


@cache
def _load_file(path: Path) -> ModuleType:
    name = f"distill_bench_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None  # the path ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
