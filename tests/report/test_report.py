"""Data files, tables and page from a store written by hand."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel
from stores import RUNS, score, write_lines, write_run, write_store

from distill_bench.config.yaml_files import dump_yaml, parse_yaml
from distill_bench.report.__main__ import main
from distill_bench.report.data_files import data_files
from distill_bench.report.read_store import StoreReadError, read_sweep
from distill_bench.report.results import Results, load
from distill_bench.report.stats import Interval
from distill_bench.report.tables.differences import differences
from distill_bench.report.tables.files import table_files
from distill_bench.report.tables.latex import escape_latex
from distill_bench.report.tables.scores import budget, equal_cost, score_table, show_interval
from distill_bench.report.write import report


def results_of(store: Path, folder: Path, **options) -> Results:
    """The data files of the sweep, written and read back."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in data_files(read_sweep("speed", store), **options).items():
        (folder / name).write_text(text)
    return load(folder)


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path, RUNS)


@pytest.fixture
def results(store, tmp_path):
    return results_of(store, tmp_path / "data")


def lines_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


# --- data files ---


def test_every_run_and_reference_is_a_line_of_runs_csv(results, tmp_path):
    lines = lines_of(tmp_path / "data" / "runs.csv")
    assert [line["method"] for line in lines] == ["data", "teacher"] + ["alpha"] * 6 + ["beta"] * 4
    assert [line["status"] for line in lines[-4:]] == ["done", "collapsed", "failed", "missing"]
    assert lines[-2]["reason"] == "ValueError: out of <luck>"
    assert (
        lines[0]["run_id"] == "reference-data"
        and lines[0]["distance"] == "1.0"
        and lines[0]["protocol"] == "p1"
    )
    assert (
        lines[2]["distance"] == "10.0"
        and lines[2]["distance_extractor"] == "net-1"
        and lines[2]["commit"] == "abc123"
    )
    assert {
        "seed",
        "nfe",
        "train_seconds",
        "cost_forward_equivalents",
        "version",
        "fake_score_updates",
    } <= set(lines[0])


def test_scores_at_a_cost_are_interpolated_between_checkpoints(results):
    row = results.students[0]
    points = row.checkpoints[row.checkpoints["run_id"] == row.runs["run_id"].iloc[0]]
    columns = ["student_updates", "cost_forward_equivalents", "distance"]
    assert points[columns].to_numpy().tolist() == [[10, 1000, 30], [20, 2000, 10]]
    assert row.at_cost("distance", 1500.0)[0] == pytest.approx(20.0)
    assert row.at_cost("distance", 900.0) == row.at_cost("distance", 2100.0) == {}


def test_the_mean_over_clips_is_the_score(results):
    row = results.students[0]
    speed = row.by_seed("speed")[1]
    assert len(speed) == 3
    assert speed.mean() == pytest.approx(row.runs["speed"].iloc[1], rel=1e-12)
    assert row.by_seed("distance")[1].tolist() == [11.1], "no value per clip"


@pytest.mark.parametrize("key, value", [("protocol", "p2"), ("version", 2), ("extractor", "net-2")])
def test_unlike_scores_refuse_to_share_a_column(tmp_path, capsys, key, value):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0), ("beta", 0, 1, 2.0)], references=())
    path = next(store.glob("beta-*")) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [line | {key: value} for line in lines])
    with pytest.raises(StoreReadError, match=rf"alpha-s0-.*{key}.*beta-s0-.*{value}"):
        read_sweep("speed", store)
    assert main(["speed", "--store", str(store), "--out", str(tmp_path / "out")]) == 2
    assert "cannot share a column" in capsys.readouterr().err


