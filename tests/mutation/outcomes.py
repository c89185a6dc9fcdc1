"""Groups of modules that are mutated, and the files of outcomes in results/.

Needs no mutmut.
"""

import hashlib
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
JSON = ROOT / "results" / "mutants.json"
VALUES = ROOT / "results" / "mutants_of_values.json"
MARKDOWN = ROOT / "results" / "mutants.md"
MUTATION = Path(__file__).parent
REASONS = MUTATION / "reasons.toml"
GOAL = 0.95
Reasons = Mapping[str, Any]
HEAD = """# Mutants

Written by `make mutants`. A mutant is the code with one small mistake: another operator, number,
text or argument, a condition reversed, a statement left out. It is killed if a fast test of its
module (`tests/mutation/modules.toml`) fails. An equivalent mutant behaves as the code does, for the
reason given below (`tests/mutation/reasons.toml`). The goal is 95 % of the others, per module.
Two passes count together: of bodies of functions, and of values, which are constants and tables of
modules, class attributes, values of presets, defaults of fields and arguments, `detach` and
`no_grad`. Annotations, docstrings, titles, citations, and messages of errors and warnings are not
mutated, so the shares say nothing about them.

| module | mutants | killed | equivalent | survived | killed of non-equivalent |
|---|---:|---:|---:|---:|---:|
"""


@dataclass(frozen=True)
class Group:
    """Modules that the same tests concern.

    Attributes:
        modules: paths from the root, e.g. `distill_bench/noise.py`, `methods/dmd.py`.
        tests: files of tests, from the root.
        values: further files of tests, for the mutants of `values.py`.
    """

    name: str
    modules: tuple[str, ...]
    tests: tuple[str, ...]
    values: tuple[str, ...]


def read_groups() -> list[Group]:
    """Groups of modules.toml, in its order."""
    table = tomllib.loads((MUTATION / "modules.toml").read_text(encoding="utf-8"))
    return [
        Group(name, *(_files(entry.get(key, ())) for key in ("modules", "tests", "values")))
        for name, entry in table.items()
    ]


def _files(patterns: Sequence[str]) -> tuple[str, ...]:
    """The named files, and those that match a pattern with `*`."""
    paths = []
    for pattern in patterns:
        matching = sorted(ROOT.glob(pattern)) if "*" in pattern else [ROOT / pattern]
        paths += [p for p in matching if p.name not in ("__init__.py", "__main__.py")]
    return tuple(path.relative_to(ROOT).as_posix() for path in paths)


@dataclass(frozen=True)
class Outcome:
    """Result of one module.

    Attributes:
        digest: of the module and its tests at the time of the run.
        source: digest of the module alone.
        mutants: number of mutants.
        survivors: (function, change) of each mutant that no test killed; a change is the text
            before, ` -> `, and the text after.
    """

    digest: str
    source: str
    mutants: int
    survivors: tuple[tuple[str, str], ...]


def read_outcomes(values: bool = False) -> dict[str, Outcome]:
    """Module -> outcome, for bodies of functions or for values; empty without the file."""
    path = VALUES if values else JSON
    if not path.is_file():
        return {}
    return {
        module: Outcome(**fields | {"survivors": tuple(map(tuple, fields["survivors"]))})
        for module, fields in json.loads(path.read_text(encoding="utf-8")).items()
    }


def digest_of(module: str, tests: Iterable[str], operators: str) -> str:
    """Digest of a module, of its tests and of the operators: a new one asks for a new run."""
    return _digest(ROOT / module, *(ROOT / test for test in tests), MUTATION / operators)


def source_digest(module: str) -> str:
    """Digest of a module: with the same one, a mutant that a test killed stays killed."""
    return _digest(ROOT / module)


