from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from matplotlib import pyplot as plt
from stores import RUNS, write_results, write_store

from distill_bench.report.data_files import data_files
from distill_bench.report.plot import (
    PlotError,
    against,
    by_bin,
    curves,
    differences,
    draw_pair,
    drawings,
    main,
    overview,
    plot,
    points,
    score_by_axis,
)
from distill_bench.report.read_store import REFERENCE, read_sweep
from distill_bench.report.results import Column, load
from distill_bench.report.rows import COST
from distill_bench.sample.roles import role_of
from distill_bench.store.files import read_jsonl

RUNS_HERE = [*RUNS, ("beta", 0, 5, 9.0), ("beta", 1, 5, 9.5)]


@pytest.fixture
def folder(tmp_path):
    store = write_store(tmp_path, RUNS_HERE, references=("teacher", "noise"))
    metrics = store / "references" / "noise" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"value": 2.0', '"value": 9000.0'))
    out = tmp_path / "results"
    out.mkdir()
    for name, text in data_files(read_sweep("speed", store)).items():
        (out / name).write_text(text)
    return out


def test_points_are_means_over_the_seeds_that_are_done(folder):
    found = points(load(folder), "cost_forward_equivalents", "distance", "method")
    assert [(p.group, p.note, p.x.mean, round(p.y.mean, 9), p.y.n) for p in found] == [
        ("alpha", "1", 2000, 11.1, 3),
        ("alpha", "5", 6000, 51.5, 3),
        ("beta", "1", 2000, 4.0, 1),
        ("beta", "5", 6000, 9.25, 2),
    ]


def test_a_line_a_method_with_its_markers_named_and_far_references_said(folder):
    figure = against(folder, "cost_forward_equivalents", "distance")
    axes = figure.axes[0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["alpha", "beta"]
    texts = [text.get_text() for text in axes.texts]
    below = figure.get_supxlabel()
    assert texts.count("1") == texts.count("5") == 2 and "teacher" in texts and "noise" not in texts
    assert "off the axis: noise 9,000" in below and "line's ends: fake_score_updates" in below
    plt.close(figure)


def test_a_row_without_a_place_on_the_axis_is_a_line_across_it(folder):
    """Methods that never update what the sweep counts are there to be compared: at every place, by their mean and interval."""
    table = folder / "runs.csv"
    heading, *lines = table.read_text().splitlines()
    at = heading.split(",").index("fake_score_updates")
    placed = [line.split(",", at + 1) for line in lines]
    for cells in placed:
        cells[at] = "" if cells[1] == "beta" else cells[at]
    table.write_text("\n".join([heading, *map(",".join, placed)]) + "\n")
    figure = score_by_axis(folder, "distance")
    axes = figure.axes[0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["alpha", "beta"]
    across = next(line for line in axes.lines if line.get_label() == "beta")
    means = [
        line.mean
        for line in [load(folder).interval(row, "distance") for row in load(folder).students]
        if line
    ]
    assert list(across.get_ydata()) == pytest.approx([means[-1]] * 2) and list(
        across.get_xdata()
    ) == [0, 1]
    assert axes.get_xlim()[0] > 0.5, "the line must not widen the axis"
    plt.close(figure)


def test_a_reference_with_both_scores_is_a_diamond_in_the_trade_off(folder):
    figure = against(folder, "distance", "speed", "series")
    diamonds = [line for line in figure.axes[0].lines if line.get_marker() == "d"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in diamonds] == [
        (1.0, pytest.approx(1.1))
    ]
    plt.close(figure)


def test_curves_have_a_panel_a_place_on_the_axis_and_a_cross_where_a_run_collapsed(folder):
    figure = curves(folder, "distance", "cost_forward_equivalents")
    left, right = figure.axes
    assert [left.get_title(), right.get_title()] == ["fake_score_updates=1", "fake_score_updates=5"]
    assert left.lines[0].get_xdata().tolist() == [1000, 2000]
    assert left.lines[0].get_ydata() == pytest.approx([33.3, 11.1])
    assert [line.get_marker() for line in left.lines] == ["o", "s", "x"]
    plt.close(figure)


def test_what_is_logged_by_bin_is_drawn_by_bin(folder):
    figure = by_bin(folder, "gap")
    (line, *_), labels = (
        figure.axes[0].lines,
        [tick.get_text() for tick in figure.axes[0].get_xticklabels()],
    )
    assert labels == ["0.1", "0.5", "0.9"] and line.get_ydata() == pytest.approx([2.0, 10.0, 18.0])
    assert by_bin(folder, "nothing") is None
    plt.close(figure)


def test_a_place_where_no_run_logs_a_quantity_has_no_panel(folder):
    path, places = (
        folder / "training.csv",
        load(folder).runs.set_index("run_id")["fake_score_updates"],
    )
    head, *lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join([head, *(line for line in lines if places[line.partition(",")[0]] == 1)])
    )
    figure = by_bin(folder, "gap")
    assert [axes.get_title() for axes in figure.axes] == ["fake_score_updates=1"]
    plt.close(figure)


def test_differences_are_filled_only_where_they_are_sure(folder):
    figure = differences(folder)
    distance = figure.axes[0]
    fills = [
        line.get_markerfacecolor()
        for line in distance.lines
        if line.get_marker() not in ("None", "", "|")
    ]
    assert len(fills) == 3 and fills.count("#fefefe") == 2, (
        "one of the three pairs has an interval beside 0"
    )
    plt.close(figure)


def test_every_figure_is_svg_and_listed_with_what_it_shows(reported):
    figures = reported[0] / "figures"
    lines = read_jsonl(figures / "index.jsonl")
    names = [line["name"] for line in lines]
    assert names[:3] == ["overview", "distance_against_cost", "speed_against_cost"]
    assert {
        "speed_against_distance",
        "distance_over_cost",
        "every_row",
        "differences",
        "training",
        "gap_by_bin",
    } <= set(names)
    assert all(
        line["about"] and "<svg" in (figures / f"{line['name']}.svg").read_text() for line in lines
    )
    for line in lines:
        assert (figures / f"{line['name']}.png").read_bytes().startswith(b"\x89PNG")


def test_any_columns_can_be_drawn_by_the_beginning_of_their_names(folder, capsys):
    path = draw_pair(folder, "cost", "dist")
    assert (
        path.name == "distance_against_cost_forward_equivalents_by_method.svg"
        and path.with_suffix(".png").is_file()
    )
    assert main([str(folder), "--x", "fake", "--y", "distance", "--group", "seed"]) == 0
    assert (folder / "figures" / "distance_against_fake_score_updates_by_seed.svg").is_file()
    capsys.readouterr()
    assert main([str(folder), "--y", "distnace"]) == 2
    assert "no column called 'distnace'" in capsys.readouterr().err
    with pytest.raises(PlotError, match=r"'_updates' could be any of"):
        draw_pair(folder, "cost", "distance", "_updates")


def test_nothing_finished_is_no_figure_and_no_folder_is_an_error(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0, None)], references=())
    (tmp_path / "results").mkdir()
    for name, text in data_files(read_sweep("speed", store)).items():
        (tmp_path / "results" / name).write_text(text)
    assert against(tmp_path / "results", "cost_forward_equivalents", "distance") is None
    assert plot(tmp_path / "results") == []
    with pytest.raises(PlotError, match=r"distill_bench\.report"):
        plot(tmp_path / "nowhere")


