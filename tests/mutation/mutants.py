"""Mutation testing: plant small mistakes in the code and list those that no test catches.

    make mutants                      # every module whose code or tests changed
    make mutants ONLY="statistics"    # one group of modules.toml, or one module

Mutates bodies of functions (mutmut, `engine.py`), then values (`values.py`, `planted.py`). Writes
results/mutants*.json and results/mutants.md. A run that was stopped goes on where it was.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine import plain_source
from former import FORMER
from outcomes import (
    Group,
    Outcome,
    digest_of,
    read_groups,
    read_outcomes,
    source_digest,
    write_outcomes,
)
from planted import state_file, value_digest, value_outcome

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "mutants"
READ = ("eval", "methods", "results", "sweeps")  # folders of the checkout whose files tests read
MEMORY = Path("/dev/shm")  # a pass writes 100,000 small files: a disk needs minutes to remove them
SURVIVED = (0, 33)  # exit codes of mutmut: every test passed, no test reaches the function
SETTINGS = """
[tool.mutmut]
source_paths = ["distill_bench"]
only_mutate = {modules}
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-p", "no:cacheprovider", "-m", "not slow"]
do_not_mutate_patterns = ['^\\s*raise\\b', '^\\s*assert\\b', '^\\s*warnings\\.warn\\b']
process_isolation = "forkserver"
timeout_constant = 1.0
timeout_multiplier = 4.0
use_git_change_detection = false
"""


def packaged(module: str) -> str:
    """Path of a module in an installed package, where methods/ and eval/ lie inside."""
    return module if module.startswith("distill_bench/") else f"distill_bench/{module}"


def body_digest(module: str, group: Group) -> str:
    """Digest of a module for mutants of bodies of functions."""
    return digest_of(module, group.tests, "engine.py")


def prepare(group: Group, modules: Sequence[str]) -> Path:
    """Write the tree that mutmut works in: the installed package and the tests.

    Files whose text is unchanged stay untouched: mutmut goes by their time.
    """
    tree = FOLDER / group.name
    (tree / "mutants").mkdir(parents=True, exist_ok=True)
    for name in READ:
        link = tree / "mutants" / name
        if link.resolve() != ROOT / name:  # a tree that was made in another checkout
            link.unlink(missing_ok=True)
            link.symlink_to(ROOT / name)
    sources = [*(ROOT / "distill_bench").rglob("*"), *(ROOT / "methods").rglob("*")]
    sources += [*(ROOT / "eval").rglob("*"), *(ROOT / "tests").rglob("*")]
    wanted = {tree / "pyproject.toml", tree / "README.md"}
    for source in sources:
        if source.is_dir() or "__pycache__" in source.parts:
            continue
        path = source.relative_to(ROOT).as_posix()
        inside = path if path.startswith("tests/") else packaged(path)
        wanted.add(tree / inside)
        if path in group.modules:
            _update(tree / inside, plain_source(source.read_text(encoding="utf-8")).encode())
        else:
            _update(tree / inside, source.read_bytes())
    for folder in ("distill_bench", "tests"):
        for path in (tree / folder).rglob("*"):
            if path.is_file() and path not in wanted and "__pycache__" not in path.parts:
                path.unlink()
                (tree / "mutants" / path.relative_to(tree)).unlink(missing_ok=True)
    for module in map(packaged, modules):
        mutated = tree / "mutants" / module
        if mutated.is_file() and mutated.read_bytes() == (tree / module).read_bytes():
            # a run of other modules left a copy; mutmut would take it for the mutated module
            mutated.unlink()
    settings = SETTINGS.replace("{modules}", json.dumps([packaged(module) for module in modules]))
    settings = settings.replace("{tests}", json.dumps(list(group.tests)))
    _update(tree / "README.md", (ROOT / "README.md").read_bytes())
    _update(
        tree / "pyproject.toml",
        ((ROOT / "pyproject.toml").read_text(encoding="utf-8") + settings).encode(),
    )
    return tree


def _update(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _forget(tree: Path, modules: Sequence[str], survivors_only: bool) -> None:
    """Drop the results of modules whose code or tests changed, or only those of survivors."""
    (tree / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
    for module in modules:
        mutated = tree / "mutants" / packaged(module)
        results = mutated.with_name(f"{mutated.name}.meta")
        if not survivors_only:  # both files are written anew, with the operators of today
            mutated.unlink(missing_ok=True)
            results.unlink(missing_ok=True)
        elif results.is_file():
            meta = json.loads(results.read_text(encoding="utf-8"))
            codes = meta["exit_code_by_key"]
            meta["exit_code_by_key"] = {
                key: None if code in SURVIVED else code for key, code in codes.items()
            }
            results.write_text(json.dumps(meta), encoding="utf-8")


def run_group(
    group: Group, modules: Sequence[str], processes: int, survivors: bool
) -> dict[str, Outcome]:
    """Test every mutant of the modules; raises CalledProcessError if a test fails without one."""
    digests = {module: body_digest(module, group) for module in modules}
    tree = prepare(group, modules)
    stamp = tree / "tests.json"
    known = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else {}
    changed = [module for module in modules if known.get(module) != digests[module]]
    if changed:
        _forget(tree, changed, survivors)
        stamp.write_text(json.dumps(known | digests), encoding="utf-8")
    before = read_outcomes() if survivors else {}
    former = {
        packaged(module): before[module].survivors
        for module in changed
        if module in before and before[module].source == source_digest(module)
    }
    (tree / FORMER).write_text(json.dumps(former), encoding="utf-8")
    _run(tree, "former.py", "run", "--max-children", str(processes))
    return {module: _outcome(tree, module, digests[module]) for module in modules}


def _run(folder: Path, script: str, *arguments: str) -> None:
    """Run a script of this folder elsewhere, with a folder of its own for temporary files."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    memory = MEMORY if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="mutants-", dir=memory) as temporary:
        # other pytest sessions of this machine remove folders of the common root
        environment["PYTEST_DEBUG_TEMPROOT"] = temporary
        subprocess.run(command, cwd=folder, env=environment, check=True)