def test_unlike_protocols_are_named_by_what_differs(tmp_path):
    """By the protocols that lie beside the reference rows; where those are not at hand, by the conditions of the scores."""
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0), ("beta", 0, 1, 2.0)], references=())
    for name, clips, rate in (("alpha", 144, 8.0), ("beta", 256, 16.0)):
        for path in store.glob(f"{name}-*/**/metrics.jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            under = {"conditions": {"clips": clips, "references": {"teacher": name}}}
            write_lines(path, [line | {"protocol": name} | under for line in lines])
        (store / "references" / name).mkdir(parents=True)
        about = {"clips": clips, "fps": rate, "teacher_steps": 32}
        (store / "references" / name / "protocol.json").write_text(json.dumps(about))
    with pytest.raises(
        StoreReadError,
        match=r"column: they differ in clips 144 and 256, fps 8.0 and 16.0; evaluate both alike",
    ):
        read_sweep("speed", store)
    (store / "references" / "beta" / "protocol.json").unlink()
    with pytest.raises(
        StoreReadError, match=r"column: they differ in clips 144 and 256; evaluate both alike"
    ):
        read_sweep("speed", store)


def test_a_score_made_again_replaces_the_older(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0)], references=())
    for path in store.glob("alpha-*/**/metrics.jsonl"):
        path.write_text(
            path.read_text()
            + json.dumps(score("distance", 3.0, version=2, extractor="net-1"))
            + "\n"
        )
    assert results_of(store, tmp_path / "data").runs["distance"].tolist() == [3.0]


def test_an_unknown_sweep_names_the_known_ones(store):
    with pytest.raises(StoreReadError, match="'sped'.*known: speed"):
        read_sweep("sped", store)


def test_a_score_that_is_no_number_is_said(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0), ("alpha", 1, 1, float("nan"))])
    results = results_of(store, tmp_path / "data")
    assert re.search(r"alpha-s1-.*not finite.*: distance", results.manifest["notes"][0])
    assert results.interval(results.students[0], "distance").n == 1


def test_unlike_code_is_said(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0), ("alpha", 1, 1, 2.0)])
    path = next(store.glob("alpha-s1-*")) / "attempts" / "001" / "start.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code_fingerprint": "c2"}))
    results = results_of(store, tmp_path / "data")
    assert results.manifest["notes"] == [
        "alpha ran with 2 versions of its code (c1 in 1 runs, c2 in 1 runs)"
    ]
    assert "2 versions of its code" in table_files(results)["table.md"]


def test_unlike_hardware_is_said(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0), ("beta", 0, 1, 2.0), ("beta", 1, 1, 2.0)])
    for path in store.glob("*/attempts/001/start.json"):
        kind = "Xeon family 6 model 1" if "beta-s1" in str(path) else "Xeon family 6 model 2"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hardware": kind}))
    results = results_of(store, tmp_path / "data")
    (note,) = results.manifest["notes"]
    assert (
        "2 kinds of hardware" in note
        and "model 1 in 1 runs" in note
        and "model 2 in 2 runs" in note
    )
    assert set(results.runs["hardware"]) - {""} == {
        "Xeon family 6 model 1",
        "Xeon family 6 model 2",
    }


# --- rows ---


def test_rows_are_means_over_seeds_and_count_what_was_lost(results):
    assert [row.label for row in results.rows] == [
        "data",
        "teacher",
        "alpha fake_score_updates=1",
        "alpha fake_score_updates=5",
        "beta fake_score_updates=1",
    ]
    alpha, beta = results.students[0], results.students[2]
    assert results.interval(alpha, "distance").mean == pytest.approx(11.1) and alpha.count == "3"
    assert beta.count == "1/4 (1 collapsed, 1 failed, 1 missing)"
    assert results.interval(beta, "distance").n == 1 and not np.isfinite(
        results.interval(beta, "distance").low
    )


def test_a_reference_has_the_interval_of_its_clips(results):
    teacher = results.references[1]
    assert results.interval(teacher, "distance").half == pytest.approx(1.96 * 0.25), (
        "the sd of its resampled clips"
    )
    assert results.interval(teacher, "speed").half > 0


def test_a_key_that_differs_without_being_an_axis_makes_rows_of_its_own(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0), ("alpha", 1, 1, 2.0)])
    path = next(store.glob("alpha-s1-*")) / "run.yaml"
    path.write_text(dump_yaml(parse_yaml(path.read_text()) | {"nfe": 8, "log_every": 3}))
    results = results_of(store, tmp_path / "data")
    assert results.manifest["swept"] == ["fake_score_updates", "nfe"] and len(results.students) == 2


