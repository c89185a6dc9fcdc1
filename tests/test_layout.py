"""Layout rules: short files, lines and folders; docstrings that start with verb or thing."""

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = ("distill_bench", "methods", "eval", "tests")
LINES = 399  # of a Python file
COLUMNS = {".py": 100, ".md": 120}
MODULES = 13  # of a folder, `__init__.py` and `__main__.py` not counted
NOUN_CLAUSE = re.compile(r"(what|whether|where|who|why|how)\b", re.IGNORECASE)


def texts() -> dict[str, str]:
    """Path from the root -> text, of the code and of the Markdown that is written by hand."""
    paths = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    paths += [ROOT / "results" / "LOG.md", *ROOT.glob("*.md"), *ROOT.glob("*/README.md")]
    paths += [*(ROOT / "results").glob("*/README.md"), *(ROOT / "distill_bench").rglob("README.md")]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(paths)}


TEXTS = texts()


def long_files(sources: Mapping[str, str]) -> list[str]:
    """Python files over the limit of lines."""
    counts = {path: len(text.splitlines()) for path, text in sources.items()}
    return [
        f"{path}: {count} lines"
        for path, count in counts.items()
        if path.endswith(".py") and count > LINES
    ]


def wide_lines(sources: Mapping[str, str]) -> list[str]:
    """Lines over the limit of columns. Table rows and images of Markdown cannot be broken."""
    return [
        f"{path}:{number}: {len(line)} columns"
        for path, text in sources.items()
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > COLUMNS[Path(path).suffix]
        if not (path.endswith(".md") and line.startswith(("|", "![")))
    ]


def full_folders(sources: Mapping[str, str]) -> list[str]:
    """Folders with too many modules."""
    counts = Counter(
        str(Path(path).parent)
        for path in sources
        if path.endswith(".py") and not path.endswith(("/__init__.py", "/__main__.py"))
    )
    return [f"{path}: {count} modules" for path, count in counts.items() if count > MODULES]


def noun_clauses(sources: Mapping[str, str]) -> list[str]:
    """Docstrings whose first word is What, Whether, Where, Who, Why or How."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = [
        (path, ast.get_docstring(node) or "")
        for path, text in sources.items()
        if path.endswith(".py")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented)
    ]
    return [
        f"{path}: {text.splitlines()[0]!r}" for path, text in docstrings if NOUN_CLAUSE.match(text)
    ]


def full_doors(sources: Mapping[str, str]) -> list[str]:
    """`__init__.py` files with more than a docstring and re-exports listed in `__all__`."""
    violations = []
    for path, text in sources.items():
        if not path.endswith("/__init__.py") or path == "distill_bench/__init__.py":
            continue
        docstring, *rest = ast.parse(text).body or [None]
        reexports = [node for node in rest if isinstance(node, ast.ImportFrom)]
        other = [node for node in rest if node not in reexports]
        allowed = [f"__all__ = {sorted(alias.name for node in reexports for alias in node.names)}"]
        if not (isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)):
            violations.append(f"{path} has no docstring")
        if [ast.unparse(node) for node in other] != (allowed if reexports else []):
            violations.append(f"{path} holds more than a docstring and re-exports")
    return violations


def package_folders() -> set[str]:
    """Names of the packages that the folders make, as a wheel installs them."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "distill_bench").rglob("*.py")}
    names = {".".join(folder.parts) for folder in folders}
    return names | {"distill_bench.methods", "distill_bench.eval"}


def test_files_are_short():
    assert long_files(TEXTS) == []


def test_lines_are_narrow():
    assert wide_lines(TEXTS) == []


def test_folders_hold_about_a_dozen_modules():
    assert full_folders(TEXTS) == []


def test_docstrings_start_with_the_verb_or_the_thing():
    assert noun_clauses(TEXTS) == []


def test_an_init_file_holds_a_docstring_and_reexports():
    assert full_doors(TEXTS) == []


def test_a_wheel_has_every_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(package_folders())


@pytest.mark.parametrize(
    ("check", "path", "text"),
    [
        (long_files, "eval/new.py", "x = 1\n" * (LINES + 1)),
        (wide_lines, "eval/new.py", f'"""{"w" * 100}"""'),
        (wide_lines, "eval/new.md", "w" * 121),
        (noun_clauses, "eval/new.py", '"""What a score is."""'),
        (noun_clauses, "eval/new.py", 'class A:\n    def f():\n        """Whether it is."""'),
        (full_doors, "eval/sub/__init__.py", '"""A door."""\nx = 1'),
        (full_doors, "eval/sub/__init__.py", '"""A door."""\nfrom eval.fvd import FVD'),
        (full_doors, "eval/sub/__init__.py", ""),
    ],
)
def test_a_planted_violation_is_found(check, path, text):
    assert len(check({path: text})) == 1


def test_a_planted_folder_of_too_many_modules_is_found():
    planted = {f"eval/sub/new{i}.py": "" for i in range(MODULES + 1)}
    assert full_folders(planted) == [f"eval/sub: {MODULES + 1} modules"]


@pytest.mark.parametrize(
    ("check", "path", "text"),
    [
        (long_files, "eval/new.py", "x = 1\n" * LINES),
        (wide_lines, "eval/new.py", f'"""{"w" * 94}"""'),
        (wide_lines, "eval/new.md", "|" + "w" * 200),
        (noun_clauses, "eval/new.py", '"""Whatever."""'),
        (
            full_doors,
            "eval/sub/__init__.py",
            '"""A door."""\nfrom eval.fvd import FVD\n__all__ = ["FVD"]',
        ),
    ],
)
def test_text_within_the_limits_passes(check, path, text):
    assert check({path: text}) == []


def public_definitions(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Name -> the files that define a function or class of that name for others, if several do."""
    files: dict[str, list[str]] = {}
    for path, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                files.setdefault(node.name, []).append(path)
    return {name: paths for name, paths in files.items() if len(paths) > 1}


def test_a_public_name_has_one_meaning():
    """`main` is every command's; `checkpoint.load` is called by its module's name."""
    sources = {p: s for p, s in TEXTS.items() if p.startswith("distill_bench") and p[-3:] == ".py"}
    assert set(public_definitions(sources)) - {"main", "load"} == set()
    planted = {"a.py": "def render(): ...", "b.py": "class render: ...", "c.py": "def _f(): ..."}
    assert public_definitions(planted) == {"render": ["a.py", "b.py"]}
