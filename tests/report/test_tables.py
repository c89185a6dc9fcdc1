"""Tables of scores, at equal cost and of paired differences."""

import dataclasses
import re

import numpy as np
import pytest
from scipy.stats import ttest_rel
from stores import RUNS, edit_lines, load_results, update_json, write_store

from distill_bench.report import load, tables
from distill_bench.report.csv_files import read_frame, read_texts
from distill_bench.report.page.html import render_page
from distill_bench.report.read_store import read_sweep
from distill_bench.report.rows import COST
from distill_bench.report.stats import Interval
from distill_bench.report.tables.differences import cost_ratio, differences
from distill_bench.report.tables.files import table_files
from distill_bench.report.tables.plateau import changes, plateau
from distill_bench.report.tables.scores import (
    budget,
    equal_cost,
    equal_cost_differences,
    row_heads,
    score_caption,
    score_table,
    show_interval,
    winner,
)

ONE, FIVE = "Alpha, K=1", "Alpha, K=5"
BETA = "Beta, K=1"


def best_rows(folder, runs):
    """Labels of the rows that are bold in the first headline score."""
    results = load_results(write_store(folder, runs), folder / "data")
    table = score_table(results, results.headline)
    return {row.label for row, cells in table.lines if cells[3].best}


def written(results, name, folder):
    """A table file as a frame of texts."""
    (folder / name).write_text(table_files(results)[name])
    return read_texts(folder / name)


def drop_distance(store, run):
    """Delete the distance of a finished run, named by the start of its id."""
    path = next(store.glob(f"{run}-*")) / "metrics.jsonl"
    edit_lines(path, lambda line: line if line["column"] != "distance" else None)


# --- scores ---


def test_a_row_is_best_only_if_the_paired_intervals_exclude_0(tmp_path):
    clear = [("alpha", s, 1, 10.0 + s) for s in range(3)]
    clear += [("beta", s, 1, 20.0 + 1.1 * s) for s in range(3)]
    assert best_rows(tmp_path / "clear", clear) == {"Alpha"}
    vague = [("alpha", s, 1, 10.0 + 9 * s) for s in range(3)]
    vague += [("beta", s, 1, 20.0 - s) for s in range(3)]
    assert not best_rows(tmp_path / "vague", vague)


def test_no_row_is_best_if_any_row_lost_a_run(tmp_path):
    """Surviving seeds are a biased sample, and a row without scores may have been better."""
    clear = [("alpha", s, 1, 1.0 + s / 100) for s in range(4)]
    clear += [("beta", s, 1, 5.0 + s / 20) for s in range(4)]
    assert best_rows(tmp_path / "whole", clear)
    assert not best_rows(tmp_path / "collapsed", [*clear, ("alpha", 4, 1, None, "collapsed")])
    assert not best_rows(tmp_path / "rival", [*clear, ("gamma", 0, 1, None, None)])
    store = write_store(tmp_path / "unscored", clear)  # a finished run without this score
    drop_distance(store, "alpha-s1")
    results = load_results(store, tmp_path / "unscored" / "data")
    assert all(row.complete for row in results.students)
    assert winner(results, results.headline[0]) is None


def test_a_mean_over_fewer_seeds_than_its_row_has_says_so(tmp_path):
    store = write_store(tmp_path, [("alpha", seed, 1, 1.0 + seed / 10) for seed in range(3)])
    drop_distance(store, "alpha-s1")
    text = table_files(load_results(store, tmp_path / "data"))["table.md"]
    assert "(2 of 3 seeds)" in text and text.count("of 3 seeds)") == 1
    runs = [("alpha", seed, 1, 1.0 + seed / 10) for seed in range(3)]
    lost = write_store(tmp_path / "lost", [*runs, ("alpha", 3, 1, None, None)])
    drop_distance(lost, "alpha-s1")
    text = table_files(load_results(lost, tmp_path / "lost_data"))["table.md"]
    assert "(2 of 3 seeds)" in text and "3/4 (1 failed)" in text