def test_labels_say_what_tells_rows_apart_and_no_more(tmp_path):
    store = tmp_path / "runs"
    for cadence in (1, 5):
        write_run(
            store,
            "alpha",
            0,
            cadence,
            1.0,
            method={"name": "alpha", "kind": "plain"},
            reuse=False,
            lr=1e-4,
        )
        write_run(
            store,
            "alpha",
            0,
            cadence,
            1.0,
            method={"name": "alpha", "kind": "other"},
            reuse=True,
            lr=1e-4,
        )
        write_run(store, "beta", 0, cadence, 1.0, reuse=False, lr=1e-4)
    write_run(store, "beta", 0, 1, 1.0, reuse=False, lr=5e-4)
    ids = sorted(path.name for path in store.iterdir())
    (store / "sweeps").mkdir()
    axes = {"method": [], "fake_score_updates": [1, 5], "method.kind": [], "reuse": [], "lr": []}
    (store / "sweeps" / "speed.json").write_text(
        json.dumps({"question": "?", "run_ids": ids, "axes": axes})
    )
    labels = {row.series for row in results_of(store, tmp_path / "data").students}
    assert labels == {"alpha plain", "alpha other", "beta", "beta lr=0.0005"}


# --- tables ---


def best(results):
    found = score_table(results, results.headline)
    return {row.label for row, line in found.lines if line[3].best}


def test_a_row_is_best_only_where_the_paired_interval_says_so(tmp_path):
    clear = [("alpha", s, 1, 10.0 + s) for s in range(3)] + [
        ("beta", s, 1, 20.0 + 1.1 * s) for s in range(3)
    ]
    assert best(results_of(write_store(tmp_path / "clear", clear), tmp_path / "a")) == {"alpha"}
    lost = clear + [("alpha", 3, 1, None, "collapsed")]
    assert not best(results_of(write_store(tmp_path / "lost", lost), tmp_path / "b")), (
        "the survivors are no sample of all seeds"
    )
    vague = [("alpha", s, 1, 10.0 + 9 * s) for s in range(3)] + [
        ("beta", s, 1, 20.0 - s) for s in range(3)
    ]
    assert not best(results_of(write_store(tmp_path / "vague", vague), tmp_path / "c"))


def test_differences_pair_the_seeds(results):
    column, (one, five, beta) = results.headline[0], results.students
    each, alone = differences(results, column, [(five, one), (beta, one)])
    assert each.seeds == 3 and each.interval.mean == pytest.approx(40.4) and each.favours is one
    assert each.needed == 2, "a difference of a hundred standard deviations"
    assert alone.seeds == 1 and not np.isfinite(alone.p), "one common seed shows nothing"


def test_every_pair_is_in_differences_csv_with_its_seeds(results, tmp_path):
    lines = list(csv.DictReader(table_files(results)["differences.csv"].splitlines()))
    assert [
        (line["column"], line["a"], line["b"]) for line in lines if line["column"] == "distance"
    ] == [
        ("distance", "alpha fake_score_updates=5", "alpha fake_score_updates=1"),
        ("distance", "beta fake_score_updates=1", "alpha fake_score_updates=1"),
        ("distance", "beta fake_score_updates=1", "alpha fake_score_updates=5"),
    ]
    assert [(line["seeds"], line["expected"]) for line in lines[:2]] == [("3", "3"), ("1", "3")]
    assert (
        lines[0]["favours"] == "alpha fake_score_updates=1"
        and lines[1]["favours"] == ""
        and lines[1]["low"] == ""
    )


def test_every_p_says_which_comparisons_it_was_corrected_for(reported):
    folder = reported[0]
    lines = [
        line
        for line in lines_of(folder / "differences.csv")
        if line["column"] == "detail" or line["column"] == "speed"
    ]
    to_baseline = [line for line in lines if line["b"] == "alpha fake_score_updates=1"]
    assert {line["comparisons_baseline"] for line in to_baseline} == {"1"}, (
        "beta has one seed and no p"
    )
    assert all(line["p_holm_baseline"] == line["p"] for line in to_baseline)
    assert {
        (line["comparisons"], line["p_holm_baseline"]) for line in lines if line not in to_baseline
    } == {("1", "")}
    for name in ("table.md", "report.html"):
        text = (folder / name).read_text()
        assert (
            "p (Holm over 1)" in text
            and "p_holm and favours are corrected over all pairs of one score, up to 3" in text
        )
        assert (
            "equal_cost_differences.csv has every pair, with p for these comparisons and for all pairs of one score"
            in text
        )


