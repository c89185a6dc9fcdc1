"""Test the mutants of `values.py`; started by `mutants.py` as `planted.py GROUP MODULE...`.

One child process per mutant, forked where other packages are imported and distill_bench is not. It
puts the mutant in the module's place, then runs one file of tests after another until one fails.
"""

import argparse
import gc
import importlib
import json
import os
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest
from outcomes import Group, Outcome, digest_of, read_groups, read_outcomes, source_digest
from values import CODE, ROOT, Mutant, mutants_of, read_choices

FOLDER = ROOT / "build" / "mutants" / "values"
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not slurm and not soak"]
OPTIONS += ["-o", "tmp_path_retention_policy=none"]
OPTIONS += ["-p", "no:unraisableexception"]  # collects garbage at the end: half of a child's time
SURVIVED, OTHERWISE = "-", "limit or crash"  # in the place of the file that killed a mutant


class _Planted(SourceFileLoader):
    """Finder and loader of the one module that has a mutant's source."""

    def __init__(self, module: str, source: str) -> None:
        name = module.removesuffix(".py").replace("/", ".").removeprefix("distill_bench.")
        super().__init__(f"distill_bench.{name}", str(ROOT / module))
        self.source = source

    def find_spec(self, name, path=None, target=None):
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname):
        return compile(self.source, self.path, "exec")


def value_digest(module: str, group: Group) -> str:
    """Digest of a module for mutants of its values."""
    return digest_of(module, (*group.tests, *group.values), "values.py")


def state_file(module: str) -> Path:
    """JSON file of a module's mutants so far: which file of tests killed each."""
    return FOLDER / f"{module.replace('/', '.')}.json"


def value_outcome(module: str) -> Outcome:
    """Outcome of a module whose every mutant was tested."""
    state = json.loads(state_file(module).read_text(encoding="utf-8"))
    pairs = list(zip(_mutants(module), state["killers"], strict=True))
    survivors = [(m.place, m.change) for m, killer in pairs if killer == SURVIVED]
    return Outcome(state["digest"], source_digest(module), len(pairs), tuple(survivors))


def _mutants(module: str) -> list[Mutant]:
    source = (ROOT / module).read_text(encoding="utf-8")
    return list(mutants_of(source, read_choices(module)))


def _state(module: str, group: Group, survivors: bool) -> dict:
    """Stored state; after a change without killers, or with those of all but the survivors."""
    path, digest, mutants = state_file(module), value_digest(module, group), _mutants(module)
    state = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if state.get("digest") == digest:
        return state
    before = read_outcomes(values=True).get(module)
    if not survivors or before is None or before.source != source_digest(module):
        return {"digest": digest, "killers": [None] * len(mutants)}
    again = [(m.place, m.change) in before.survivors for m in mutants]
    return {"digest": digest, "killers": [None if survived else "" for survived in again]}


def _run_tests(files: Sequence[str], report: Path) -> int:
    """Number, from 1, of the first file with a failure; 0 if all pass.

    Writes the CPU seconds of each file, and names of the imported modules of other packages.
    """
    seconds, own = {}, tuple(str(ROOT / folder) for folder in (*CODE, "tests"))
    for number, file in enumerate(files, 1):
        start = time.process_time()
        if pytest.main([file, *OPTIONS]) not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            return number
        seconds[file] = time.process_time() - start
    paths = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    others = [name for name, path in paths.items() if path and not path.startswith(own)]
    report.write_text(json.dumps([seconds, others]), encoding="utf-8")
    return 0


def _start(files: Sequence[str], seconds: float, folder: Path, plant: _Planted | None) -> int:
    """Run the tests in a child with a limit of CPU seconds; returns its process id."""
    process = os.fork()
    if process:
        return process
    code = 255
    try:
        if plant:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            sys.meta_path.insert(0, plant)
        sys.argv = ["pytest"]
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        folder.mkdir()
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(folder)
        code = _run_tests(files, folder.with_name(f"{folder.name}.json"))
    finally:
        os._exit(code)


def _run_without_mutant(files: Sequence[str], folder: Path) -> tuple[dict[str, float], list[str]]:
    """CPU seconds of each file, and modules of other packages that the files import."""
    _, status = os.waitpid(_start(files, 3600, folder, None), 0)
    if status:
        sys.exit("a test fails without a mutant")
    seconds, packages = json.loads(folder.with_name(f"{folder.name}.json").read_text("utf-8"))
    return seconds, packages


def run_group(group: Group, states: dict[str, dict], processes: int, temporary: Path) -> None:
    """Test the mutants that have no result yet, and store each result."""
    todo = [
        (module, number, mutant)
        for module, state in states.items()
        for number, mutant in enumerate(_mutants(module))
        if state["killers"][number] is None
    ]
    if not todo:
        return
    tests = [*group.tests, *group.values]
    _, packages = _run_without_mutant(tests, temporary / "first")
    for name in packages:
        with suppress(Exception):  # some cannot be imported alone
            importlib.import_module(name)
    assert "distill_bench" not in sys.modules, "a mutant must come before the import"
    gc.freeze()  # a collection in a child would copy the memory of these packages
    seconds, _ = _run_without_mutant(tests, temporary / "second")  # as with a mutant
    limit = 30 + 4 * sum(seconds.values())
    print(f"{group.name}: {len(todo)} values, {sum(seconds.values()):.0f} s of tests", flush=True)
    running: dict[int, tuple[str, int, list[str], Path]] = {}
    while todo or running:
        while todo and len(running) < processes:
            module, number, mutant = todo.pop(0)
            kills = Counter(states[module]["killers"])
            files = sorted(tests, key=lambda file: (-kills[file], seconds[file]))
            folder = temporary / f"{state_file(module).stem}.{number}"
            process = _start(files, limit, folder, _Planted(module, mutant.source))
            running[process] = module, number, files, folder
        process, status = os.wait()
        module, number, files, folder = running.pop(process)
        code = os.waitstatus_to_exitcode(status)
        names = dict(enumerate([SURVIVED, *files]))
        states[module]["killers"][number] = names.get(code, OTHERWISE)
        state_file(module).write_text(json.dumps(states[module]), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Test the modules of one group."""
    parser = argparse.ArgumentParser()
    parser.add_argument("group")
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--survivors", action="store_true")
    options = parser.parse_args()
    group = next(group for group in read_groups() if group.name == options.group)
    FOLDER.mkdir(parents=True, exist_ok=True)
    states = {module: _state(module, group, options.survivors) for module in options.modules}
    for module, state in states.items():
        state_file(module).write_text(json.dumps(state), encoding="utf-8")
    run_group(group, states, options.processes, Path(os.environ["PYTEST_DEBUG_TEMPROOT"]))


if __name__ == "__main__":
    main()
