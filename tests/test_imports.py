"""Import rules, read from the source: layers, no circles, plugins apart from the harness.

Imports inside functions and under `TYPE_CHECKING` count like any other.
"""

import ast
import functools
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From low to high. Files import from the lines above their own; within a line, only from their own
# group. Groups are separated by "|".
LAYERS = """
store | noise draws fields method evaluator registry rollout discriminator expressions
teachers schedulers autoencoder
domain
config
networks
train
sample
evaluate | plan | export
methods | eval
report
sweep | pretrain | testing
cli
"""


def python_sources(*folders: str) -> dict[str, str]:
    """Path from the root -> source, of every Python file in the folders."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


SOURCES = python_sources("distill_bench", "methods", "eval")
syntax_tree = functools.cache(ast.parse)


def module_name(path: str) -> str:
    """`distill_bench/train/loop.py` -> `distill_bench.train.loop`."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.startswith("distill_bench") else f"distill_bench.{name}"


@functools.cache
def imported_names(source: str) -> frozenset[str]:
    """Full names of everything that a file imports at any depth."""
    names = []
    for node in ast.walk(syntax_tree(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [f"{module}.{alias.name}" for alias in node.names]
    return frozenset(names)


@functools.cache
def string_constants(source: str) -> tuple[tuple[int, str], ...]:
    """Line number and value of every string in a file."""
    return tuple(
        (node.lineno, node.value)
        for node in ast.walk(syntax_tree(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> the modules among `sources` that it imports."""
    modules = {module_name(path) for path in sources}
    graph = {}
    for path, source in sources.items():
        names = imported_names(source)
        parents = {name.rpartition(".")[0] for name in names - modules}
        graph[module_name(path)] = ((names | parents) & modules) - {module_name(path)}
    return graph


def layers(table: str = LAYERS) -> dict[str, tuple[int, int]]:
    """Package, or file at the root of `distill_bench` -> its layer and its group in that layer."""
    return {
        name: (layer, group)
        for layer, line in enumerate(table.strip().splitlines())
        for group, names in enumerate(line.split("|"))
        for name in names.split()
    }


def layer_violations(sources: Mapping[str, str]) -> list[str]:
    """Imports of `distill_bench` that go up, or sideways into another group of the same layer.

    `__main__.py` is exempt: it is run, not imported, and may put later stages together.
    """
    places = layers()
    violations = []
    for importer, targets in import_graph(sources).items():
        if importer == "distill_bench" or importer.endswith(".__main__"):
            continue
        importer_layer, importer_group = places[importer.split(".")[1]]
        for target in sorted(targets - {"distill_bench"}):
            layer, group = places[target.split(".")[1]]
            if layer > importer_layer or (layer == importer_layer and group != importer_group):
                violations.append(f"{importer} imports {target}, which is not in a lower layer")
    return violations


def import_circles(sources: Mapping[str, str]) -> list[list[str]]:
    """Groups of files that import each other (strongly connected components, Tarjan 1972)."""
    graph = import_graph(sources)
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    circles = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for target in sorted(graph[module]):
            if target not in index:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], index[target])
        if lowest[module] == index[module]:
            position = stack.index(module)
            component = stack[position:]
            del stack[position:]
            if len(component) > 1:
                circles.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return circles


def plugin_violations(sources: Mapping[str, str]) -> list[str]:
    """Imports of a plugin, and plugin names in the harness.

    A plugin is a file of `methods/` or `eval/`. Plugins import only the harness, neither each
    other nor a file beside them. The harness finds plugins by name and knows none.
    """
    plugins = {Path(path).stem for path in sources if path.startswith(("methods/", "eval/"))}
    plugins -= {"__init__"}
    violations = []
    for path, source in sources.items():
        for name in sorted(imported_names(source)):
            if name.startswith("."):
                violations.append(f"{path} imports {name}: write the full name")
            if name.split(".")[0] in {"methods", "eval"}:
                violations.append(f"{path} imports {name}: its package is distill_bench.{name}")
            if name.startswith(("distill_bench.methods.", "distill_bench.eval.")):
                violations.append(f"{path} imports the plugin {name}")
        if path.startswith("distill_bench/"):
            violations += [
                f"{path}:{line} names the plugin {value!r}"
                for line, value in string_constants(source)
                if value in plugins
            ]
    return violations


def imports_without_reason(sources: Mapping[str, str]) -> list[str]:
    """Imports inside functions that no comment explains.

    The comment stands in the statement or on the line above it; one comment serves a block of
    imports.
    """
    violations = []
    for path, source in sources.items():
        lines = source.splitlines()
        functions = [
            node
            for node in ast.walk(syntax_tree(source))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        imports = {
            node.lineno: node
            for function in functions
            for node in ast.walk(function)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        explained_until = 0  # the line at which the last explained import ends
        for first, node in sorted(imports.items()):
            own_lines = lines[first - 1 : node.end_lineno]
            above = lines[first - 2].strip()
            comment = any("#" in line for line in own_lines) or above.startswith("#")
            if comment or first == explained_until + 1:
                explained_until = node.end_lineno
            else:
                violations.append(f"{path}:{first} imports inside a function without a reason")
    return violations


def test_files_import_from_lower_layers_only():
    assert layer_violations(SOURCES) == []


def test_every_package_has_a_layer():
    modules = {module_name(path) for path in SOURCES} - {"distill_bench"}
    assert {module.split(".")[1] for module in modules} == set(layers())


def test_no_files_import_each_other_in_a_circle():
    assert import_circles(SOURCES) == []


def test_plugins_and_the_harness_do_not_know_each_other():
    assert plugin_violations(SOURCES) == []


def test_imports_inside_functions_state_their_reason():
    assert imports_without_reason(SOURCES) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("distill_bench/train/new.py", "from distill_bench.report.page import report"),
        ("distill_bench/train/new.py", "from distill_bench.report import page"),
        ("distill_bench/train/new.py", "import distill_bench.report.page"),
        ("distill_bench/train/new.py", "def f():\n    from distill_bench.report import page"),
        (
            "distill_bench/train/new.py",
            "if TYPE_CHECKING:\n    from distill_bench.report import page",
        ),
        ("distill_bench/noise.py", "from distill_bench.store import claims"),
        ("distill_bench/plan/new.py", "from distill_bench.evaluate import score"),
    ],
)
def test_a_planted_import_of_a_higher_layer_is_found(path, source):
    (violation,) = set(layer_violations(SOURCES | {path: source})) - set(layer_violations(SOURCES))
    assert violation.startswith(module_name(path))


@pytest.mark.parametrize("length", [2, 3])
def test_a_planted_circle_is_found(length):
    planted = {
        f"distill_bench/train/new{i}.py": (
            f"def f():\n    from distill_bench.train.new{(i + 1) % length} import g"
        )
        for i in range(length)
    }
    names = [f"distill_bench.train.new{i}" for i in range(length)]
    assert names in import_circles(SOURCES | planted)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("distill_bench/train/new.py", "from distill_bench.methods.dmd2 import DMD2"),
        ("distill_bench/train/new.py", "if name == 'sgmd': pass"),
        ("distill_bench/train/new.py", "from . import loop"),
        ("methods/new.py", "from methods.dmd2 import DMD2"),
        ("methods/new.py", "from distill_bench.methods.dmd2 import DMD2"),
        ("eval/new.py", "import distill_bench.eval.fvd"),
    ],
)
def test_a_planted_import_of_a_plugin_is_found(path, source):
    planted = set(plugin_violations(SOURCES | {path: source})) - set(plugin_violations(SOURCES))
    assert len(planted) == 1


def test_a_planted_import_without_reason_is_found():
    explained = (
        "def f():\n    import av  # optional\n    import PIL\n\n    # slow\n    import cv2\n"
    )
    bare = "def f():\n    import av\n"
    planted = {"eval/explained.py": explained, "eval/bare.py": bare}
    assert imports_without_reason(planted) == [
        "eval/bare.py:2 imports inside a function without a reason"
    ]


def private_uses(source: str) -> list[str]:
    """Private names of this package that a file imports, or reads from a module that it imports."""
    names = [name for name in imported_names(source) if name.startswith("distill_bench.")]
    imported = [name for name in names if is_private(name.rpartition(".")[2])]
    modules = {name.rpartition(".")[2] for name in names if name.islower()}
    return imported + [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(syntax_tree(source))
        if isinstance(node, ast.Attribute) and is_private(node.attr)
        if isinstance(node.value, ast.Name) and node.value.id in modules
    ]


def is_private(name: str) -> bool:
    """True for a name with one leading underscore."""
    return name.startswith("_") and not name.startswith("__")


def test_private_names_stay_in_their_file():
    """The rule covers the tests, too."""
    sources = SOURCES | python_sources("tests")
    assert {path: uses for path, source in sources.items() if (uses := private_uses(source))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from distill_bench.store.claims import _beat",
        "from distill_bench.store import claims\nclaims._beat()",
    ],
)
def test_a_private_name_used_elsewhere_is_reported(source):
    assert len(private_uses(source)) == 1
