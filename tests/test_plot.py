import csv
import json

import pytest
from matplotlib import pyplot as plt

from distill_bench.plot import PlotError, against, load_runs, main, plot, points

SWEPT = ["cadence"]


def run(method, seed, cadence, distance, status="done"):
    kind = status == "reference"
    return {
        "run_id": f"reference-{method}" if kind else f"{method}-s{seed}-c{cadence}",
        "method": method,
        "seed": seed,
        "status": status,
        "distance": distance,
        "cost_forward_equivalents": "" if kind else 100 * (1 + cadence),
        "cadence": "" if kind else cadence,
    }


@pytest.fixture
def results(tmp_path):
    lines = [run("teacher", "", 0, 2.0, "reference"), run("noise", "", 0, 900.0, "reference")]
    lines += [run(m, s, c, 10.0 / c + s + (m == "beta")) for m in ("alpha", "beta") for c in (1, 5) for s in (0, 1)]
    lines += [run("beta", 2, 1, "", "collapsed"), run("gamma", 0, 1, "", "failed")]
    with (tmp_path / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    column = {"column": "distance", "title": "Distance", "unit": "px", "better": "lower", "headline": True}
    hidden = column | {"column": "hidden", "headline": False}
    (tmp_path / "columns.json").write_text(json.dumps({"question": "?", "swept": SWEPT, "columns": [column, hidden]}))
    for line in lines:
        if line["status"] in ("done", "collapsed"):
            (tmp_path / line["run_id"]).mkdir()
            entries = [{"student_updates": u, "seconds": u, "student_loss": 1 / u} for u in (1, 2, 3)]
            text = "".join(json.dumps(entry) + "\n" for entry in entries)
            (tmp_path / line["run_id"] / "train.jsonl").write_text(text + '{"student_upd')
    return tmp_path


def test_points_are_means_over_the_seeds_that_are_done(results):
    found = points(load_runs(results), SWEPT, "cost_forward_equivalents", "distance", "method")
    assert [(p.group, p.note, p.x.mean, p.y.mean, p.y.n) for p in found] == [
        ("alpha", "1", 200, 10.5, 2),
        ("alpha", "5", 600, 2.5, 2),
        ("beta", "1", 200, 11.5, 2),
        ("beta", "5", 600, 3.5, 2),
    ]


def test_a_line_a_method_with_its_markers_named_and_far_references_said(results):
    figure = against(load_runs(results), SWEPT, "cost_forward_equivalents", "distance", "method")
    axes = figure.axes[0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["alpha", "beta"]
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("1") == texts.count("5") == 2 and "teacher" in texts and "noise" not in texts
    assert "off the axis: noise 900" in axes.get_xlabel() and "markers: cadence" in axes.get_xlabel()
    plt.close(figure)


def test_every_figure_is_png_and_svg_and_says_what_it_shows(results):
    paths = plot(results, results)
    assert [path.stem for path in paths] == ["distance_against_cost", "headline", "training_curves"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and "<svg" in path.with_suffix(".svg").read_text()
        assert path.with_suffix(".txt").read_text().strip()
    before = [path.with_suffix(".svg").read_bytes() for path in paths]
    assert before == [path.with_suffix(".svg").read_bytes() for path in plot(results, results)]


def test_any_columns_can_be_drawn(results, capsys):
    assert main([str(results), "--x", "cadence", "--y", "distance", "--group", "seed"]) == 0
    assert (results / "figures" / "distance_against_cadence_by_seed.svg").is_file()
    assert main([str(results), "--y", "distnace"]) == 2
    assert "no column called 'distnace'" in capsys.readouterr().err


def test_nothing_finished_is_no_figure_and_no_folder_is_an_error(results, tmp_path):
    assert against([run("alpha", 0, 1, "", "failed")], SWEPT, "cost_forward_equivalents", "distance", "method") is None
    with pytest.raises(PlotError, match=r"distill_bench\.report"):
        load_runs(tmp_path / "nowhere")
