"""The map of `make mutants` is complete, and its report follows from its outcomes."""

import re
from collections import Counter
from pathlib import Path

from outcomes import MARKDOWN, as_markdown, read_groups, read_outcomes, read_reasons
from values import mutants_of

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
    assert set(read_outcomes()) | set(read_outcomes(values=True)) <= set(modules)
    assert MARKDOWN.read_text(encoding="utf-8") == as_markdown(modules, read_reasons())


def test_every_reason_is_of_a_mutant_that_survived():
    outcomes = [*read_outcomes().items(), *read_outcomes(values=True).items()]
    survivors = {
        (module, *survivor) for module, outcome in outcomes for survivor in outcome.survivors
    }
    reasons = {
        (module, function, change)
        for kind, by_module in read_reasons().items()
        if kind in ("equivalent", "survivor")
        for module, by_function in by_module.items()
        for function, by_change in by_function.items()
        for change in by_change
        if module in dict(outcomes)
    }
    assert reasons - survivors == set()
    assert set(read_reasons()) <= {"equivalent", "survivor", "everywhere"}
    for rule in read_reasons().get("everywhere", ()):
        assert rule["kind"] in ("equivalent", "survivor")
        assert any(re.search(rule["change"], change) for _, _, change in survivors), rule


SOURCE = '''"""A docstring with 3 words."""
TABLE = {"mean": 0.5, "a title": -1}
class Example(Method):
    title: ClassVar[str] = "example"
    paper: ClassVar[Citation] = Citation("2405.14867", "A title", 2024)
    presets: ClassVar = {"paper": Preset("repo@1", {"method.space": "x0", "method.on": True})}
    size: Annotated[int, Field(ge=1)] = 2
@torch.no_grad()
def gap(x, *, scale: float = 0.0):
    half = 0.5
    return half * (x - 1).detach()
'''


def test_values_are_mutated_one_at_a_time_and_texts_for_readers_are_not():
    choices = {"space": [("x0", "velocity")]}
    mutants = list(mutants_of(SOURCE, choices))
    changed = [
        (mutant.place, *set(mutant.source.split("\n")).difference(SOURCE.split("\n")))
        for mutant in mutants
    ]
    presets = '    presets: ClassVar = {"paper": Preset("repo@1", {"method.space": %s})}'
    assert changed == [
        ("TABLE", """TABLE = {'XXmeanXX': 0.5, "a title": -1}"""),
        ("TABLE", 'TABLE = {"mean": 1.0, "a title": -1}'),
        ("TABLE", 'TABLE = {"mean": 0.5, "a title": -2}'),
        ("Example.presets", presets % """'velocity', "method.on": True"""),
        ("Example.presets", presets % '"x0", "method.on": False'),
        ("Example.size", "    size: Annotated[int, Field(ge=1)] = 3"),
        ("gap", "def gap(x, *, scale: float = 1.0):"),
        ("gap", "    return half * (x - 1)"),
        ("gap", "@torch.enable_grad()"),
    ]