def test_warnings_of_evaluators_are_footnotes(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0), ("beta", 0, 1, 2.0)])
    path = next(store.glob("beta-*")) / "metrics.jsonl"
    warnings = {"distance": {"warnings": ["too few clips to trust"]}}
    edit_lines(path, lambda line: line | warnings.get(line["column"], {}))
    files = table_files(load_results(store, tmp_path / "data"))
    assert "| 2.00 [1] |" in files["table.md"]
    assert "\n[1] too few clips to trust.\n" in files["table.md"]
    assert "2.00$^{1}$" in files["table.tex"] and "1: too few clips to trust." in files["table.tex"]


@pytest.mark.parametrize(
    "interval, text",
    [
        (Interval(112.34, 108.3, 116.38, 3), "112.3 ± 4.0"),
        (Interval(0.12347, 0.1220, 0.1244, 3), "0.1235 ± 0.0012"),
        (Interval(15230.0, 15110.0, 15350.0, 3), "15,230 ± 120"),
        (Interval(2.0, float("nan"), float("nan"), 1), "2.00"),
        (Interval(0.0, 0.0, 0.0, 3), "0"),
        (Interval(1.4e-14, 1.3e-14, 1.5e-14, 1), "0"),
        (Interval(0.8, 0.8 - 1e-16, 0.8 + 2e-16, 3), "0.800"),
        (None, "—"),
    ],
)
def test_a_mean_has_as_many_digits_as_its_interval_supports(interval, text):
    assert show_interval(interval) == text


def test_differences_in_markdown_carry_their_sign(tabulated):
    text = (tabulated[0] / "table.md").read_text()
    rows = re.findall(
        r"^\| [^|]+ \| \d+ \| ([^|]+) \| [^|]+ \| [^|]+ \| [^|]+ x \|$", text, re.MULTILINE
    )
    assert len(rows) > 3 and all(re.match("[+-]|0", row) for row in rows)
    assert any(row.startswith("+") for row in rows)


def test_markdown_and_csv_have_the_same_rows(tabulated):
    section = (tabulated[0] / "table.md").read_text().split("## ")[1]
    markdown = [line for line in section.splitlines() if line.startswith("|")]
    table = read_frame(tabulated[0] / "table.csv")
    assert len(markdown) == 2 + len(table) == 7
    assert len({line.count("|") for line in markdown}) == 1
    assert table["distance_mean"].iloc[2] == pytest.approx(11.1)
    assert table["distance_n"].iloc[2] == 3
    assert table.loc[4, ["done", "expected", "collapsed"]].tolist() == [1, 4, 1]


def test_table_csv_counts_the_runs_in_each_state_and_says_which_rows_move(results, tmp_path):
    """Every study has the states done, collapsed and failed; references have none of their own."""
    assert {run["status"] for run in results.runs.to_dict("records")} >= {"reference", "missing"}
    table = written(results, "table.csv", tmp_path)
    states = ["done", "collapsed", "failed", "missing"]
    begin = ["label", "method", *results.swept, "reference", "expected", *states, "plateau"]
    assert list(table.columns)[: len(begin) + 1] == [*begin, f"{results.columns[0].name}_mean"]
    for row, (_, line) in zip(results.rows, table.iterrows(), strict=True):
        assert (line["label"], line["method"]) == (row.label, row.method)
        of_state = {state: (row.runs["status"] == state).sum() for state in states}
        of_state["done"] += row.reference
        assert line[states].tolist() == [str(count) for count in of_state.values()]
        assert line["plateau"] == ("" if row.reference else plateau(results, row))
    store = write_store(tmp_path / "all", [("alpha", seed, 1, 1.0) for seed in range(2)])
    whole = written(load_results(store, tmp_path / "whole"), "table.csv", tmp_path)
    assert [name for name in whole.columns if name in states] == states[:3]


def test_tables_have_heads_that_name_rows_counts_and_scores(results):
    scores = [column.heading for column in results.headline]
    rows = ["method", "K (fake-score updates)"]
    assert row_heads(results) == rows
    assert score_table(results, results.headline).heads == [*rows, "seeds", "plateau", *scores]
    assert equal_cost(results).heads == [*rows, "seeds", "student updates", *scores]
    assert equal_cost_differences(results).heads == [*rows, "seeds", *scores]
    table = score_table(results, results.headline)
    for row, cells in table.lines:
        assert cells[3].text == ("—" if row.reference else plateau(results, row))
    assert score_caption(results).endswith(" K: fake-score updates.")
    plain = dataclasses.replace(results, manifest=results.manifest | {"swept": ["nfe"]})
    assert plain.swept == ["nfe"] and "K:" not in score_caption(plain)
    assert not score_caption(plain).endswith(" .")