def test_equal_cost_differences_are_paired_by_seed_at_that_cost(tmp_path):
    """Student's t over the seeds, as scipy's paired test has it; the baseline is subtracted wherever it stands."""
    runs = [("alpha", s, c, 10.0 * c + s * s + c * s) for c in (1, 2) for s in range(4)]
    runs += [("beta", s, 1, 9.0 + (2.5 * s) % 2) for s in range(3)]
    results = results_of(
        write_store(tmp_path, runs, baseline={"method": "alpha", "fake_score_updates": 2}),
        tmp_path / "data",
    )
    files, cost = table_files(results), budget(results)
    lines = [
        line
        for line in csv.DictReader(files["equal_cost_differences.csv"].splitlines())
        if line["column"] == "distance"
    ]
    rows, held = {row.label: row for row in results.students}, results.baseline.label
    assert [(line["a"], line["b"]) for line in lines] == [
        ("alpha fake_score_updates=1", held),
        ("beta fake_score_updates=1", "alpha fake_score_updates=1"),
        ("beta fake_score_updates=1", held),
    ]
    for line in lines:
        mine, theirs = (rows[line[key]].at_cost("distance", cost) for key in ("a", "b"))
        common = [seed for seed in mine if seed in theirs]
        expected = ttest_rel([mine[seed] for seed in common], [theirs[seed] for seed in common])
        low, high = expected.confidence_interval(0.95)
        assert int(line["seeds"]) == len(common) and float(line["cost_forward_equivalents"]) == cost
        assert [float(line[k]) for k in ("p", "low", "high")] == pytest.approx(
            [expected.pvalue, low, high], rel=1e-4
        )
    ps = [float(line["p"]) for line in lines if line["b"] == held]
    adjusted = [float(line["p_holm_baseline"]) for line in lines if line["b"] == held]
    assert min(adjusted) == pytest.approx(2 * min(ps), rel=1e-4), "two rows against the baseline"
    assert min(float(line["p_holm"]) for line in lines) == pytest.approx(
        3 * min(float(line["p"]) for line in lines), rel=1e-4
    )
    pair = (rows["beta fake_score_updates=1"], results.baseline)
    interval = differences(results, results.headline[0], [pair], cost)[0].interval
    shown = files["table.md"].partition(f"## At equal cost: difference to {held}")[2]
    assert f"| beta | 1 | 3 | {show_interval(interval, sign='+')} |" in shown.replace("**", "")


def test_the_baseline_is_the_one_that_was_named(store, tmp_path):
    assert results_of(store, tmp_path / "a").baseline.label == "alpha fake_score_updates=1"
    named = results_of(
        store, tmp_path / "b", baseline={"method": "alpha", "fake_score_updates": "5"}
    )
    assert named.baseline.label == "alpha fake_score_updates=5"
    assert "--baseline method=alpha,fake_score_updates=5" in named.manifest["provenance"]["command"]


def test_an_unknown_baseline_is_an_error_of_one_line(store, tmp_path, capsys):
    assert (
        main(
            [
                "speed",
                "--store",
                str(store),
                "--out",
                str(tmp_path / "out"),
                "--baseline",
                "method=gamma",
            ]
        )
        == 2
    )
    assert "no row is the baseline" in (told := capsys.readouterr().err) and told.count("\n") == 1
    assert (
        main(
            ["speed", "--store", str(store), "--out", str(tmp_path / "out"), "--baseline", "gamma"]
        )
        == 2
    )
    assert "'gamma' is not KEY=VALUE" in capsys.readouterr().err


def test_the_equal_cost_table_is_at_the_largest_common_cost(results):
    """alpha at cadence 1 ends at 2000; cadence 5 is first evaluated at 3000."""
    assert budget(results) == 2000.0
    found = {row.label: [cell.text for cell in line] for row, line in equal_cost(results).lines}
    assert found["alpha fake_score_updates=1"][2:4] == ["3", "20.0"]
    assert found["alpha fake_score_updates=5"][2:5] == [
        "0/3 (3 first evaluated at 3,000)",
        "—",
        "—",
    ]
    assert found["beta fake_score_updates=1"][2] == "1/4 (1 collapsed, 1 failed, 1 missing)"