SCORES = [
    Column("d", "Distance to the clips of the teacher, in a long title", "", "lower", True),
    Column("m", "Motion", "", "one", True),
]


def a_sweep(spread=0.1):
    """Two presets of one method and another method at three places of the axis, each with a control at the first alone."""
    rows = [("alpha", "official", 0.5, 1.0), ("alpha", "paper", 0.1, 20.0), ("beta", "", 0.5, 0.6)]
    rows = [(*row, k) for row in rows for k in (1, 2, 5)]
    rows += [
        ("alpha", "official", 2.5, 1.3, 1),
        ("alpha", "paper", 0.5, 25.0, 1),
        ("beta", "", 2.5, 0.7, 1),
    ]
    runs, checkpoints, training = [], [], []
    for method, preset, rate, level, k in rows:
        for seed in range(3):
            run_id = f"r{len(runs)}"
            d, m = level * (1 + spread * (seed - 1)), 1.2 + 0.3 * (seed - 1)
            runs.append(
                {
                    "run_id": run_id,
                    "method": method,
                    "method.preset": preset,
                    "lr": rate,
                    "k": k,
                    "seed": seed,
                    "d": d,
                    "m": m,
                    COST: 100 * k + level,
                }
            )
            checkpoints += [
                {"run_id": run_id, "student_updates": u, COST: u * k, "d": 50 / u * d, "m": m}
                for u in (5, 10, 50)
            ]
            training += [
                {
                    "run_id": run_id,
                    "student_updates": u,
                    "gap/sigma_0.02-0.26": d,
                    "gap/sigma_0.26-0.50": 2 * d,
                }
                for u in (5, 50)
            ]
    for name in ("teacher_other", *(f"a_reference_with_a_long_name-nfe{n}" for n in (1, 2, 4, 8))):
        runs.append(
            {
                "run_id": f"reference-{name}",
                "method": name,
                "role": role_of(name),
                "status": REFERENCE,
                "d": 0.2,
                "m": 1.0,
            }
        )
    swept = ["lr", "k", "method.preset"]
    with TemporaryDirectory() as folder:
        write_results(Path(folder), SCORES, swept, "k", runs, checkpoints, training)
        return load(folder)