def test_differences_at_equal_cost_carry_their_sign(tmp_path):
    runs = [("alpha", s, 1, 5.0 + s) for s in range(3)] + [
        ("beta", s, 1, 7.0 + s) for s in range(3)
    ]
    results = load_results(write_store(tmp_path, runs), tmp_path / "data")
    ((row, cells),) = equal_cost_differences(results).lines
    assert row.label == "Beta" and cells[2].text.startswith("+2.00")


def test_plateau_csv_has_the_changes_of_every_row(tmp_path):
    runs = [("alpha", s, 1, 5.0 + s) for s in range(3)] + [("beta", 0, 1, 7.0)]
    results = load_results(write_store(tmp_path, runs), tmp_path / "data")
    expected = [(row, change) for row in results.students for change in changes(results, row)]
    lines = written(results, "plateau.csv", tmp_path).to_dict("records")
    assert {change.interval is None for _, change in expected} == {True, False}
    for (row, change), line in zip(expected, lines, strict=True):
        assert (line["label"], line["column"]) == (row.label, change.column.name)
        assert (line["tolerance"], line["verdict"]) == (str(change.tolerance), change.verdict)
        if change.interval is None:
            assert [line[key] for key in ("seeds", "change", "low", "high")] == ["0", "", "", ""]
            continue
        interval = change.interval
        assert line["seeds"] == str(interval.n) and interval.low < interval.high
        numbers = {"change": interval.mean, "low": interval.low, "high": interval.high}
        for key, number in (numbers | {"noise": change.noise}).items():
            assert float(line[key]) == pytest.approx(number, rel=1e-5), key


def test_markdown_ends_with_the_origin_and_has_a_section_at_equal_cost(results):
    text = table_files(results)["table.md"]
    origin = results.manifest["provenance"]
    assert len(origin) > 1
    assert text.endswith(f"\n\nFrom {', '.join(f'{k} {v}' for k, v in origin.items())}.\n")
    assert f"\n\n## At equal cost\n\n| {' | '.join(row_heads(results))} | " in text


# --- differences ---


def test_differences_are_paired_by_seed(results):
    column = results.headline[0]
    one, five, beta = results.students
    paired, single = differences(results, column, [(five, one), (beta, one)])
    assert paired.seeds == 3 and paired.interval.mean == pytest.approx(40.4)
    assert paired.favours is one
    assert paired.needed == 2, "the difference is a hundred standard deviations"
    assert single.seeds == 1 and not np.isfinite(single.p), "one common seed has no spread"


def test_a_sweep_of_many_rows_is_compared_with_the_baseline_alone(results, tmp_path, monkeypatch):
    """All pairs of 1,000 rows would be half a million lines per score."""
    columns = ["a", "b", "difference", "p", "p_holm_baseline"]
    every = written(results, "differences.csv", tmp_path)[["column", *columns]]
    for module in (tables.differences, tables.scores):
        monkeypatch.setattr(module, "MOST_ROWS", len(results.students) - 1)
    few = written(results, "differences.csv", tmp_path)[["column", *columns]]
    baseline = every[every.b == results.baseline.label]
    assert len(few) == len(results.headline) * (len(results.students) - 1) < len(every)
    assert few.to_dict("records") == baseline.to_dict("records")
    assert "has every pair with the baseline, as the sweep" in tables.scores.differences_caption(
        results
    )


def test_differences_csv_has_every_pair_with_its_seeds(results, tmp_path):
    lines = written(results, "differences.csv", tmp_path).query("column == 'distance'")
    pairs = list(zip(lines["a"], lines["b"], strict=True))
    assert pairs == [(FIVE, ONE), (BETA, ONE), (BETA, FIVE)]
    assert lines["seeds"].tolist()[:2] == ["3", "1"]
    assert lines["expected"].tolist()[:2] == ["3", "3"]
    assert lines["favours"].tolist()[:2] == [ONE, ""]
    assert lines["low"].iloc[1] == ""


