"""Figures of studies with more rows, series or places than a reader can tell apart."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from stores import load_results, write_store

from distill_bench.report import load
from distill_bench.report.figures import canvas, style
from distill_bench.report.figures.drawings import drawings
from distill_bench.report.figures.every_row import draw_differences, every_row
from distill_bench.report.figures.overview import overview
from distill_bench.report.figures.pairs import against
from distill_bench.report.figures.study import Study
from distill_bench.report.plot import plot
from distill_bench.report.rows import COST


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Sixteen rows of one series and two of another: the later a row, the longer its distance."""
    runs = [("alpha", seed, k, float(k + seed)) for k in range(1, 17) for seed in (0, 1)]
    runs += [("beta", seed, k, float(k + seed)) for k in (1, 2) for seed in (0, 1)]
    return Study(load_results(write_store(tmp_path, runs), tmp_path / "data"))


def test_of_many_rows_the_baseline_and_the_best_are_listed_in_order_and_the_caption_says_so(
    study, monkeypatch
):
    monkeypatch.setattr("distill_bench.report.figures.study.MOST_LISTED", 5)
    listed = [(row.method, row.at) for row in study.listed]
    assert listed == [("alpha", "1"), ("alpha", "2"), ("alpha", "3"), ("beta", "1"), ("beta", "2")]
    captions = {drawing.name: drawing.caption for drawing in drawings(study)}
    note = "; 5 of 18 rows: the baseline and the best in Distance"
    assert captions["every_row"].endswith(note) and captions["differences"].endswith(note)
    assert "rows:" not in captions["overview"]
    lines = len(study.results.references) + 5
    assert len(every_row(study).axes[0].get_yticks()) == lines
    assert len(draw_differences(study).axes[0].get_yticks()) == 4, "without the baseline"


def test_of_many_series_the_best_are_drawn_and_the_caption_says_so(study, monkeypatch):
    monkeypatch.setattr("distill_bench.report.figures.study.MOST_SERIES", 1)
    assert {row.method for row in study.drawn} == {"alpha"}, "of equal series, the baseline's"
    captions = {drawing.name: drawing.caption for drawing in drawings(study)}
    note = "; 1 of 2 series: the baseline and the best in Distance"
    assert captions["overview"].endswith(note) and note in captions["distance_over_updates"]
    assert "series:" not in captions["every_row"]
    (legend,) = overview(study).legends
    assert [text.get_text() for text in legend.get_texts()] == ["Alpha"]


def test_of_many_places_some_have_a_label(study):
    axes = overview(study).axes[0]
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert labels == ["1", "3", "5", "7", "10", "12", "14", "16"]
    assert list(axes.get_xticks()) == [int(label) - 1 for label in labels]


def test_of_many_references_those_that_scores_compare_with_are_drawn(tmp_path, monkeypatch):
    runs = [("alpha", 0, 1, 1.0), ("alpha", 0, 5, 4.0)]
    store = write_store(tmp_path, runs, ("data", "noise", "teacher", "frozen"))
    study = Study(load_results(store, tmp_path / "data"))

    def named() -> tuple[set[str], str]:
        figure = against(study, COST, "distance")
        return {text.get_text() for text in figure.axes[0].texts}, figure.get_supxlabel()

    labels, below = named()
    assert labels == {"data", "noise", "teacher", "frozen"} and "further" not in below
    monkeypatch.setattr("distill_bench.report.figures.marks.MOST_REFERENCES", 3)
    labels, below = named()
    assert labels == {"data", "teacher"} and "2 further references are in the table" in below


def test_a_study_of_many_runs_has_no_png(tmp_path, monkeypatch):
    runs = [("alpha", 0, 1, 1.0), ("alpha", 0, 5, 4.0)]
    results = load_results(write_store(tmp_path, runs, ()), tmp_path)
    monkeypatch.setattr("distill_bench.report.plot.MOST_WITH_PNG", 1)
    plot(tmp_path, results=results)
    assert {path.suffix for path in (tmp_path / "figures").glob("*.*g")} == {".svg"}
    # further samplings of a student are no runs
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    names = ["one", "one/samplings/ode-nfe2"]
    changed = [
        f"{name},{line.split(',', 1)[1]}" for name, line in zip(names, lines[1:], strict=True)
    ]
    (tmp_path / "runs.csv").write_text("\n".join([lines[0], *changed]) + "\n")
    plot(tmp_path, results=load(tmp_path))
    assert {path.suffix for path in (tmp_path / "figures").glob("*.*g")} == {".svg", ".png"}


def test_a_written_svg_keeps_its_texts_and_what_it_refers_to(tmp_path):
    with canvas.rc_context(style.STYLE):
        axes = (figure := Figure(figsize=style.SIZE)).subplots()
        axes.plot([0.123456, 2.5], [1, 3], marker="o", clip_on=True)
        axes.set_title("0.123456: a, b")
        axes.set_ylabel("turned")
    text = canvas.save_figure(figure, tmp_path, "one").read_text()
    texts = [node.text for node in ElementTree.fromstring(text).iter() if node.text]
    assert {"0.123456: a, b", "turned", "1.0"} <= set(texts)
    ids = set(re.findall(r'id="(.*?)"', text))
    assert ids and set(re.findall(r'(?:href="#|url\(#)(.*?)[")]', text)) == ids
    assert not re.search(r'[ "]\d+\.\d{3}', text) and "rotate(-90" in text
