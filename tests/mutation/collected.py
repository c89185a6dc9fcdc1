"""Tests of a mutant, run from a pytest session that has collected them already.

mutmut starts pytest in each forked process. Here the process that forks has started it and has
collected all tests, so that a mutant costs a fork and its tests: a third of the time.
"""

import importlib
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from _pytest.config import _prepareconfig
from _pytest.main import Session
from _pytest.reports import TestReport
from mutmut.runners.harness import PytestRunner
from mutmut.state import state
from mutmut.utils.file_utils import change_cwd

SLOW = 0.2  # seconds
IMPORTED = Path("imported.txt")  # packages that the tests import while they run
OPTIONS = ["--rootdir=.", "--capture=sys", "-q", "-o", "tmp_path_retention_policy=none"]


def quickest_first(tests: Collection[str]) -> list[str]:
    """Quick tests before slow ones, and quick files first: the first failure ends a run.

    The tests of a file stay together, so that its fixtures are made once.
    """
    durations, of_files = state().duration_by_test, Counter[str]()
    for test in tests:
        if durations[test] < SLOW:
            of_files[_file(test)] += durations[test]

    def key(test: str) -> tuple[bool, float, str, float]:
        return durations[test] >= SLOW, of_files[_file(test)], _file(test), durations[test]

    return [*sorted(tests, key=key), *_neighbours(tests)]


def _neighbours(tests: Collection[str]) -> list[str]:
    """Other tests of the files of `tests`, quick ones first.

    A fixture or a cached result that several tests share reaches a function in the first of them
    alone. mutmut ends a mutant after eight times the seconds of `tests` and eight more, so the
    neighbours may take as long as these, and two seconds.
    """
    durations = state().duration_by_test
    files, left = set(map(_file, tests)), 2.0 + sum(durations[test] for test in tests)
    others = (test for test in durations.keys() - set(tests) if _file(test) in files)
    kept = []
    for test in sorted(others, key=durations.__getitem__):
        left -= durations[test]
        if left < 0:
            break
        kept.append(test)
    return sorted(kept, key=_file)


def _file(test: str) -> str:
    return test.partition("::")[0]


class CollectedTests(PytestRunner):
    """Runs the tests of one mutant in a fork of the process that collected all of them."""

    def warm_up(self) -> None:
        packages = IMPORTED.read_text(encoding="utf-8").split() if IMPORTED.is_file() else []
        with change_cwd("mutants"):
            selection = self._pytest_add_cli_args_test_selection
            config = _prepareconfig([*OPTIONS, *selection, *self._pytest_add_cli_args])
            config._do_configure()
            self.session = Session.from_config(config)
            config.hook.pytest_sessionstart(session=self.session)
            config.hook.pytest_collection(session=self.session)
        self.items = {item.nodeid: item for item in self.session.items}
        for name in packages:  # once, instead of once per mutant
            with suppress(Exception):  # some cannot be imported alone
                importlib.import_module(name)

    def run_tests(self, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        if not hasattr(self, "items"):
            return super().run_tests(mutant_name=mutant_name, tests=tests)
        items = [self.items[test] for test in tests]
        with change_cwd("mutants"):
            for item, following in zip(items, [*items[1:], None], strict=True):
                self.session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if self.session.testsfailed:
                    return 1
        return 0


class _PrintedFailures:
    """Plugin of pytest that prints the test that failed, and how."""

    def pytest_runtest_logreport(self, report: TestReport) -> None:
        if report.failed:
            text = f"{report.nodeid} fails without a mutant\n{report.longreprtext}"
            print(f"\n{text}", file=sys.__stderr__, flush=True)  # stdout may be captured


def run_without_mutant() -> int:
    """Run all tests in the way of a mutant; returns 0 if they pass."""
    collected = CollectedTests()
    collected.warm_up()
    collected.session.config.pluginmanager.register(_PrintedFailures())
    before = set(sys.modules)
    code = collected.run_tests(mutant_name=None, tests=quickest_first(collected.items))
    later = [name for name in sys.modules if name not in before and "distill_bench" not in name]
    IMPORTED.write_text("\n".join(later), encoding="utf-8")
    return code
