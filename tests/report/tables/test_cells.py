"""Cells of tables of few rows: what they sort by, their marks, words and escapes."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from stores import update_json, write_results

from distill_bench.report.read_store import REFERENCE
from distill_bench.report.results import COSTS, Column, load
from distill_bench.report.rows import COST
from distill_bench.report.stats import mean_interval
from distill_bench.report.tables.differences import against_baseline, differences, seeds_for_gaps
from distill_bench.report.tables.files import table_files
from distill_bench.report.tables.scores import (
    Cell,
    budget,
    equal_cost,
    equal_cost_caption,
    equal_cost_differences,
    equal_cost_differences_caption,
    score_table,
    winner,
)
from distill_bench.sample.reference_kinds import ELSEWHERE

D = Column("d", "Distance", "", "lower", True)
M = Column("m", "Motion", "", "one", True)


def study(folder, rows, columns=(D,), axis=None, cost=1.0, others=(), clips=(), prompts=None):
    """Results of rows of runs, each a dict of scores and swept values.

    Args:
        cost: of a student update; None: unknown.
        others: further lines of runs.csv.
        clips: lines of clips.csv: run id, column, values.
    """
    folder.mkdir(exist_ok=True)
    runs = []
    points = [{"run_id": run["run_id"], "student_updates": 1} for run in others]
    for method, by_seed in rows.items():
        for seed, values in enumerate(by_seed):
            run = {"run_id": f"{method}{seed}", "method": method, "seed": seed}
            runs.append(run | {COST: cost and 20 * cost} | values)
            scores = {column.name: values.get(column.name) for column in columns}
            points += [
                {"run_id": run["run_id"], "student_updates": updates, COST: cost and updates * cost}
                | scores
                for updates in (10, 20)
            ]
    training = [{"run_id": run["run_id"], "student_updates": 1} for run in [*runs, *others]]
    swept = [axis] if axis else []
    write_results(folder, columns, swept, axis, [*others, *runs], points, training)
    lines = [(run, column, " ".join(map(str, values))) for run, column, values in clips]
    frame = pd.DataFrame(lines, columns=["run_id", "column", "values"])
    frame.to_csv(folder / "clips.csv", index=False)
    update_json(folder / "sweep.json", prompts=prompts)
    return load(folder)


def test_cells_sort_by_the_numbers_that_they_show(tmp_path):
    """A row without a place on the axis sorts by its text, and a rate is written as one."""
    rates = {
        "a": (None, Cell("—")),
        "b": (1e-5, Cell("1e-5", 1e-5)),
        "c": (2e-4, Cell("2e-4", 2e-4)),
    }
    scores = {"a": [1.0, 2.0], "b": [3.0, 5.0], "c": [2.0, 9.0]}
    rows = {
        method: [{"d": value, "student_lr": rate} for value in scores[method]]
        for method, (rate, _) in rates.items()
    }
    results = study(tmp_path, rows, axis="student_lr")
    final = score_table(results, [D]).lines
    for (row, at_end), (_, at_cost) in zip(final, equal_cost(results).lines, strict=True):
        place = rates[row.method][1]
        assert at_end[1:3] == at_cost[1:3] == [place, Cell("2", 2)]
        assert at_end[4].key == at_cost[4].key == pytest.approx(np.mean(scores[row.method]))
        assert at_cost[3] == Cell("20.0", 20.0)
    for row, cells in equal_cost_differences(results).lines:
        gain = np.subtract(scores[row.method], scores["a"]).mean()
        assert cells[1:3] == [rates[row.method][1], Cell("2", 2)]
        assert cells[3].key == pytest.approx(gain)


def test_the_seeds_of_a_row_are_those_of_its_most_complete_score(tmp_path):
    """And its comparisons are counted per score: a single seed has none."""
    rows = {"a": [{"d": 1.0, "m": 1.0}, {"d": 2.0}], "b": [{"d": 3.0, "m": 2.0}, {"d": 5.0}]}
    results = study(tmp_path, rows, (D, M))
    for table in (equal_cost(results), equal_cost_differences(results)):
        assert {cells[1] for _, cells in table.lines} == {Cell("2", 2)}
    assert "(0 to 1 comparisons per score)" in equal_cost_differences_caption(results)
    alone = Column("m", "Motion", "", "one", False)
    results = study(tmp_path / "one", rows, (D, alone))
    assert "(1 comparisons per score)" in equal_cost_differences_caption(results)


def test_a_difference_is_bold_only_after_holms_correction(tmp_path):
    """Four rows of five seeds; one difference has p = 0.04 before, and 0.07 after."""
    noise = [0.0, 0.1, -0.1, 0.05, -0.05]
    away = {"a": [0.0] * 5, "b": [0.05 + x for x in noise], "c": [9 + x for x in noise]}
    away["d"] = [0.12 + 1.1 * x for x in noise]
    rows = {name: [{"d": 5.0 + x} for x in values] for name, values in away.items()}
    results = study(tmp_path, rows)
    family = against_baseline(results, D, results.baseline, budget(results))
    raw = {difference.a.method: difference.p for difference, _ in family}
    corrected = {difference.a.method: p for difference, p in family}
    assert raw["d"] < 0.05 < corrected["d"] and corrected["c"] < 0.05
    bold = {row.method: cells[2].best for row, cells in equal_cost_differences(results).lines}
    assert bold == {name: p < 0.05 for name, p in corrected.items()}


def test_runs_without_a_score_are_expected_at_equal_cost(tmp_path):
    rows = {"a": [{"d": 1.0}, {"d": 2.0}], "b": [{"d": 3.0}, {"status": "failed"}]}
    table = table_files(study(tmp_path, rows))["equal_cost.csv"]
    lines = pd.read_csv(io.StringIO(table)).set_index("method")
    assert lines["expected"].to_dict() == {"a": 2, "b": 2}
    assert lines["d_n"].to_dict() == {"a": 2, "b": 1}


def test_without_a_headline_score_no_seed_counts_at_equal_cost(tmp_path):
    results = study(tmp_path, {"a": [{"d": 1.0}]}, (Column("d", "Distance"),))
    ((_, cells),) = equal_cost(results).lines
    assert cells[1:] == [Cell("0/1 (1 not evaluated around it)", 0), Cell("20.0", 20.0)]


def test_costs_of_a_network_that_was_trained_elsewhere_are_not_compared(tmp_path):
    other = {"run_id": "w", "method": "wan", "role": ELSEWHERE, "status": REFERENCE, "d": 2.0}
    results = study(tmp_path, {"a": [{"d": 1.0}]}, others=[other])
    (_, reference), (_, student) = score_table(results, [D, *COSTS]).lines
    assert reference[3:] == [Cell("2.00", 2.0), *[Cell("trained elsewhere")] * 3]
    assert student[3:5] == [Cell("1.00", 1.0), Cell("20.0", 20.0)]


@pytest.mark.parametrize("prompts, best", [([0] * 8 + [1] * 8, None), (list(range(16)), "a")])
def test_the_best_row_is_judged_over_prompts(tmp_path, prompts, best):
    """Sixteen clips of two prompts, one of which hardly gains, are two observations."""
    clips = {f"a{seed}": np.full(16, 10.0) for seed in range(3)}
    gains = np.repeat([1.0, 3.0], 8)
    clips |= {f"b{seed}": 10 + gains + 0.1 * seed for seed in range(3)}
    rows = {m: [{"d": clips[f"{m}{seed}"].mean()} for seed in range(3)] for m in "ab"}
    lines = [(run, "d", values) for run, values in clips.items()]
    row = winner(study(tmp_path, rows, clips=lines, prompts=prompts), D)
    assert (row and row.method) == best


def test_two_clips_of_one_prompt_say_nothing_about_other_prompts(tmp_path):
    clips = {"a": [[1.0, 9.0], [2.0, 8.5], [3.0, 9.0]], "b": [[0.0, 0.0]] * 3}
    rows = {m: [{"d": np.mean(values)} for values in by_seed] for m, by_seed in clips.items()}
    lines = [(f"{m}{i}", "d", values) for m, row in clips.items() for i, values in enumerate(row)]
    results = study(tmp_path, rows, clips=lines, prompts=[0, 0])
    (difference,) = differences(results, D, [tuple(results.students)])
    over_seeds = mean_interval([np.mean(values) for values in clips["a"]])
    assert difference.interval.half == pytest.approx(over_seeds.half, rel=0.06)


@pytest.mark.parametrize("methods", ["", "a", "ab"])
def test_two_rows_are_compared_and_fewer_are_not(tmp_path, methods):
    teacher = {"run_id": "t", "method": "teacher", "role": "teacher", "status": REFERENCE, "d": 2.0}
    rows = {method: [{"d": 1.0}, {"d": 2.0}] for method in methods}
    results = study(tmp_path, rows, others=[teacher])
    text = table_files(results)["table.md"]
    assert text.startswith("## At the end of training"), "a study without a question"
    compared = len(methods) == 2
    assert ("## Distance ↓: difference to A" in text) == compared
    assert (equal_cost_differences(results) is not None) == compared
    assert compared or seeds_for_gaps(results) == []


def test_a_row_is_shown_minus_the_baseline_with_its_share_of_the_cost(tmp_path):
    rows = {"a": [{"d": 1.0}, {"d": 2.0}], "b": [{"d": d, COST: 50.0} for d in (2.0, 3.5)]}
    text = table_files(study(tmp_path, rows))["table.md"]
    section = text.partition("## Distance ↓: difference to A\n\n")[2]
    head, _, line = section.splitlines()[:3]
    assert head == "| row | seeds | difference | p (Holm over 1) | favours | cost |"
    label, seeds, difference, _, favours, ratio = line.strip("| ").split(" | ")
    assert (label, seeds, favours, ratio) == ("B", "2", "neither", "2.50 x")
    assert difference.startswith("+1.2 ± ")


def test_without_costs_nothing_is_at_equal_cost(tmp_path):
    rows = {method: [{"d": 1.0}, {"d": 2.0}] for method in "ab"}
    results = study(tmp_path, rows, cost=None)
    assert equal_cost_differences(results) is None
    assert equal_cost_caption(results) == "No finished run has a training cost."
    text = table_files(results)["table.md"]
    assert "| B | 2 | 0 | 1.00 | neither | — |" in text


def test_marks_of_a_cell_are_apart_and_heads_are_escaped(tmp_path):
    warnings = json.dumps({"d": ["too few", "too short"]})
    column = Column("d", "of_|a_| long_name", "", "lower", True)
    results = study(tmp_path, {"a": [{"d": 1.0, "warnings": warnings}]}, (column,))
    files = table_files(results)
    assert "| 1.00 [1] [2] |" in files["table.md"] and "1.00$^{1,2}$" in files["table.tex"]
    assert r"| of_\|a_\| long_name ↓ |" in files["table.md"]
    assert r"\shortstack{of\_$|$a\_$|$ long\_\\name $\downarrow$}" in files["table.tex"]
