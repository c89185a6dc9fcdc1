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
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from distill_bench.evaluator import Evaluator
    from distill_bench.method import Method

# kind -> package of the built-in files, entry-point group, base class (imported late: needs torch)
KINDS = {
    "method": ("distill_bench.methods", "distill_bench.methods", "distill_bench.method:Method"),
    "evaluator": (
        "distill_bench.eval",
        "distill_bench.evaluators",
        "distill_bench.evaluator:Evaluator",
    ),
}


_plugin_folder: Path | None = None  # of the run that was loaded last


class RegistryError(ValueError):
    """A plugin that is unknown or cannot be loaded; the message is one line."""


def methods() -> "dict[str, type[Method]]":
    """Every installed method by name."""
    return _all("method")


def evaluators() -> "dict[str, type[Evaluator]]":
    """Every installed evaluator by name."""
    return _all("evaluator")


def usual_evaluators() -> list[str]:
    """Names of the evaluators that score when none are named."""
    return [name for name, evaluator in evaluators().items() if not evaluator.only_if_named]


def plugin_names() -> set[str]:
    """Names of every installed method and evaluator, without importing them."""
    return {name for kind in KINDS for name in _names(kind)}


def search_plugins_in(folder: Path | None) -> None:
    """Look for plugin files with relative paths in this folder first; None: only in the current."""
    global _plugin_folder
    _plugin_folder = folder


def is_relative_file(name: str) -> bool:
    """True for `path/to/file.py:Class` with a relative path."""
    where = name.rpartition(":")[0]
    return where.endswith(".py") and not Path(where).is_absolute()


def _plugin_file(where: str) -> Path:
    """File of a plugin."""
    if _plugin_folder is not None and (_plugin_folder / where).is_file():
        return _plugin_folder / where
    return Path(where)


def find_method(name: str) -> "type[Method]":
    """The method class called `name`, or at `module:Class` or `path/to/file.py:Class`."""
    return _find("method", name)


def find_evaluator(name: str) -> "type[Evaluator]":
    """The evaluator class called `name`, or at `module:Class` or `path/to/file.py:Class`."""
    return _find("evaluator", name)


def find_plugin(name: str) -> tuple[str, Any]:
    """Kind and class of a plugin, `method` or `evaluator`, by name, module or file.

    Raises:
        RegistryError: if there is no such plugin; a name is compared with those of both kinds.
    """
    if ":" not in name:
        for kind in KINDS:
            if name in _names(kind):
                return kind, _find(kind, name)
        raise _unknown("method or evaluator", name, plugin_names())
    bases = {kind: _base(kind) for kind in KINDS}
    plugin = _from_path("plugin", name, tuple(bases.values()))
    for kind, base in bases.items():
        if inspect.isclass(plugin) and issubclass(plugin, base):
            return kind, plugin
    raise RegistryError(f"{name!r} is a subclass of neither Method nor Evaluator")


def method_file(name: str) -> Path | None:
    """Source file of a method, found without importing it; None if no file is found."""
    module = name.rpartition(":")[0]
    if module.endswith(".py"):
        return _plugin_file(module)
    if not module:
        points = {e.name: e.value.partition(":")[0] for e in entry_points(group=KINDS["method"][1])}
        module = _built_in("method").get(name) or points.get(name, name)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


@cache  # a sweep looks up a method and evaluators per cell
def _built_in(kind: str) -> dict[str, str]:
    package = importlib.import_module(KINDS[kind][0])
    return {m.name: f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__)}


def _all(kind: str) -> dict[str, type]:
    return {name: _find(kind, name) for name in _names(kind)}


def _names(kind: str) -> list[str]:
    """Names of the built-in plugins, then of the entry points, without importing them."""
    return [*sorted(_built_in(kind)), *sorted(e.name for e in entry_points(group=KINDS[kind][1]))]


def _base(kind: str) -> type:
    """The class of which every plugin of a kind is a subclass."""
    module_name, _, class_name = KINDS[kind][2].partition(":")
    return cast(type, getattr(importlib.import_module(module_name), class_name))


def _find(kind: str, name: str) -> type:
    base = _base(kind)
    built_in = _built_in(kind)
    if ":" in name:
        plugin = _from_path(kind, name, base)
    elif name in built_in:
        plugin = _from_folder(kind, built_in[name], base)
    else:
        points = {e.name: e for e in entry_points(group=KINDS[kind][1])}
        if name not in points:
            raise _unknown(kind, name, {*built_in, *points})
        plugin = _load(kind, points[name].value, points[name].load)
    if not (inspect.isclass(plugin) and issubclass(plugin, base)):
        raise RegistryError(
            f"{name!r} is not a subclass of {base.__module__}.{base.__name__}, "
            f"as every {kind} must be"
        )
    return plugin


def _unknown(kind: str, name: str, known: set[str]) -> RegistryError:
    """The error for a name that no plugin has."""
    file = name if name.endswith(".py") else f"{name}.py"
    if _plugin_file(file).is_file():
        return RegistryError(f"no {kind} called {name!r}; for the file write {file}:CLASS")
    near = difflib.get_close_matches(name, sorted(known), 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return RegistryError(f"no {kind} called {name!r}{hint}; known: {', '.join(sorted(known))}")


def _from_path(kind: str, name: str, base: type | tuple[type, ...]) -> Any:
    """The class of `module:Class` or `path/to/file.py:Class`."""
    where, _, class_name = name.rpartition(":")
    if not where.endswith(".py"):
        module = _load(kind, where, lambda: importlib.import_module(where))
    elif _plugin_file(where).is_file():
        module = _load(kind, where, lambda: load_file(_plugin_file(where)))
    else:
        relative = "" if Path(where).is_absolute() else f" in the current folder, {Path.cwd()}"
        raise RegistryError(f"no plugin file {where}{relative}")
    if not hasattr(module, class_name):
        classes = ", ".join(_classes(module, base)) or "none"
        raise RegistryError(f"no class {class_name!r} in {where}; it has: {classes}")
    return getattr(module, class_name)


@cache
def _from_folder(kind: str, module_name: str, base: type) -> type:
    """The only plugin class in a file of `methods/` or `eval/`."""
    module = _load(kind, module_name, lambda: importlib.import_module(module_name))
    classes = _classes(module, base)
    if len(classes) != 1:
        raise RegistryError(
            f"{module.__file__} must hold one {kind}, its only {base.__name__}; "
            f"found: {', '.join(classes) or 'none'}"
        )
    return next(iter(classes.values()))


def _classes(module: ModuleType, base: type | tuple[type, ...]) -> dict[str, type]:
    """Subclasses of `base` that a module defines itself."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value is not base
        and value.__module__ == module.__name__
    }


def _load(kind: str, where: str, load: Callable[[], Any]) -> Any:
    """Result of `load`; an error in the plugin's own code becomes one line that names it."""
    try:
        return load()
    except Exception as error:
        message = (str(error).strip() or "no message").splitlines()[0]
        raise RegistryError(
            f"cannot load the {kind} {where}: {type(error).__name__}: {message}"
        ) from error


@cache
def load_file(path: Path) -> ModuleType:
    """The module in a Python file outside any package; whatever the file raises passes through."""
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
