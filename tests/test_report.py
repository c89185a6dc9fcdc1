"""Tables and page from store folders written file by file, as the stages of a sweep leave them."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import yaml

from distill_bench.report import ReportError, aggregate, collect, main, report, show_interval, tex
from distill_bench.stats import Interval

PROMPTS = ["a red circle moves left", "a blue square moves up & 10% right"]


def score(column, value, **other):
    line = {"metric": column, "column": column, "value": value, "per_clip": None, "sd": None, "n": 2, "version": 1}
    line |= {
        "extractor": None,
        "protocol": "p1",
        "unit": "",
        "better": "lower",
        "title": column.title(),
        "headline": True,
    }
    return line | other


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_clips(folder, shade):
    folder.mkdir(parents=True, exist_ok=True)
    np.save(
        folder / "clips.npy",
        np.full((2, 4, 3, 8, 8), shade, np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None],
    )
    write_lines(folder / "manifest.jsonl", [{"index": i, "prompt": p, "seed": 7 + i} for i, p in enumerate(PROMPTS)])


def write_run(store, method, seed, cadence, distance, status="done"):
    """A run's folder; status None: it failed, "missing": it never started."""
    run_id = f"{method}-s{seed}-{crc32(f'{method}{cadence}'.encode()):012x}"
    folder = store / run_id
    folder.mkdir(parents=True)
    config = {"method": {"name": method, "weight": 1.0}, "seed": seed, "fake_score_updates": cadence, "nfe": 4}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    if status == "missing":
        return run_id
    attempt = folder / "attempts" / "001"
    attempt.mkdir(parents=True)
    (attempt / "start.json").write_text(json.dumps({"commit": "abc123", "host": "node1"}))
    if status is None:
        (attempt / "exit.json").write_text(json.dumps({"status": "error", "error": "Traceback\nValueError: out of <luck>"}))
        return run_id
    cost = 1000.0 * (1 + cadence)
    result = {"run_id": run_id, "method": method, "seed": seed, "status": status, "student_updates": 20}
    result |= {"fake_score_updates": cadence, "nfe": 4, "train_seconds": 10.0 + seed, "cost_forward_equivalents": cost}
    result |= {"peak_memory_gib": 0.5, "protocol": "p1", "version": "0.1.0", "code_fingerprint": "c1"}
    (folder / "result.json").write_text(json.dumps(result))
    lines = [{"student_updates": u, "student_loss": 9.0 / u, "seconds": u} for u in (1, 10, 20)]
    write_lines(folder / "train.jsonl", lines)
    if status == "done":
        detail = score("detail", 0.5 + seed / 10, better=None, headline=False)
        write_lines(folder / "metrics.jsonl", [score("distance", distance, extractor="net-1"), detail])
        write_clips(folder / "samples" / "20", 40 * cadence)
    return run_id


def write_store(tmp_path, runs, references=("data", "teacher")):
    """A store with a sweep called `speed`; `runs` are the arguments of write_run."""
    store = tmp_path / "runs"
    ids = [write_run(store, *run) for run in runs]
    kinds = {}
    for i, kind in enumerate(references):
        write_clips(store / "references" / kind, 200)
        write_lines(store / "references" / kind / "metrics.jsonl", [score("distance", 1.0 + i, extractor="net-1")])
        (store / "references" / kind / "row.json").write_text(json.dumps({"kind": kind, "protocol": "p1"}))
        kinds[kind] = f"references/{kind}"
    (store / "sweeps").mkdir()
    manifest = {"name": "speed", "question": "Does a faster fake_score pay?", "run_ids": ids, "references": kinds}
    manifest["axes"] = {"method": ["alpha", "beta"], "fake_score_updates": [1, 5], "seed": [0, 1, 2]}
    (store / "sweeps" / "speed.json").write_text(json.dumps(manifest))
    return store