def test_a_budget_can_be_asked_for(store, tmp_path):
    results = results_of(store, tmp_path / "data", budget=1500.0)
    assert list(results.students[0].at_cost("distance", budget(results)).values()) == pytest.approx(
        [20.0, 22.2, 24.4]
    )
    assert "1,500 forward equivalents, as requested" in table_files(results)["table.md"]


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
def test_numbers_show_as_many_digits_as_their_interval_carries(interval, text):
    assert show_interval(interval) == text


def test_the_tables_agree(reported):
    folder = reported[0]
    markdown = (folder / "table.md").read_text().split("## ")[1].splitlines()
    markdown = [line for line in markdown if line.startswith("|")]
    lines = lines_of(folder / "table.csv")
    assert len(markdown) == 2 + len(lines) == 7
    assert len({line.count("|") for line in markdown}) == 1
    assert float(lines[2]["distance_mean"]) == pytest.approx(11.1) and lines[2]["distance_n"] == "3"
    assert (lines[4]["done"], lines[4]["expected"], lines[4]["collapsed"]) == ("1", "4", "1")
    for name in ("table.tex", "equal_cost.tex"):
        latex = (folder / name).read_text()
        for part in latex.split("\\begin{tabular}")[1:]:
            columns, body = (
                re.match(r"\{(\w+)\}", part)[1],
                part[part.index("\\toprule") : part.index("\\bottomrule")],
            )
            for line in body.splitlines():
                if line.endswith("\\\\") and not line.endswith("\\shortstack"):
                    assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1, line
        assert (
            "fake\\_score\\_\\\\updates" in latex
            and "command: python -m distill_bench.report" in latex
        )


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex")
def test_the_tex_compiles(reported, tmp_path):
    for name in ("table.tex", "equal_cost.tex"):
        shutil.copy(reported[0] / name, tmp_path)
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\input{table}\\input{equal_cost}\\end{document}"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout, "wider than the text of article"


def test_the_caption_has_no_hashes_and_the_table_is_not_shrunk(tmp_path):
    store = write_store(
        tmp_path, [(f"alpha{m}", s, c, 1.0 + s) for m in range(5) for c in range(5) for s in (0, 1)]
    )
    path = next(store.glob("alpha0-s1-*")) / "attempts" / "001" / "start.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code_fingerprint": "c2"}))
    latex = table_files(results_of(store, tmp_path / "data"))["table.tex"]
    assert (
        all(line.startswith("%") for line in latex.splitlines() if "c2" in line) and "c2" in latex
    )
    assert "resizebox" not in latex and latex.startswith("% needs \\usepackage{booktabs}\n")
    parts = re.findall(r"\\begin\{tabular\}\{(\w+)\}", latex)
    assert len(parts) > 1 and all(columns.startswith("ll") for columns in parts), (
        "every part names its rows"
    )
    assert latex.count("\\begin{table}") == len(parts), "too many lines for one float"


def test_tex_escapes_what_latex_reads():
    assert escape_latex("50% of a_b & #1 ± 2") == r"50\% of a\_b \& \#1 $\pm$ 2"


def test_warnings_are_footnotes(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0), ("beta", 0, 1, 2.0)])
    path = next(store.glob("beta-*")) / "metrics.jsonl"
    first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [first | {"warnings": ["too few clips to trust"]}, *rest])
    files = table_files(results_of(store, tmp_path / "data"))
    assert "| 2.00 [1] |" in files["table.md"] and "2.00$^{1}$" in files["table.tex"]