def test_only_rows_of_one_series_are_joined_and_controls_are_hollow():
    figure = against(a_sweep(), COST, "d", "method")
    lines = [line for line in figure.axes[0].lines if line.get_marker() in ("o", "s", "^")]
    joined = [list(line.get_ydata()) for line in lines if len(line.get_ydata()) > 1]
    assert joined == [pytest.approx([level] * 3) for level in (1.0, 20.0, 0.6)]
    hollow = [
        float(line.get_ydata()[0]) for line in lines if line.get_markerfacecolor() == "#fefefe"
    ]
    assert hollow == pytest.approx([1.3, 25.0, 0.7])
    plt.close(figure)


def test_the_overview_names_lines_by_what_tells_them_apart_and_has_a_floor():
    figure = overview(a_sweep())
    distance = figure.axes[0]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["alpha official", "alpha paper", "beta", "hollow: another lr"]
    assert distance.get_yscale() == "log" and "teacher against teacher" in [
        text.get_text() for text in distance.texts
    ]
    plt.close(figure)


def test_an_interval_that_the_view_cuts_has_an_arrow_head():
    figure = overview(a_sweep(spread=0.9))
    heads = [
        line.get_marker()
        for line in figure.axes[0].lines
        if line.get_marker() in ("^", "v") and not line.get_clip_on()
    ]
    assert heads.count("v") == 12 and heads.count("^") < 12, (
        "each reaches below 0, where the logarithm ends"
    )
    assert "v" not in [
        line.get_marker() for line in figure.axes[1].lines if not line.get_clip_on()
    ], "held by the view"
    plt.close(figure)


def test_bands_end_at_the_view_of_a_logarithmic_axis():
    figure = curves(a_sweep(spread=0.9), "d", COST)
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    bands = [path.vertices[:, 1] for band in axes.collections for path in band.get_paths()]
    assert axes.get_yscale() == "log" and len(bands) == 3
    assert all(low <= heights.min() and heights.max() <= high for heights in bands) and low > 0.01
    plt.close(figure)


@pytest.mark.slow
def test_no_text_of_a_figure_is_cut_off_or_under_the_legend():
    for drawing in drawings(a_sweep()):
        figure = drawing.draw()
        figure.canvas.draw()
        page = figure.bbox.padded(3)
        labels = [axis.label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
        texts = [
            *figure.texts,
            *labels,
            *(axes.title for axes in figure.axes),
            *(t for axes in figure.axes for t in axes.texts),
        ]
        boxes = {
            text.get_text(): text.get_window_extent()
            for text in texts
            if text.get_text() and text.get_visible()
        }
        legends = [legend.get_window_extent() for legend in figure.legends]
        whole = [
            page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
            for box in legends
        ]
        assert all(whole), f"{drawing.name}: the legend is cut off"
        for text, box in boxes.items():
            inside = (
                page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
            )
            assert inside, f"{drawing.name}: {text!r} is cut off"
            assert not any(box.padded(-1).overlaps(legend) for legend in legends), (
                f"{drawing.name}: {text!r} is under the legend"
            )
        plt.close(figure)


def test_a_column_by_the_beginning_of_its_name_and_one_that_is_not_there(folder):
    figure = against(folder / "runs.csv", "cost", "dist", group="series")
    assert figure is not None
    plt.close(figure)
    for x, y, group in (
        ("cost", "zzz", "method"),
        ("zzz", "distance", "method"),
        ("cost", "distance", "zzz"),
    ):
        with pytest.raises(PlotError, match="no column called 'zzz'"):
            against(folder, x, y, group)
    with pytest.raises(SystemExit):
        main([str(folder), "--x", "seconds"])


def test_of_notes_that_would_lie_on_each_other_one_is_drawn(folder):
    figure = against(
        folder, "cost_forward_equivalents", "cost_forward_equivalents"
    )  # both methods at the same places
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts.count("1") == texts.count("5") == 1
    plt.close(figure)