@pytest.fixture
def store(tmp_path):
    runs = [("alpha", s, c, 10.0 * c + s + 0.1 * c * s) for c in (1, 5) for s in (0, 1, 2)]
    runs += [
        ("beta", 0, 1, 4.0),
        ("beta", 1, 1, None, "collapsed"),
        ("beta", 2, 1, None, None),
        ("beta", 3, 1, None, "missing"),
    ]
    return write_store(tmp_path, runs)


def test_every_run_and_reference_is_a_line_of_runs_csv(store, tmp_path):
    page = report("sweeps/speed.yaml", store, tmp_path / "results")
    lines = list(csv.DictReader((page.parent / "runs.csv").open()))
    assert [line["method"] for line in lines] == ["data", "teacher"] + ["alpha"] * 6 + ["beta"] * 4
    assert [line["status"] for line in lines[-4:]] == ["done", "collapsed", "failed", "missing"]
    assert lines[-2]["reason"] == "ValueError: out of <luck>"
    assert lines[0]["run_id"] == "reference-data" and lines[0]["distance"] == "1.0" and lines[0]["protocol"] == "p1"
    assert lines[2]["distance"] == "10.0" and lines[2]["distance_extractor"] == "net-1"
    assert {
        "run_id",
        "seed",
        "nfe",
        "train_seconds",
        "cost_forward_equivalents",
        "version",
        "fake_score_updates",
    } <= set(lines[0])


def test_rows_are_means_over_seeds_and_count_what_was_lost(store):
    rows = aggregate(collect("speed", store))
    assert [row.label for row in rows] == [
        "data", "teacher", "alpha fake_score_updates=1", "alpha fake_score_updates=5", "beta fake_score_updates=1",
    ]  # fmt: skip
    assert rows[2].intervals["distance"].mean == pytest.approx(11.1) and rows[2].count == "3"
    assert rows[4].count == "1/4 (1 collapsed, 1 failed, 1 missing)"
    assert rows[4].intervals["distance"].n == 1


def test_a_row_is_best_only_where_the_paired_interval_says_so(tmp_path):
    clear = [("alpha", s, 1, 10.0 + s) for s in range(3)] + [("beta", s, 1, 20.0 + 1.1 * s) for s in range(3)]
    rows = aggregate(collect("speed", write_store(tmp_path / "clear", clear)))
    assert [row.best for row in rows] == [set(), set(), {"distance"}, set()]
    lost = clear + [("alpha", 3, 1, None, "collapsed")]
    rows = aggregate(collect("speed", write_store(tmp_path / "lost", lost)))
    assert not any(row.best for row in rows), "the seeds that survived are no sample of all seeds"
    vague = [("alpha", s, 1, 10.0 + 9 * s) for s in range(3)] + [("beta", s, 1, 20.0 - s) for s in range(3)]
    assert not any(row.best for row in aggregate(collect("speed", write_store(tmp_path / "vague", vague))))


@pytest.mark.parametrize("key, value", [("protocol", "p2"), ("version", 2), ("extractor", "net-2")])
def test_unlike_scores_refuse_to_share_a_column(tmp_path, capsys, key, value):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0), ("beta", 0, 1, 2.0)], references=())
    path = next(store.glob("beta-*")) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [line | {key: value} for line in lines])
    with pytest.raises(ReportError, match=rf"alpha-s0-.*{key}.*beta-s0-.*{value}"):
        collect("speed", store)
    assert main(["speed", "--store", str(store), "--out", str(tmp_path / "out")]) == 2
    assert "cannot share a column" in capsys.readouterr().err


def test_a_score_made_again_replaces_the_older(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0)], references=())
    path = next(store.glob("alpha-*")) / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps(score("distance", 3.0, version=2, extractor="net-1")) + "\n")
    assert collect("speed", store).runs[0].value("distance") == 3.0


def test_an_unknown_sweep_names_the_known_ones(store):
    with pytest.raises(ReportError, match="'sped'.*known: speed"):
        collect("sped", store)


def test_a_score_that_is_no_number_is_said(tmp_path):
    found = collect("speed", write_store(tmp_path, [("alpha", 0, 1, 1.0), ("alpha", 1, 1, float("nan"))]))
    assert re.search(r"alpha-s1-.*not finite.*: distance$", found.notes[0])
    assert aggregate(found)[-1].intervals["distance"].n == 1


