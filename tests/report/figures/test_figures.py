"""Figures of a sweep: their points, labels and legends, and text that is never cut off."""

from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from controlled_sweep import controlled_sweep
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from stores import RUNS, load_results, write_store

from distill_bench.report.data_files import data_files
from distill_bench.report.figures import canvas, style
from distill_bench.report.figures.curves import curves
from distill_bench.report.figures.drawings import drawings
from distill_bench.report.figures.every_row import draw_differences
from distill_bench.report.figures.looks import Series, choose_looks, marker_sizes
from distill_bench.report.figures.overview import overview
from distill_bench.report.figures.pairs import against, score_by_axis
from distill_bench.report.figures.study import PlotError, Study, opened
from distill_bench.report.figures.training import by_bin, training
from distill_bench.report.plot import draw_pair, main, plot
from distill_bench.report.read_store import read_sweep
from distill_bench.report.results import load
from distill_bench.report.rows import COST
from distill_bench.store.files import read_jsonl

RUNS_HERE = [*RUNS, ("beta", 0, 5, 9.0), ("beta", 1, 5, 9.5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of two methods at two places of the axis; one reference is near, one far away."""
    store = write_store(tmp_path, RUNS_HERE, references=("teacher", "noise"))
    for name, value, other in (("teacher", 1.0, 3.0), ("noise", 2.0, 9000.0)):
        metrics = store / "references" / name / "metrics.jsonl"
        text = metrics.read_text()
        metrics.write_text(text.replace(f'"value": {value}', f'"value": {other}', 1))
    out = tmp_path / "results"
    out.mkdir()
    for name, text in data_files(read_sweep("speed", store)).items():
        (out / name).write_text(text)
    return out


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


# --- one column against another ---


def test_points_are_means_over_finished_seeds(folder):
    points = opened(folder).pairs(COST, "distance", "method")
    assert points[["group", "place", "x", "y"]].round(9).values.tolist() == [
        ["Alpha", "1", 2000, 11.1],
        ["Alpha", "5", 6000, 51.5],
        ["Beta", "1", 2000, 4.0],
        ["Beta", "5", 6000, 9.25],
    ]


def test_near_references_are_named_in_the_margin_and_far_ones_below(folder):
    figure = against(folder, COST, "distance")
    assert legend_of(figure) == ["Alpha", "Beta"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["teacher"]
    below = figure.get_supxlabel().replace("\u00a0", " ")
    assert "off the axes: noise 9,000" in below
    assert "small to large markers: K (fake-score updates) 1, 5" in below


def test_markers_grow_along_the_axis_of_the_sweep(folder):
    figure = against(folder, COST, "distance")
    sizes = [list(markers.get_sizes()) for markers in figure.axes[0].collections[:2]]
    grown = [size**2 for size in marker_sizes(["1", "5"]).values()]
    assert sizes == [pytest.approx(grown), pytest.approx(grown)] and grown[0] < grown[1]


def test_series_at_the_same_cost_stand_side_by_side(folder):
    figure = against(folder, COST, "distance")
    alpha, beta = (markers.get_offsets()[:, 0] for markers in figure.axes[0].collections[:2])
    assert all(alpha < beta) and list((alpha + beta) / 2) == pytest.approx([2000, 6000])


def test_margin_labels_keep_apart_and_in_order():
    with canvas.rc_context(style.STYLE):
        axes = Figure(figsize=style.SIZE).subplots()
        axes.set_ylim(0, 1)
        canvas.margin_labels(axes, [(0.99, "d"), (0.5, "b"), (0.98, "c"), (0.49, "a"), (1.0, "e")])
        axes.figure.draw_without_rendering()
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the leader lines
    assert [text.get_text() for text in axes.texts] == ["a", "b", "c", "d", "e"]
    assert all(low.y1 <= high.y0 for low, high in pairwise(boxes))


def test_a_row_without_a_place_on_the_axis_is_a_line_across(folder):
    """A method without the swept key is compared with every place."""
    runs = pd.read_csv(folder / "runs.csv", dtype=str, keep_default_na=False)
    runs.loc[runs["method"] == "beta", "fake_score_updates"] = ""
    runs.to_csv(folder / "runs.csv", index=False)
    figure = score_by_axis(folder, "distance")
    axes = figure.axes[0]
    assert legend_of(figure) == ["Alpha", "Beta"]
    across = next(line for line in axes.lines if line.get_label() == "Beta")
    results = load(folder)
    (beta,) = [row for row in results.students if row.method == "beta"]
    mean = results.interval(beta, "distance").mean
    assert list(across.get_ydata()) == pytest.approx([mean] * 2)
    assert list(across.get_xdata()) == [0, 1]
    assert axes.get_xlim()[0] > 0.5, "the line must not widen the axis"


def test_a_reference_with_both_scores_is_a_marker(folder):
    figure = against(folder, "distance", "detail", "series")
    references = [line for line in figure.axes[0].lines if line.get_color() == style.QUIET]
    at = [(line.get_xdata(), line.get_ydata()) for line in references if line.get_marker() == "d"]
    assert [(list(x), list(y)) for x, y in at] == [([3.0], [0.5])]
    assert "teacher" in legend_of(figure)


def test_only_rows_of_one_series_are_joined_and_controls_are_hollow():
    axes = against(controlled_sweep(), COST, "d", "method").axes[0]
    joined = [list(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) == 3]
    assert joined == [pytest.approx([level] * 3) for level in (1.0, 20.0, 0.6)]
    hollow = [
        float(markers.get_offsets()[0, 1])
        for markers in axes.collections
        if [to_hex(colour) for colour in markers.get_facecolors()] == [style.GROUND]
    ]
    assert hollow == pytest.approx([1.3, 25.0, 0.7])


def test_columns_are_found_by_the_beginning_of_their_names(folder):
    assert against(folder / "runs.csv", "cost", "dist", group="series") is not None
    for x, y, group in (
        ("cost", "zzz", "method"),
        ("zzz", "distance", "method"),
        ("cost", "distance", "zzz"),
    ):
        with pytest.raises(PlotError, match="no column called 'zzz'"):
            against(folder, x, y, group)


# --- looks ---


def test_a_control_has_the_colour_of_its_line():
    one, five = {"lr": "lr 1"}, {"lr": "lr 5"}
    looks = choose_looks(
        {
            "A": Series(3, "A"),
            "A, lr 5": Series(1, "A", five),
            "B paper, lr 1": Series(2, "B paper", one),
            "B paper": Series(1, "B paper"),
        }
    )
    assert looks.line_of == {"A, lr 5": "A", "B paper": "B paper, lr 1"}
    assert looks.colour("A") == looks.colour("A, lr 5") != looks.colour("B paper")
    assert looks.styles["A, lr 5"]["markerfacecolor"] == style.GROUND
    assert looks.controls == "hollow: another lr"


def test_a_row_without_a_place_has_the_colour_of_the_line_whose_name_it_extends():
    exact = "A, exact"
    series = {"A": Series(3, "A"), "Ab": Series(3, "Ab"), exact: Series(0, exact)}
    looks = choose_looks(series)
    assert looks.line_of == {exact: "A"} and looks.unplaced == [exact]
    assert [entry.get_label() for entry in looks.legend(["Ab", exact])] == ["A", "Ab", exact]


def test_many_lines_share_colours_by_stem_and_dashes_by_settings():
    series = {
        f"m{i}, lr {rate}": Series(2, f"m{i}", {"lr": f"lr {rate}"})
        for i in range(5)
        for rate in (1, 2)
    }
    looks = choose_looks(series)
    assert looks.colour("m0, lr 1") == looks.colour("m0, lr 2") != looks.colour("m1, lr 1")
    assert looks.styles["m0, lr 1"]["linestyle"] != looks.styles["m0, lr 2"]["linestyle"]
    labels = [entry.get_label() for entry in looks.legend(series)]
    assert labels == [*(f"m{i}" for i in range(5)), "lr 1", "lr 2"]


def test_without_an_axis_every_row_has_a_colour():
    looks = choose_looks(
        {f"m, weight {i}": Series(0, "m", {"weight": f"weight {i}"}) for i in range(5)}
    )
    assert len({looks.colour(series) for series in looks.styles}) == 5 and not looks.line_of


# --- overview, curves, rows ---


def test_the_overview_names_lines_by_their_differences_and_has_a_floor():
    figure = overview(controlled_sweep())
    assert legend_of(figure) == [
        "Alpha official",
        "Alpha paper",
        "Beta",
        "hollow: another lr",
        "floor: teacher against its other seeds",
    ]
    distance, motion = figure.axes
    assert distance.get_yscale() == "log"
    floors = [0.2 in line.get_ydata() for line in distance.lines + motion.lines]
    assert floors.count(True) == 1, "a floor exists for distances only"


def test_an_interval_beyond_the_limits_has_an_arrow_head():
    figure = overview(controlled_sweep(spread=0.9))
    distance, motion = (
        [marks.get_offsets()[:, 1] for marks in axes.collections if not marks.get_clip_on()]
        for axes in figure.axes
    )
    ends = [height for heights in distance for height in heights]
    bottom, top = figure.axes[0].get_ylim()
    assert ends.count(bottom) == 12, "every interval reaches below 0, where the logarithm ends"
    assert ends.count(top) == len(ends) - 12 < 12
    assert not motion, "the limits contain these intervals"


def test_curves_have_a_panel_per_place_and_a_cross_where_a_run_collapsed(folder):
    figure = curves(folder, "distance", COST)
    left, right = figure.axes
    assert [left.get_title(), right.get_title()] == ["K=1", "K=5"]
    assert left.lines[0].get_xdata().tolist() == [1000, 2000]
    assert left.lines[0].get_ydata() == pytest.approx([33.3, 11.1])
    assert [line.get_marker() for line in left.lines] == ["o", "s", "x"]


def test_of_many_places_eight_have_a_panel_with_both_ends_and_the_caption_says_so(tmp_path):
    runs = [("alpha", 0, place, float(place)) for place in range(1, 17)]
    study = Study(load_results(write_store(tmp_path, runs), tmp_path / "data"))
    assert list(study.panels) == ["1", "3", "5", "7", "10", "12", "14", "16"]
    drawn = curves(study, "distance", "student_updates")
    assert [axes.get_title() for axes in drawn.axes] == list(study.panels.values())
    captions = {drawing.name: drawing.caption for drawing in drawings(study)}
    for name in ("distance_over_updates", "training"):
        assert captions[name].endswith("; 8 of 16 values of K (fake-score updates)")
    assert "values of" not in captions["every_row"]


def test_bands_end_at_the_limits_of_a_logarithmic_axis():
    axes = curves(controlled_sweep(spread=0.9), "d", COST).axes[0]
    low, high = axes.get_ylim()
    bands = [path.vertices[:, 1] for band in axes.collections for path in band.get_paths()]
    assert axes.get_yscale() == "log" and len(bands) == 3
    assert all(low <= heights.min() and heights.max() <= high for heights in bands) and low > 0.01


def test_clear_differences_are_filled(folder):
    distance = draw_differences(folder).axes[0]
    markers = [line for line in distance.lines if line.get_marker() not in ("None", "", "|")]
    hollow = [line for line in markers if line.get_markerfacecolor() == style.GROUND]
    shown, open_ones = (sum(len(line.get_xdata()) for line in of) for of in (markers, hollow))
    assert shown == 3 and open_ones == 2, "one of three intervals is clear of 0"


def test_a_series_is_named_at_its_first_row():
    axes = draw_differences(controlled_sweep()).axes[0]
    labels = [tick.get_text().replace("\u2007", "") for tick in axes.get_yticklabels()]
    assert labels[:5] == ["Alpha official, lr 0.5  2", "5", "Alpha paper, lr 0.1  1", "2", "5"]


# --- training logs ---


def test_numeric_bins_are_the_x_axis(folder):
    axes = by_bin(folder, "gap").axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.1", "0.5", "0.9"]
    assert axes.lines[0].get_ydata() == pytest.approx([2.0, 10.0, 18.0])
    assert by_bin(folder, "nothing") is None


def rewrite_logs(folder: Path, change) -> None:
    logs = pd.read_csv(folder / "training.csv")
    change(logs).to_csv(folder / "training.csv", index=False)


def test_terms_of_a_loss_have_a_panel_each_over_the_places(folder):
    names = {"gap/0.1": "cosine/fisher/residual", "gap/0.5": "cosine/kl/fisher"}
    rewrite_logs(folder, lambda logs: logs.rename(columns=names))
    figure = by_bin(folder, "cosine")
    assert [axes.get_title() for axes in figure.axes] == ["fisher and residual", "kl and fisher"]
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "5"]
    assert axes.lines[0].get_xdata().tolist() == [0, 1]
    assert axes.lines[0].get_ydata() == pytest.approx([2.0, 2.0])


def test_a_place_where_no_run_logs_a_quantity_has_no_panel(folder):
    runs = load(folder).runs
    first = runs["run_id"][runs["fake_score_updates"] == 1]
    rewrite_logs(folder, lambda logs: logs[logs["run_id"].isin(first)])
    figure = by_bin(folder, "gap")
    assert [axes.get_title() for axes in figure.axes] == ["K=1"]


def test_series_that_do_not_log_a_quantity_are_not_in_its_legend(folder):
    alpha = load(folder).runs.query("method == 'alpha'")["run_id"]
    rewrite_logs(folder, lambda logs: logs[logs["run_id"].isin(alpha)])
    assert legend_of(by_bin(folder, "gap")) == ["Alpha"]


def test_logs_that_never_change_and_copies_are_not_drawn(folder):
    rewrite_logs(folder, lambda logs: logs.assign(rho=3.0, copied=logs["student_loss"]))
    figure = training(folder)
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert labels == ["gap", "copied"], "student_loss comes after its copy in the alphabet"


# --- files and command ---


def test_every_figure_is_listed_with_its_caption(reported):
    figures = reported[0] / "figures"
    lines = list(read_jsonl(figures / "index.jsonl"))
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
    for line in lines:
        assert line["caption"] and "<svg" in (figures / f"{line['name']}.svg").read_text()
        assert (figures / f"{line['name']}.png").read_bytes().startswith(b"\x89PNG")


def test_any_two_columns_can_be_drawn_from_the_command_line(folder, capsys):
    path = draw_pair(folder, "cost", "dist")
    assert path.name == "distance_against_cost_forward_equivalents_by_method.svg"
    assert path.with_suffix(".png").is_file()
    assert main([str(folder), "--x", "fake", "--y", "distance", "--group", "seed"]) == 0
    assert (folder / "figures" / "distance_against_fake_score_updates_by_seed.svg").is_file()
    capsys.readouterr()
    assert main([str(folder), "--y", "distnace"]) == 2
    assert "no column called 'distnace'" in capsys.readouterr().err
    with pytest.raises(PlotError, match=r"'_updates' is ambiguous"):
        draw_pair(folder, "cost", "distance", "_updates")
    with pytest.raises(SystemExit):
        main([str(folder), "--x", "seconds"])


def test_without_finished_runs_there_is_no_figure_and_a_missing_folder_is_an_error(tmp_path):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0, None)], references=())
    (tmp_path / "results").mkdir()
    for name, text in data_files(read_sweep("speed", store)).items():
        (tmp_path / "results" / name).write_text(text)
    assert against(tmp_path / "results", COST, "distance") is None
    assert plot(tmp_path / "results") == []
    with pytest.raises(PlotError, match=r"distill_bench\.report"):
        plot(tmp_path / "nowhere")


@pytest.mark.slow
def test_no_text_is_cut_off_or_under_the_legend():
    for drawing in drawings(Study(controlled_sweep())):
        figure = drawing.draw()
        with canvas.rc_context(style.STYLE):
            figure.draw_without_rendering()
        page = figure.bbox.padded(3)
        labels = [axis.label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
        titles = [axes.title for axes in figure.axes]
        notes = [text for axes in figure.axes for text in axes.texts]
        texts = [text for text in [*figure.texts, *labels, *titles, *notes] if text.get_text()]
        boxes = {text.get_text(): text.get_window_extent() for text in texts if text.get_visible()}
        legends = [legend.get_window_extent() for legend in figure.legends]
        for name, box in [*boxes.items(), *(("the legend", box) for box in legends)]:
            inside = page.x0 <= box.x0 and box.x1 <= page.x1
            inside &= page.y0 <= box.y0 and box.y1 <= page.y1
            assert inside, f"{drawing.name}: {name!r} is cut off"
        for name, box in boxes.items():
            covered = any(box.padded(-1).overlaps(legend) for legend in legends)
            assert not covered, f"{drawing.name}: {name!r} is under the legend"


def test_a_legend_takes_as_many_columns_as_fit():
    """Capitals are wider than the mean letter."""
    names = ["DMD2, renoise", "DMD2, ODE", "SGMD, renoise", "SGMD, ODE"]

    def drawn(labels: list[str], width: float) -> tuple[Figure, int]:
        figure = Figure(figsize=(width, 3), layout="constrained")
        canvas.legend(figure, [Line2D([], [], marker="o", label=label) for label in labels])
        (legend,) = figure.legends
        assert legend.get_window_extent().width <= figure.bbox.width
        return figure, legend._ncols

    assert drawn(names, 5.4)[1] < drawn(names, 9.0)[1] == len(names)
    assert drawn(["WWWWWWWWWW"] * 4, 5.4)[1] < drawn(["iiiiiiiiii"] * 4, 5.4)[1]