def test_a_row_that_differs_in_more_than_its_method_says_so(tmp_path):
    """Nothing tells beta's only row apart but its name, yet it is no comparison of alpha and beta alone."""
    store = write_store(tmp_path, [])
    cells = [("alpha", 0, 1, 4.0, False), ("alpha", 0, 5, 3.0, False), ("beta", 0, 1, 5.0, True)]
    ids = [write_run(store, *cell, "done", reuse_rollout=reuse) for *cell, reuse in cells]
    path = store / "sweeps" / "speed.json"
    axes = {
        "method": ["alpha", "beta"],
        "fake_score_updates": [1, 5],
        "reuse_rollout": [False, True],
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_ids": ids, "axes": axes}))
    labels = [row.label for row in results_of(store, tmp_path / "data").students]
    assert labels == [
        "alpha fake_score_updates=1",
        "alpha fake_score_updates=5",
        "beta reuse_rollout fake_score_updates=1",
    ]


@pytest.mark.parametrize(
    "called", ["wan2.1_1.3b", "sweeps/wan2.1_1.3b.yaml", "runs/sweeps/wan2.1_1.3b.json"]
)
def test_a_sweep_may_have_dots_in_its_name(called, store, tmp_path):
    (store / "sweeps" / "speed.json").rename(store / "sweeps" / "wan2.1_1.3b.json")
    found = read_sweep(called, store)
    assert found.name == "wan2.1_1.3b" and len(found.runs) == len(RUNS)


@pytest.mark.slow
def test_a_second_report_has_the_same_bytes(reported, tmp_path):
    folder, store = reported
    again = report("speed", store, tmp_path / "results").parent
    first, second = (
        {p.name: p.read_bytes() for p in each.rglob("*") if p.is_file()} for each in (folder, again)
    )
    assert first == second and len(first) > 20


def test_no_reader_imports_torch():
    names = ["write", "figures.command", "compare", "verify"]
    code = f"import sys, {', '.join(f'distill_bench.report.{name}' for name in names)}; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


# --- what is not there ---


def test_a_run_whose_folder_is_gone_is_missing_in_its_own_row(tmp_path):
    runs = [("alpha", seed, cadence, 1.0) for seed in range(3) for cadence in (1, 5)]
    store = write_store(tmp_path, runs)
    path = store / "sweeps" / "speed.json"
    about = json.loads(path.read_text())
    cadences = {
        run: parse_yaml((store / run / "run.yaml").read_text())["fake_score_updates"]
        for run in about["run_ids"]
    }
    path.write_text(
        json.dumps(about | {"groups": {run: f"at {cadence}" for run, cadence in cadences.items()}})
    )
    gone = next(
        run for run in about["run_ids"] if run.startswith("alpha-s1-") and cadences[run] == 5
    )
    shutil.rmtree(store / gone)
    rows = results_of(store, tmp_path / "data").students
    assert [(row.at, row.count) for row in rows] == [("1", "3"), ("5", "2/3 (1 missing)")]


def test_a_mean_over_fewer_seeds_than_its_row_says_so(tmp_path):
    store = write_store(tmp_path, [("alpha", seed, 1, 1.0 + seed / 10) for seed in range(3)])
    path = next(store.glob("alpha-s1-*")) / "metrics.jsonl"
    write_lines(
        path, [line for line in map(json.loads, path.open()) if line["column"] != "distance"]
    )
    results = results_of(store, tmp_path / "data")
    assert (
        "(2 of 3 seeds)" in (text := table_files(results)["table.md"])
        and text.count("of 3 seeds)") == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            ["--baseline", "method=nosuch"],
            "no row is the baseline.*method=alpha,fake_score_updates=5",
        ),
        (
            ["--baseline", "method=alpha"],
            "fits 2 rows: method=alpha,fake_score_updates=1; method=alpha,fake_score_updates=5",
        ),
        (["--budget", "nan"], "budget nan: a cost"),
        (["--budget", "-1"], "budget -1: a cost"),
    ],
)
def test_what_cannot_be_asked_leaves_the_results_as_they_are(store, tmp_path, asked, said, capsys):
    out = tmp_path / "out"
    report("speed", store, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(["speed", "--store", str(store), "--out", str(out), *asked]) == 2
    told = capsys.readouterr().err
    assert re.search(said, told) and told.count("\n") == 1
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_damaged_run_and_a_place_that_cannot_be_written_are_one_line(store, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["speed", "--store", str(store), "--out", str(tmp_path / "file")]) == 2
    assert "cannot write" in (said := capsys.readouterr().err) and said.count("\n") == 1
    path = next(store.glob("alpha-s0-*")) / "run.yaml"
    path.write_text("{")
    assert main(["speed", "--store", str(store), "--out", str(tmp_path / "out")]) == 2
    assert f"{path} is damaged" in (said := capsys.readouterr().err) and said.count("\n") == 1
