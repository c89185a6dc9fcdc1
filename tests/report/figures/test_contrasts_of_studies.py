"""Figure of the contrasts that several studies declare."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from stores import update_json, write_results

from distill_bench.report.declarations import FIRST
from distill_bench.report.figures import style
from distill_bench.report.figures.contrasts import shared_contrasts
from distill_bench.report.plot import main
from distill_bench.report.results import Column, load

ROOT = Path(__file__).parents[3]
SCORES = [Column("motion", "motion", "", "one", True), Column("d", "distance", "", "lower", True)]
SEEDS = range(5)


def write_study(folder: Path, name: str, gaps: dict[str, float]) -> dict[str, np.ndarray]:
    """Write results whose contrasts have these sizes; returns each contrast by seed."""
    folder.mkdir()
    generator = np.random.default_rng(len(name))
    runs, contrasts, by_seed = [], [], {}
    for contrast, gap in gaps.items():
        sides = generator.normal(size=(2, len(SEEDS))).round(3) * 0.01
        sides[0] += gap
        by_seed[contrast] = sides[0] - sides[1]
        terms = []
        for sign, stepping, motions in zip((1.0, -1.0), ("ode", "renoise"), sides, strict=True):
            ids = [f"{contrast}-{stepping}-{seed}" for seed in SEEDS]
            keys = {"method": contrast, "stepping": stepping}
            runs += [
                {"run_id": run_id, "seed": seed, "motion": motion, "d": 1.0 + seed} | keys
                for run_id, seed, motion in zip(ids, SEEDS, motions, strict=True)
            ]
            terms.append({"weight": sign, "runs": ids})
        declared = {"declared": FIRST, "since": "", "at": "end", "difference_of": None}
        scores = {"scores": ["motion", "d"]}
        contrasts.append({"name": contrast, "terms": terms} | scores | declared)
    point = {"run_id": runs[0]["run_id"], "student_updates": 1}
    write_results(folder, SCORES, ["stepping"], None, runs, [point | {"motion": 1.0}], [point])
    update_json(folder / "sweep.json", name=name, contrasts=contrasts, launch=None)
    return by_seed


def drawn(axes) -> dict[int, tuple[float, float, float, bool]]:
    """Line of the figure -> (low, mean, high, filled)."""
    found = {}
    for container in axes.containers:
        marker, _, (bar,) = container.lines
        (low, line), (high, _) = bar.get_segments()[0]
        filled = marker.get_markerfacecolor() != style.GROUND
        found[round(line)] = (low, float(marker.get_xdata()[0]), high, filled)
    return found


def test_contrasts_of_one_name_stand_on_one_line_in_their_first_score(tmp_path):
    first = write_study(tmp_path / "a", "first", {"own": 0.1, "large": 0.3, "none": 0.0})
    second = write_study(tmp_path / "b", "second", {"none": 0.002, "large": -0.2})
    write_study(tmp_path / "c", "third", {"another": 0.5})
    figure = shared_contrasts([load(tmp_path / name) for name in "abc"])
    assert [axes.get_title().split("\n") for axes in figure.axes] == [
        ["first", "5 seeds"],
        ["second", "5 seeds"],
    ]
    assert {axes.get_xlabel() for axes in figure.axes} == {"difference in motion"}
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["large", "none"]
    for axes, values in zip(figure.axes, (first, second), strict=True):
        for line, (low, mean, high, filled) in drawn(axes).items():
            expected = stats.ttest_1samp(values[names[line]], 0).confidence_interval(0.95)
            assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-3)
            assert mean == pytest.approx(values[names[line]].mean(), rel=1e-3)
            assert filled == (names[line] == "large")
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


def test_studies_without_a_common_contrast_are_named(tmp_path, capsys):
    for name in ("one", "two"):
        write_study(tmp_path / name, name, {f"of {name}": 0.1})
    folders = [str(tmp_path / name) for name in ("one", "two")]
    assert main([*folders, "--out", str(tmp_path)]) == 2
    assert "no two of one, two declare a contrast" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*folders, "--y", "motion"])
    assert "--y needs one sweep" in capsys.readouterr().err


def test_the_committed_figure_shows_the_committed_results(tmp_path):
    names = ("stepping_mixture", "stepping_mixture_two_steps", "stepping_mini_wan")
    assert main([*(str(ROOT / "results" / name) for name in names), "--out", str(tmp_path)]) == 0
    committed = ROOT / "results" / "figures" / "contrasts.svg"
    assert (tmp_path / "figures" / "contrasts.svg").read_bytes() == committed.read_bytes()