def _outcome(tree: Path, module: str, digest: str) -> Outcome:
    """Read the outcome of a module from the results of mutmut."""
    meta = json.loads((tree / "mutants" / f"{packaged(module)}.meta").read_text(encoding="utf-8"))
    codes: Mapping[str, int] = meta["exit_code_by_key"]
    survivors = [key for key, code in codes.items() if code in SURVIVED]
    command = [sys.executable, str(Path(__file__).parent / "outcomes.py"), packaged(module)]
    shown = subprocess.run(
        [*command, *survivors], cwd=tree, check=True, capture_output=True, text=True
    )
    changes = [tuple(change) for change in json.loads(shown.stdout)]
    return Outcome(digest, source_digest(module), len(codes), tuple(changes))


def run_values(
    group: Group, modules: Sequence[str], processes: int, survivors: bool
) -> dict[str, Outcome]:
    """Test every value of the modules; raises CalledProcessError if a test fails without one."""
    options = ["--processes", str(processes), *(["--survivors"] if survivors else [])]
    _run(ROOT, "planted.py", group.name, *modules, *options)
    return {module: value_outcome(module) for module in modules}


def main(argv: Sequence[str] | None = None) -> int:
    """Test the mutants of every module that changed, and write the report."""
    parser = argparse.ArgumentParser(prog="make mutants", description="Mutation testing.")
    parser.add_argument("only", nargs="*", help="groups or modules; default: all that changed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--survivors", action="store_true", help="after a new test: test only former survivors"
    )
    parser.add_argument("--fresh", action="store_true", help="forget the results of this machine")
    options = parser.parse_args(argv)
    groups = read_groups()
    known = {name for group in groups for name in (group.name, *group.modules)}
    unknown = sorted(set(options.only) - known)
    if unknown:
        parser.error(f"no group or module called {unknown[0]!r}; known: {', '.join(sorted(known))}")
    for group in groups:
        chosen = [m for m in group.modules if not options.only or {group.name, m} & {*options.only}]
        if options.fresh and chosen:
            shutil.rmtree(FOLDER / group.name, ignore_errors=True)
            for module in chosen:
                state_file(module).unlink(missing_ok=True)
        for values, run, of_now in (
            (False, run_group, body_digest),
            (True, run_values, value_digest),
        ):
            known = {module: outcome.digest for module, outcome in read_outcomes(values).items()}
            modules = [m for m in chosen if options.fresh or known.get(m) != of_now(m, group)]
            if modules:
                print(f"{group.name}: {', '.join(modules)}", flush=True)
                start = time.monotonic()
                tested = run(group, modules, options.processes, options.survivors)
                print(f"{group.name}: {(time.monotonic() - start) / 60:.1f} min", flush=True)
                write_outcomes(tested, groups, values)
    write_outcomes({}, groups, values=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