def _digest(*files: Path) -> str:
    """First digits of SHA-256."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def read_reasons() -> Reasons:
    """Kind (`equivalent` or `survivor`) -> module -> function -> change -> reason.

    `everywhere` lists reasons for all changes that match a regular expression, in any module.
    """
    return tomllib.loads(REASONS.read_text(encoding="utf-8"))


def write_outcomes(tested: Mapping[str, Outcome], groups: Sequence[Group], values: bool) -> None:
    """Add outcomes of bodies or of values to their file, and write the report.

    The file is read anew: another group may have been tested at the same time.
    """
    modules = [module for group in groups for module in group.modules]
    outcomes = read_outcomes(values) | tested
    ordered = {module: asdict(outcomes[module]) for module in modules if module in outcomes}
    text = json.dumps(ordered, indent=1, ensure_ascii=False) + "\n"
    (VALUES if values else JSON).write_text(text, encoding="utf-8")
    MARKDOWN.write_text(as_markdown(modules, read_reasons()), encoding="utf-8")


def as_markdown(modules: Sequence[str], reasons: Reasons) -> str:
    """The report: a table of the modules, then the survivors of each with their reasons."""
    passes = {"bodies": read_outcomes(), "values": read_outcomes(values=True)}
    lines, sections = [], []
    for module in modules:
        tested = [outcomes[module] for outcomes in passes.values() if module in outcomes]
        equivalent, survived = [], []
        for function, change in (one for outcome in tested for one in outcome.survivors):
            reason = _reason(reasons, "equivalent", module, function, change)
            if reason:
                equivalent.append((function, change, reason))
            else:
                reason = _reason(reasons, "survivor", module, function, change)
                survived.append((function, change, reason or "not explained yet"))
        mutants = sum(outcome.mutants for outcome in tested)
        rest = mutants - len(equivalent)
        killed = rest - len(survived)
        share = killed / rest if rest else 1.0
        notes = ["below the goal"] if share < GOAL else []
        notes += [f"{name} not run" for name, outcomes in passes.items() if module not in outcomes]
        last = f"{share:.1%}" + (f" ({', '.join(notes)})" if notes else "")
        counts = (mutants, killed, len(equivalent), len(survived))
        lines.append(f"| {module} | {' | '.join(map(str, counts))} | {last} |\n")
        if equivalent or survived:
            sections.append(f"\n## {module}\n")
            sections += _list("Survived", survived) + _list("Equivalent", equivalent)
    return HEAD + "".join(lines) + "".join(sections)


def _reason(reasons: Reasons, kind: str, module: str, function: str, change: str) -> str | None:
    reason = reasons.get(kind, {}).get(module, {}).get(function, {}).get(change)
    if reason is not None:
        return str(reason)
    rules = (rule for rule in reasons.get("everywhere", ()) if rule["kind"] == kind)
    return next((rule["reason"] for rule in rules if re.search(rule["change"], change)), None)


def _list(title: str, entries: Sequence[tuple[str, str, str]]) -> list[str]:
    if not entries:
        return []
    rows = [
        f"| `{function}` | `{_cell(change)}` | {_cell(reason)} |\n"
        for function, change, reason in dict.fromkeys(entries)
    ]
    return [f"\n{title}:\n\n| function | change | reason |\n|---|---|---|\n", *rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")


def changes_of(module: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """(function, change) of mutants of a packaged module, in the folder that mutmut works in."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.utils.format_utils import orig_function_and_class_names_from_key

    changes = []
    for name in names:
        function, class_name = orig_function_and_class_names_from_key(name)
        lines = get_diff_for_mutant(name, path=module).splitlines()
        sides = {
            sign: " ".join(
                line[1:].strip()
                for line in lines
                if line.startswith(sign) and not line.startswith(sign * 3)
            )
            for sign in "-+"
        }
        place = f"{class_name}.{function}" if class_name else function
        changes.append((place, f"{sides['-']} -> {sides['+']}"))
    return changes


if __name__ == "__main__":
    json.dump(changes_of(sys.argv[1], sys.argv[2:]), sys.stdout)
