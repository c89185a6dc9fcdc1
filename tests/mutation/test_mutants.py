"""The map of `make mutants` is complete, and its report follows from its outcomes."""

import re
from collections import Counter
from pathlib import Path

from outcomes import MARKDOWN, as_markdown, read_groups, read_outcomes, read_reasons

ROOT = Path(__file__).parents[2]
MUTATED = [  # every module through which the numbers of a table go
    "methods/*.py",
    "eval/*.py",
    "distill_bench/train/*.py",
    "distill_bench/report/tables/*.py",
    "distill_bench/report/verify.py",
    "distill_bench/report/rows.py",
    "distill_bench/report/results.py",
    "distill_bench/report/stats.py",
    "distill_bench/domain/gaussian*.py",
    "distill_bench/domain/mixture*.py",
    "distill_bench/evaluate/comparison.py",
    "distill_bench/evaluate/distances.py",
    "distill_bench/evaluate/optical_flow.py",
    "distill_bench/networks/ledger.py",
    "distill_bench/draws.py",
    "distill_bench/discriminator.py",
    "distill_bench/expressions.py",
    "distill_bench/noise.py",
    "distill_bench/rollout.py",
]


def test_every_module_that_numbers_go_through_is_mutated_once():
    wanted = {
        path.relative_to(ROOT).as_posix()
        for pattern in MUTATED
        for path in ROOT.glob(pattern)
        if path.name not in ("__init__.py", "__main__.py")
    }
    mapped = Counter(module for group in read_groups() for module in group.modules)
    assert sorted(wanted - set(mapped)) == []
    assert [module for module, count in mapped.items() if count > 1] == []
    named = {path for group in read_groups() for path in (*group.modules, *group.tests)}
    assert [path for path in named if not (ROOT / path).is_file()] == []
    assert all(group.tests for group in read_groups())


def test_the_report_follows_from_the_outcomes_and_reasons():
    modules = [module for group in read_groups() for module in group.modules]
    outcomes = read_outcomes()
    assert set(outcomes) <= set(modules)
    assert MARKDOWN.read_text(encoding="utf-8") == as_markdown(outcomes, modules, read_reasons())


def test_every_reason_is_of_a_mutant_that_survived():
    survivors = {
        (module, *survivor)
        for module, outcome in read_outcomes().items()
        for survivor in outcome.survivors
    }
    reasons = {
        (module, function, change)
        for kind, by_module in read_reasons().items()
        if kind in ("equivalent", "survivor")
        for module, by_function in by_module.items()
        for function, by_change in by_function.items()
        for change in by_change
        if module in read_outcomes()
    }
    assert reasons - survivors == set()
    assert set(read_reasons()) <= {"equivalent", "survivor", "everywhere"}
    for rule in read_reasons().get("everywhere", ()):
        assert rule["kind"] in ("equivalent", "survivor")
        assert any(re.search(rule["change"], change) for _, _, change in survivors), rule
