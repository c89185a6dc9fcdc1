"""Declared contrasts, recomputed with scipy and statsmodels, and in tables, page and terminal."""

import dataclasses
import io
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from stores import load_results, update_json, write_results, write_store

from distill_bench.report.declarations import ADDED, CHANGED, FIRST, UNKNOWN
from distill_bench.report.page import html, sentences
from distill_bench.report.page.html import render_page
from distill_bench.report.page.sentences import findings
from distill_bench.report.read_store import StoreReadError, read_sweep
from distill_bench.report.results import Column, load
from distill_bench.report.rows import COST
from distill_bench.report.stats import Interval
from distill_bench.report.tables.contrasts import (
    contrast_cells,
    contrast_heads,
    contrast_lines,
    contrasts_caption,
    estimates,
    sides,
)
from distill_bench.report.tables.files import table_files
from distill_bench.report.tables.latex import escape_latex
from distill_bench.store.launches import read_launches, record_launch

SCORES = [
    Column("d", "Distance", "", "lower", True),
    Column("u", "Use", "", "higher", True),  # has one value per clip
]
PROMPTS = np.repeat(np.arange(8), 2)
ROWS = [(method, stepping) for method in ("sgmd", "dmd2") for stepping in ("ode", "renoise")]
LEVELS = dict(zip(ROWS, (10.0, 12.0, 10.5, 11.0), strict=True))
SIGNS = {  # contrast -> row -> weight
    "pair": {ROWS[0]: 1.0, ROWS[1]: -1.0},
    "average": {ROWS[0]: 0.5, ROWS[2]: 0.5, ROWS[1]: -0.5, ROWS[3]: -0.5},
    "interaction": {ROWS[0]: 1.0, ROWS[1]: -1.0, ROWS[2]: -1.0, ROWS[3]: 1.0},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Results of a 2 x 2 study with six seeds, and the scores that were made up for it."""
    folder = tmp_path_factory.mktemp("made")
    generator = np.random.default_rng(4)
    shared, prompts = generator.normal(size=6), generator.normal(size=8)
    runs, clips, scores = [], [], {}
    checkpoints = []
    for row, level in LEVELS.items():
        for seed in generator.permutation(6):
            values = 30 - level + shared[seed] + prompts[PROMPTS] + generator.normal(size=16)
            values = np.array([float(f"{value:.4g}") for value in values])
            distance = level + shared[seed] + 0.4 * generator.normal()
            run_id = f"{row[0]}-{row[1]}-{seed}"
            line = {"run_id": run_id, "method": row[0], "stepping": row[1], "seed": seed}
            if row == ROWS[3] and seed == 5:
                runs.append(line | {"status": "failed"})
                continue
            scores[row, seed] = {"d": distance, "u": values}
            cost = 100.0 + LEVELS[row]
            runs.append(line | {"d": distance, "u": values.mean(), COST: cost})
            for updates in (10, 20):
                point = {"run_id": run_id, "student_updates": updates, COST: cost * updates / 20}
                checkpoints.append(point | {"d": distance * 20 / updates, "u": values.mean()})
            clips.append((run_id, "u", " ".join(f"{value:.4g}" for value in values)))
    training = [{"run_id": run["run_id"], "student_updates": 1} for run in runs]
    write_results(folder, SCORES, ["stepping"], None, runs, checkpoints, training)
    frame = pd.DataFrame(clips, columns=["run_id", "column", "values"])
    frame.to_csv(folder / "clips.csv", index=False)
    contrasts = [entry(name, weights, ["d", "u"]) for name, weights in SIGNS.items()]
    contrasts.append(entry("late", SIGNS["pair"], ["d"], declared=ADDED))
    contrasts.append(entry("at cost", SIGNS["pair"], ["d"], at="equal_cost"))
    update_json(folder / "sweep.json", prompts=PROMPTS.tolist(), contrasts=contrasts, launch=None)
    return load(folder), scores


def entry(name, weights, columns, declared=FIRST, at="end"):
    terms = [
        {"weight": weight, "runs": [f"{row[0]}-{row[1]}-{seed}" for seed in range(6)]}
        for row, weight in weights.items()
    ]
    options = {"scores": columns, "declared": declared, "since": "", "at": at}
    return {"name": name, "terms": terms, "difference_of": None} | options


def by_seed(scores, weights, column):
    """Contrast of each seed that all rows have, summed by hand."""
    seeds = [seed for seed in range(6) if all((row, seed) in scores for row in weights)]
    return [sum(w * scores[row, seed][column] for row, w in weights.items()) for seed in seeds]


def found_by_name(results):
    return {(one.contrast["name"], one.column.name): one for one in estimates(results)}


@pytest.mark.parametrize("name", SIGNS)
def test_a_contrast_is_a_t_test_over_the_seeds_that_all_rows_have(made, name):
    results, scores = made
    estimate = found_by_name(results)[name, "d"]
    values = by_seed(scores, SIGNS[name], "d")
    expected = stats.ttest_1samp(values, 0)
    low, high = expected.confidence_interval(0.95)
    assert len(values) == (6 if name == "pair" else 5) == estimate.seeds
    assert estimate.interval.mean == pytest.approx(np.mean(values))
    assert (estimate.interval.low, estimate.interval.high) == pytest.approx((low, high))
    assert estimate.p == pytest.approx(expected.pvalue)
    assert estimate.sd == pytest.approx(np.std(values, ddof=1)) and estimate.clip_error == 0


@pytest.mark.parametrize("name", SIGNS)
def test_a_score_per_clip_is_resampled_over_seeds_and_prompts(made, name):
    results, scores = made
    estimate = found_by_name(results)[name, "u"]
    values = np.array(by_seed(scores, SIGNS[name], "u"))
    prompts = values.reshape(len(values), 8, 2).mean((0, 2))
    parts = [values.mean(1).var(ddof=1) / len(values), prompts.var(ddof=1) / 8]
    dof = sum(parts) ** 2 / (parts[0] ** 2 / (len(values) - 1) + parts[1] ** 2 / 7)
    half = stats.t.ppf(0.975, dof) * sum(parts) ** 0.5
    assert estimate.interval.mean == pytest.approx(values.mean(), rel=1e-6)
    assert estimate.interval.half == pytest.approx(half, rel=0.06)
    assert estimate.clip_error == pytest.approx(parts[1] ** 0.5, rel=0.25)


def test_a_contrast_at_equal_cost_interpolates_at_the_cost_that_its_runs_reach(made):
    results, scores = made
    cost = 110.0  # of the cheaper row
    at_cost = {
        (row, seed): {"d": np.interp(cost, [c / 2, c], [2 * s["d"], s["d"]])}
        for (row, seed), s in scores.items()
        if (c := 100.0 + LEVELS[row])
    }
    expected = np.mean(by_seed(at_cost, SIGNS["pair"], "d"))
    assert found_by_name(results)["at cost", "d"].interval.mean == pytest.approx(expected)


def test_holm_is_over_the_contrasts_declared_before_and_over_all_for_later_ones(made):
    found = estimates(made[0])
    first = [one for one in found if one.contrast["declared"] == FIRST]
    expected = multipletests([one.p for one in first], method="holm")[1]
    assert [one.p_holm for one in first] == pytest.approx(expected.tolist())
    assert {one.comparisons for one in first} == {7}
    (late,) = [one for one in found if one.contrast["declared"] == ADDED]
    everything = multipletests([one.p for one in found], method="holm")[1]
    assert late.p_holm == pytest.approx(everything[found.index(late)]) and late.comparisons == 8


def test_a_contrast_at_equal_cost_says_so_once(made):
    results, _ = made
    at_cost = next(one for one in estimates(results) if one.contrast["at"] == "equal_cost")
    for name, shown in (("theirs", "theirs (at equal cost)"), ("at equal cost", "at equal cost")):
        renamed = dataclasses.replace(at_cost, contrast=at_cost.contrast | {"name": name})
        assert contrast_cells(renamed)[0].text == shown


def test_the_files_have_the_estimates_and_mark_what_came_later(made, tmp_path):
    results, _ = made
    files = table_files(results)
    (tmp_path / "contrasts.csv").write_text(files["contrasts.csv"])
    table = pd.read_csv(tmp_path / "contrasts.csv")
    for one, line in zip(estimates(results), table.to_dict("records"), strict=True):
        assert (line["contrast"], line["column"]) == (one.contrast["name"], one.column.name)
        numbers = [line[key] for key in ("difference", "low", "high", "p", "p_holm")]
        interval = one.interval
        expected = [interval.mean, interval.low, interval.high, one.p, one.p_holm]
        assert numbers == pytest.approx(expected, rel=1e-5)
        assert (line["seeds"], line["expected"]) == (one.seeds, 6)
    assert table["rows"].iloc[0] == "SGMD, ODE − SGMD, renoise"
    sections = files["table.md"].split("## ")
    assert sections[1].startswith("Declared contrasts"), "before every other table"
    assert "| 5/6 |" in sections[1] and "| added later |" in sections[1]
    grid = [line for line in sections[1].splitlines() if line.startswith("|")]
    assert len(grid) == 2 + len(results.contrasts), "one line per contrast"
    shown = [cell.text for one in estimates(results) for cell in contrast_cells(one)[3:4]]
    assert all(any(text in line for line in grid) for text in shown)
    assert files["contrasts.tex"].count("5/6") == len(table[table["seeds"] == 5])
    names = [line.split(" & ")[0] for line in files["contrasts.tex"].splitlines() if " & " in line]
    expected = [one["name"] for one in results.contrasts]
    assert [name for name in names[1:] if name] == [*expected[:-1], "at cost (at equal cost)"]
    assert [s for s in sections[2:] if "difference to" in s.splitlines()[0]]
    for section in sections[2:]:
        head = section.splitlines()[0]
        assert head.startswith("Exploratory: ") == ("difference to" in head)
    assert r"\begin{tabular}{llrrrl}" in files["contrasts.tex"]


# --- a store ---

PAIR = {"of": {"fake_score_updates": 5}, "minus": {"fake_score_updates": 1}, "scores": ["distance"]}
RUNS = [
    ("alpha", seed, cadence, cadence + 0.1 * seed**2) for cadence in (1, 5) for seed in range(3)
]


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path, RUNS, contrasts={"cadence": PAIR})


def reported(store, folder):
    results = load_results(store, folder)
    return results, render_page(results, read_sweep("speed", store), folder)


def test_the_page_shows_declared_contrasts_first_and_the_rest_as_exploratory(store, tmp_path):
    record_launch(store, "speed", "ab" * 32, {"cadence": PAIR}, 0)
    results, page = reported(store, tmp_path / "data")
    assert sides(results, results.contrasts[0]) == "Alpha, K=5 − Alpha, K=1"
    assert page.index('<h2 id="contrasts">') < page.index('<h2 id="scores">')
    assert "Exploratory: paired differences" in page and "SHA-256 abababababab." in page
    assert findings(results)[0].startswith("0 of 1 declared comparisons are clear") or findings(
        results
    )[0].startswith("1 of 1 declared comparisons are clear of 0")


@pytest.mark.parametrize("clear", [True, False])
def test_the_page_draws_each_interval_around_zero_and_marks_it_if_clear(
    clear, monkeypatch, store, tmp_path
):
    results, _ = reported(store, tmp_path / "data")
    interval = Interval(mean=0.5, low=-0.25, high=1.0, n=3, error=0.3, dof=2)
    one = replace(estimates(results)[0], interval=interval, p_holm=0.001 if clear else 0.5)
    monkeypatch.setattr(html, "estimates", lambda _: [one])
    page = reported(store, tmp_path / "page")[1]
    (line,) = (line for line in page.splitlines() if 'title="p 0.' in line)
    assert ("<b>+0.50 ± 0.62</b>" in line) == ('class="track sure"' in line) == clear
    assert 'title="p 0.001"' in line if clear else 'title="p 0.50"' in line
    assert "left:37.5%;width:62.5%" in line and "left:75.0%" in line


def test_many_clear_contrasts_are_counted_and_few_are_named(monkeypatch, store, tmp_path):
    results, _ = reported(store, tmp_path / "data")
    one = estimates(results)[0]
    for count, named in ((5, True), (6, False)):
        clear = [replace(one, p_holm=0.001)] * count
        monkeypatch.setattr(sentences, "estimates", lambda _, clear=clear: clear)
        first = findings(results)[0]
        assert first.startswith(f"{count} of {count} declared comparisons are clear of 0")
        assert ("cadence in" in first) is named


def test_without_contrasts_nothing_is_exploratory_or_declared(tmp_path):
    results, page = reported(write_store(tmp_path, RUNS), tmp_path / "data")
    assert "xploratory" not in page and "contrasts" not in page
    assert not {"contrasts.csv", "contrasts.tex"} & set(table_files(results))


def declared(store, folder) -> str:
    (contrast,) = load_results(store, folder).contrasts
    return contrast["declared"]


def test_a_contrast_is_marked_by_the_record_of_the_first_launch(store, tmp_path):
    results = load_results(store, tmp_path / "none")
    assert results.contrasts[0]["declared"] == UNKNOWN
    assert "it is unknown when these contrasts were declared" in contrasts_caption(results)
    record_launch(store, "speed", "a" * 64, {"cadence": PAIR}, 0)
    assert declared(store, tmp_path / "first") == FIRST
    record_launch(store, "speed", "b" * 64, {"cadence": PAIR, "other": PAIR}, 4)
    assert declared(store, tmp_path / "again") == FIRST, "a later launch changes nothing"
    caption = contrasts_caption(load_results(store, tmp_path / "dropped"))
    assert "no longer in the file: other." in caption and "newest launch: bbbbbbbbbbbb" in caption


def test_a_contrast_of_a_later_launch_is_added_or_changed(store, tmp_path):
    other = PAIR | {"scores": ["speed"]}
    record_launch(store, "speed", "a" * 64, {"cadence": other}, 0)
    assert declared(store, tmp_path / "edited") == CHANGED, "even before it is launched again"
    for path in (store / "sweeps" / "speed").iterdir():
        path.unlink()
    record_launch(store, "speed", "a" * 64, {}, 0)
    assert declared(store, tmp_path / "added") == ADDED


def test_runs_of_before_the_first_record_make_the_declaration_unknown(store, tmp_path):
    record_launch(store, "speed", "a" * 64, {"cadence": PAIR}, 2)
    assert declared(store, tmp_path / "data") == UNKNOWN
    caption = contrasts_caption(load_results(store, tmp_path / "data"))
    assert "2 of its runs had begun before: it is unknown" in caption


def test_an_interaction_changes_with_the_contrasts_that_it_refers_to(store, tmp_path):
    back = {"of": PAIR["minus"], "minus": PAIR["of"], "scores": ["distance"]}
    both = {"difference_of": ["cadence", "back"], "scores": ["distance"]}
    now = {"cadence": PAIR, "back": back, "both": both}
    update_json(store / "sweeps" / "speed.json", contrasts=now)
    record_launch(store, "speed", "a" * 64, now | {"back": back | {"scores": ["speed"]}}, 0)
    marks = {c["name"]: c["declared"] for c in load_results(store, tmp_path / "data").contrasts}
    assert marks == {"cadence": FIRST, "back": CHANGED, "both": CHANGED}


def test_records_of_two_stores_are_merged_by_copying(tmp_path):
    stores = [tmp_path / "a", tmp_path / "b"]
    for i, path in enumerate(stores):
        assert record_launch(path, "speed", f"{i}" * 64, {"cadence": PAIR}, i)
        assert not record_launch(path, "speed", f"{i}" * 64, {}, 9), "the same file"
    (record,) = (stores[1] / "sweeps" / "speed").iterdir()
    update_json(record, time="2020-01-01T00:00:00Z")
    record.rename(stores[0] / "sweeps" / "speed" / record.name)
    assert [record["digest"][0] for record in read_launches(stores[0], "speed")] == ["1", "0"]


def test_a_contrast_that_does_not_fit_the_store_is_one_line(store, tmp_path):
    update_json(
        store / "sweeps" / "speed.json", contrasts={"cadence": PAIR | {"minus": {"nfe": 3}}}
    )
    with pytest.raises(StoreReadError, match=r"contrasts.cadence: minus \{'nfe': 3\} selects no"):
        load_results(store, tmp_path / "data")


def test_sweep_json_states_rows_and_weights(store, tmp_path):
    (contrast,) = load_results(store, tmp_path / "data").contrasts
    weights = {term["weight"]: len(term["runs"]) for term in contrast["terms"]}
    assert weights == {1.0: 3, -1.0: 3}
    assert json.loads((tmp_path / "data" / "sweep.json").read_text())["launch"] is None


def test_the_files_have_every_contrast_and_what_it_rests_on(made):
    results, _ = made
    dated = [{**one, "since": f"2026-01-0{i}"} for i, one in enumerate(results.contrasts, 1)]
    texts = {"question": "Does it help?", "contrasts": dated}
    results = replace(results, manifest=results.manifest | texts)
    found, files = estimates(results), table_files(results)
    frame = pd.read_csv(io.StringIO(files["contrasts.csv"]), keep_default_na=False)
    assert len(frame) == len(found)
    for (_, line), one in zip(frame.iterrows(), found, strict=True):
        stated = {key: one.contrast[key] for key in ("at", "declared", "since")}
        assert stated == {key: line[key] for key in stated}
        assert (line["contrast"], line["column"]) == (one.contrast["name"], one.column.name)
        assert int(line["comparisons"]) == one.comparisons
        assert float(line["sd"]) == pytest.approx(one.sd, rel=1e-5)
    text = files["table.md"]
    assert text.startswith("Does it help?\n\n## Declared contrasts\n\n| contrast | ")
    listed = [line for line in text.splitlines() if line.startswith("- ")]
    names = [contrast["name"] for contrast in results.contrasts]
    assert [line[2:].partition(": ")[0] for line in listed] == names
    origin = ", ".join(f"{key} {value}" for key, value in results.manifest["provenance"].items())
    assert text.endswith(f"\n\nFrom {origin}.\n")
    for section in text.split("\n\n"):
        if section.startswith("| "):
            heads, rule, *_ = section.splitlines()
            assert rule == "|" + " --- |" * heads.replace("\\|", "").count(" |")


def test_the_float_in_latex_has_the_lines_of_the_contrasts(made):
    """It opens as the other floats do; a column with numbers is set to the right."""
    results, _ = made
    texts = {"name": "a b_c", "question": "Does 5% help?"}
    results = replace(results, manifest=results.manifest | texts)
    found, files = estimates(results), table_files(results)
    latex = files["contrasts.tex"]
    opening = files["table.tex"].partition("\\begin{table}")[2].partition("\\caption")[0]
    before, _, after = latex.partition("\\begin{table}")
    assert before == "% needs \\usepackage{booktabs}\n" and after.startswith(opening)
    caption = escape_latex(f"Does 5% help? {contrasts_caption(results)}")
    head, _, body = after.removeprefix(opening).partition("\\begin{tabular}")
    label = "\\label{tab:a-b-c-contrasts}"
    assert head.splitlines() == [f"\\caption{{{caption}}}", label, "\\smallskip"]
    columns, top, heads, middle, *lines, bottom, last, end = body.splitlines()
    assert [top, middle, bottom] == ["\\toprule", "\\midrule", "\\bottomrule"]
    assert (last, end) == ("\\end{tabular}", "\\end{table}") and latex.endswith("\n")
    words = [re.sub(r"\\shortstack|[{}]", "", cell) for cell in cells(heads)]
    assert [re.sub(r"\\\\", " ", word) for word in words] == contrast_heads(found)
    for line, expected in zip(lines, contrast_lines(found), strict=True):
        texts = [cell.replace("\\,", " ") for cell in cells(line)]
        bold = ["\\textbf" in text for text in texts]
        plain = [re.sub(r"\\textbf\{(.*)\}", r"\1", text) for text in texts]
        assert plain == [escape_latex(cell.text) for cell in expected]
        assert bold == [cell.best for cell in expected]
    numbers = [any(c.isdigit() for line in lines for c in cells(line)[i]) for i in range(6)]
    assert columns == "{" + "".join("r" if is_number else "l" for is_number in numbers) + "}"


def cells(line):
    assert line.endswith(" \\\\")
    return line.removesuffix(" \\\\").split(" & ")