def test_unlike_code_is_said(tmp_path):
    runs = [("alpha", 0, 1, 1.0), ("alpha", 1, 1, 2.0)]
    store = write_store(tmp_path, runs)
    path = next(store.glob("alpha-s1-*")) / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code_fingerprint": "c2"}))
    assert "2 versions of its code" in collect("speed", store).notes[0]
    assert "2 versions of its code" in report("speed", store, tmp_path / "out").with_name("table.md").read_text()


def test_a_key_that_differs_without_being_an_axis_makes_rows_of_its_own(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0), ("alpha", 1, 1, 2.0)])
    path = next(store.glob("alpha-s1-*")) / "run.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"nfe": 8, "log_every": 3}))
    found = collect("speed", store)
    assert found.swept == ["fake_score_updates", "nfe"] and len(aggregate(found)) == 4


@pytest.mark.parametrize(
    "interval, text",
    [
        (Interval(112.34, 108.3, 116.38, 3), "112.3 ± 4.0"),
        (Interval(0.12347, 0.1220, 0.1244, 3), "0.1235 ± 0.0012"),
        (Interval(15230.0, 15110.0, 15350.0, 3), "15,230 ± 120"),
        (Interval(2.0, float("nan"), float("nan"), 1), "2.00"),
        (Interval(0.0, 0.0, 0.0, 3), "0"),
        (Interval(0.8, 0.8 - 1e-16, 0.8 + 2e-16, 3), "0.800"),
        (None, "—"),
    ],
)
def test_numbers_show_as_many_digits_as_their_interval_carries(interval, text):
    assert show_interval(interval) == text


def test_the_page_stands_alone(store, tmp_path):
    page = report("speed", store, tmp_path / "results")
    text = page.read_text()
    assert "Does a faster fake_score pay?" in text
    outside = [url for url in re.findall(r"(?:src|href)=\"([^\"]*)\"", text) if not url.startswith("data:")]
    assert outside == [] and "@import" not in text and "http" not in re.sub(r"data:[^\"]*", "", text)
    assert text.count("data:image/webp") == 2 * 5, "two prompts; two references and three rows each"
    assert "a blue square moves up &amp; 10% right" in text and "out of &lt;luck&gt;" in text
    assert "1/4 (1 collapsed, 1 failed, 1 missing)" in text
    assert all(run.name in text for run in store.glob("*-s*-*"))


def test_a_second_report_has_the_same_bytes(store, tmp_path):
    folder = report("speed", store, tmp_path / "results").parent
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report("speed", store, tmp_path / "results")
    assert before == {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_tables_agree(store, tmp_path):
    folder = report("speed", store, tmp_path / "results").parent
    markdown = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("|")]
    lines = list(csv.DictReader((folder / "table.csv").open()))
    assert len(markdown) == 2 + len(lines) == 7
    assert len({line.count("|") for line in markdown}) == 1
    assert float(lines[2]["distance_mean"]) == pytest.approx(11.1) and lines[2]["distance_n"] == "3"
    assert (lines[4]["done"], lines[4]["expected"], lines[4]["collapsed"]) == ("1", "4", "1")
    latex = (folder / "table.tex").read_text()
    body = latex[latex.index("\\toprule") : latex.index("\\bottomrule")]
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", latex)[1]
    for line in body.splitlines():
        if line.endswith("\\\\"):
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1, line
    assert "fake\\_score\\_updates" in latex and "command: python -m distill_bench.report" in latex


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex")
def test_the_tex_compiles(store, tmp_path):
    folder = report("speed", store, tmp_path / "results").parent
    (folder / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\usepackage{graphicx}\\begin{document}\\input{table}\\end{document}"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_tex_escapes_what_latex_reads():
    assert tex("50% of a_b & #1 ± 2") == r"50\% of a\_b \& \#1 $\pm$ 2"


def test_neither_report_nor_plot_imports_torch():
    code = "import sys, distill_bench.report, distill_bench.plot; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