def test_a_row_is_favoured_only_if_the_corrected_p_is_below_005(tmp_path):
    """Two differences whose own p is 0.037, and 0.073 after Holm's correction over both."""
    signs = {"beta": (-1, -1, 1, 1), "gamma": (1, -1, 1, -1)}
    runs = [("alpha", seed, 1, 5.0) for seed in range(4)]
    for method, of_seed in signs.items():
        runs += [(method, seed, 1, 6.0 + 0.48 * sign) for seed, sign in enumerate(of_seed)]
    baseline = {"method": "alpha", "fake_score_updates": "1"}
    store = write_store(tmp_path, runs)
    results = load_results(store, tmp_path / "data", baseline=baseline)
    lines = written(results, "differences.csv", tmp_path).query("column == 'distance'")
    lines = lines[lines["b"] == "Alpha"]
    assert all(
        0.025 < float(p) < 0.05 < float(q) for p, q in lines[["p", "p_holm_baseline"]].values
    )
    text = table_files(results)["table.md"].split("Distance ↓: difference to Alpha")[1]
    rows = [line.split(" | ") for line in text.split("\n\n")[1].splitlines()[2:]]
    assert [cells[4] for cells in rows] == ["neither", "neither"]


def test_a_difference_of_clips_has_the_spread_of_its_seeds_and_the_p_of_its_interval(results):
    speed, detail = (c for c in results.columns if c.name in ("speed", "detail"))
    one, five, _ = results.students
    for column in (speed, detail):
        (difference,) = differences(results, column, [(five, one)])
        by_seed = [
            five.by_seed(column.name)[seed].mean() - one.by_seed(column.name)[seed].mean()
            for seed in (0, 1, 2)
        ]
        assert difference.sd == pytest.approx(np.std(by_seed, ddof=1))
    assert detail.better is None and difference.favours is None
    assert difference.p == difference.interval.p


def test_files_of_differences_end_with_the_seeds_that_are_needed_or_with_the_cost(
    results, tmp_path
):
    by_file = {"differences.csv": "seeds_needed", "equal_cost_differences.csv": COST}
    for file, last in by_file.items():
        assert list(written(results, file, tmp_path).columns)[-1] == last


def test_every_p_has_the_number_of_comparisons_that_it_is_corrected_for(tabulated):
    lines = read_texts(tabulated[0] / "differences.csv").query("column in ('detail', 'speed')")
    to_baseline, others = lines[lines["b"] == ONE], lines[lines["b"] != ONE]
    assert set(to_baseline["comparisons_baseline"]) == {"1"}, "beta has one seed and no p"
    assert to_baseline["p_holm_baseline"].tolist() == to_baseline["p"].tolist()
    assert set(zip(others["comparisons"], others["p_holm_baseline"], strict=True)) == {("1", "")}
    page = render_page(load(tabulated[0]), read_sweep("speed", tabulated[1]), tabulated[0])
    for text in ((tabulated[0] / "table.md").read_text(), page):
        assert "p (Holm over 1)" in text
        assert "p_holm and favours are corrected over all pairs of one score, up to 3" in text
        assert "equal_cost_differences.csv has every pair" in text


def test_the_baseline_can_be_named(store, tmp_path):
    assert load_results(store, tmp_path / "default").baseline.label == ONE
    keys = {"method": "alpha", "fake_score_updates": "5"}
    results = load_results(store, tmp_path / "named", baseline=keys)
    assert results.baseline.label == FIVE
    command = results.manifest["provenance"]["command"]
    assert "--baseline method=alpha,fake_score_updates=5" in command


# --- equal cost ---


def test_the_equal_cost_table_is_at_the_largest_common_cost(results):
    """alpha at cadence 1 ends at 2000; cadence 5 is first evaluated at 3000."""
    assert budget(results) == 2000.0
    texts = {row.label: [cell.text for cell in cells] for row, cells in equal_cost(results).lines}
    assert texts[ONE][2:4] == ["3", "20.0"]
    assert texts[FIVE][2:5] == ["0/3 (3 first evaluated at 3,000)", "—", "—"]
    assert texts[BETA][2] == "1/4 (1 collapsed, 1 failed, 1 missing)"


