"""Figures of students that are sampled in several ways."""

from pathlib import Path

import pytest
from stores import write_results

from distill_bench.report.figures import style
from distill_bench.report.figures.every_row import every_row
from distill_bench.report.figures.overview import overview
from distill_bench.report.figures.samplings import samplings
from distill_bench.report.figures.study import opened
from distill_bench.report.results import Column

SCORE = Column("motion", "motion", "", "one", True)
# trained by, steps, sampled by -> score of seed 0
SCORES = {
    ("renoise", 2, "renoise"): 0.9,
    ("renoise", 2, "ode"): 1.2,
    ("renoise", 4, "renoise"): 0.8,
    ("renoise", 4, "ode"): 1.4,
    ("ode", 2, "ode"): 1.0,
    ("ode", 4, "ode"): 1.1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of one method, trained by both steppings; one of them is sampled by the other too."""
    runs = []
    for (trained, nfe, sampled), score in SCORES.items():
        run = f"alpha-{trained}-{nfe}"
        for seed in (0, 1):
            further = "" if sampled == trained else f"/samplings/{sampled}-nfe{nfe}"
            runs.append(
                {
                    "run_id": f"{run}-s{seed}{further}",
                    "method": "alpha",
                    "seed": seed,
                    "stepping": trained,
                    "nfe": nfe,
                    "sampling.stepping": sampled,
                    "sampling.nfe": nfe,
                    "motion": score + 0.02 * seed,
                }
            )
    swept = ["stepping", "nfe", "sampling.stepping", "sampling.nfe"]
    point = {"run_id": "alpha-ode-2-s0", "student_updates": 1}
    write_results(tmp_path, [SCORE], swept, "nfe", runs, [point | {"motion": 1.0}], [point])
    return tmp_path


def markers(axes) -> dict[tuple[int, str], tuple[float, bool]]:
    """(line of the figure, marker) -> (score, filled)."""
    found = {}
    for line in axes.lines:
        if line.get_marker() in ("o", "s"):
            filled = line.get_markerfacecolor() != style.GROUND
            found[line.get_ydata()[0], line.get_marker()] = (line.get_xdata()[0], filled)
    return found


def test_a_student_has_a_marker_per_way_filled_where_it_was_trained_so(folder):
    figure = samplings(folder)
    axes = figure.axes[0]
    labels = [tick.get_text().replace("\u2007", "") for tick in axes.get_yticklabels()]
    assert labels == ["Alpha, renoise  2", "4"], "students that are sampled in one way are left out"
    found = {place: (round(x, 6), filled) for place, (x, filled) in markers(axes).items()}
    assert found == {
        (0, "o"): (0.91, True),
        (0, "s"): (1.21, False),
        (1, "o"): (0.81, True),
        (1, "s"): (1.41, False),
    }
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["renoise", "ODE", "hollow: trained otherwise"]


def test_other_figures_show_students_as_they_were_trained(folder):
    study = opened(folder)
    names = [text.get_text() for text in overview(study).legends[0].get_texts()]
    assert names == ["Alpha, renoise", "Alpha, ODE"]
    scores = sorted(round(x, 6) for x in study.pairs("nfe", "motion", "series").y)
    assert scores == [0.81, 0.91, 1.01, 1.11]


def test_a_line_per_row_shows_every_way(folder):
    labels = [tick.get_text() for tick in every_row(folder).axes[0].get_yticklabels()]
    assert len(labels) == len(SCORES)
    assert any(label.startswith("Alpha, renoise, sampled ODE") for label in labels)


def test_without_further_samplings_there_is_no_such_figure(folder):
    runs = (folder / "runs.csv").read_text().splitlines(keepends=True)
    (folder / "runs.csv").write_text("".join(run for run in runs if "/samplings/" not in run))
    assert samplings(folder) is None