def test_a_run_that_collapsed_early_does_not_lower_the_common_cost(store, tmp_path):
    update_json(next(store.glob("beta-s1-*")) / "result.json", cost_forward_equivalents=10.0)
    results = load_results(store, tmp_path / "early")
    assert results.runs[COST].min() == 10.0 and budget(results) == 2000.0
    alpha, _, beta = results.students
    assert cost_ratio(beta, alpha) == cost_ratio(alpha, beta) == 1.0


def test_a_run_that_failed_is_not_the_first_that_is_evaluated(tmp_path):
    store = write_store(tmp_path, [*RUNS[:6], ("alpha", 3, 5, None, "collapsed")])
    edit_lines(
        next(store.glob("alpha-s3-*")) / "train.jsonl",
        lambda line: line | {COST: line[COST] / 100},
    )
    results = load_results(store, tmp_path / "early")
    texts = {row.label: [cell.text for cell in cells] for row, cells in equal_cost(results).lines}
    assert texts[FIVE][2] == "0/4 (1 collapsed, 3 first evaluated at 3,000)"


def test_a_budget_can_be_requested(store, tmp_path):
    results = load_results(store, tmp_path / "data", budget=1500.0)
    scores = results.students[0].at_cost("distance", budget(results))
    assert list(scores.values()) == pytest.approx([20.0, 22.2, 24.4])
    assert "1,500 forward equivalents, as requested" in table_files(results)["table.md"]


def test_differences_at_equal_cost_are_the_paired_t_test_of_scipy(tmp_path):
    """In pairs with the baseline, the baseline is subtracted."""
    runs = [("alpha", s, c, 10.0 * c + s * s + c * s) for c in (1, 2) for s in range(4)]
    runs += [("beta", s, 1, 9.0 + (2.5 * s) % 2) for s in range(3)]
    store = write_store(tmp_path, runs, baseline={"method": "alpha", "fake_score_updates": 2})
    results = load_results(store, tmp_path / "data")
    cost, baseline = budget(results), results.baseline.label
    lines = written(results, "equal_cost_differences.csv", tmp_path).query("column == 'distance'")
    assert list(zip(lines["a"], lines["b"], strict=True)) == [
        (ONE, baseline),
        (BETA, ONE),
        (BETA, baseline),
    ]
    scores = {row.label: row.at_cost("distance", cost) for row in results.students}
    for line in lines.to_dict("records"):
        a, b = scores[line["a"]], scores[line["b"]]
        common = [seed for seed in a if seed in b]
        expected = ttest_rel([a[seed] for seed in common], [b[seed] for seed in common])
        low, high = expected.confidence_interval(0.95)
        numbers = [float(line[key]) for key in ("p", "low", "high")]
        assert numbers == pytest.approx([expected.pvalue, low, high], rel=1e-4)
        assert int(line["seeds"]) == len(common)
        assert float(line["cost_forward_equivalents"]) == cost
    to_baseline = lines[lines["b"] == baseline].astype({"p": float, "p_holm_baseline": float})
    corrected = 2 * to_baseline["p"].min()
    assert to_baseline["p_holm_baseline"].min() == pytest.approx(corrected, rel=1e-4)
    corrected = 3 * lines["p"].astype(float).min()
    assert lines["p_holm"].astype(float).min() == pytest.approx(corrected, rel=1e-4)


def test_markdown_has_the_differences_at_equal_cost(tmp_path):
    runs = [("alpha", s, c, 10.0 * c + s * s + c * s) for c in (1, 2) for s in range(4)]
    runs += [("beta", s, 1, 9.0 + (2.5 * s) % 2) for s in range(3)]
    store = write_store(tmp_path, runs, baseline={"method": "alpha", "fake_score_updates": 2})
    results = load_results(store, tmp_path / "data")
    beta, baseline = results.students[-1], results.baseline
    pairs = [(beta, baseline)]
    (difference,) = differences(results, results.headline[0], pairs, budget(results))
    text = table_files(results)["table.md"]
    section = text.partition(f"## At equal cost: difference to {baseline.label}")[2]
    cell = show_interval(difference.interval, sign="+")
    assert f"| Beta | 1 | 3 | {cell} |" in section.replace("**", "")
