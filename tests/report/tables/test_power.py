"""Seeds that contrasts need, against statsmodels, a simulation, and a pilot in a store."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower
from stores import write_store

from distill_bench.report.tables.power import (
    main,
    parse_targets,
    seeds_for_power,
    seeds_for_width,
    upper_sd,
)


@pytest.mark.parametrize("sd", [0.3, 1.0])
@pytest.mark.parametrize("effect", [0.5, 0.8])
@pytest.mark.parametrize("confidence", [0.95, 1 - 0.05 / 30])
@pytest.mark.parametrize("wanted", [0.8, 0.95])
def test_seeds_for_a_power_are_those_of_statsmodels(sd, effect, confidence, wanted):
    seeds = seeds_for_power(sd, effect, 0.0, wanted, confidence)

    def known(n):
        return TTestPower().power(effect / sd, n, 1 - confidence)

    # scipy's noncentral t is nan far from 0, where the power is close to 1
    assert np.nan_to_num(known(seeds), nan=1.0) >= wanted - 1e-3
    assert seeds == 2 or np.nan_to_num(known(seeds - 1)) < wanted + 1e-3


def test_the_planned_seeds_detect_the_effect_in_a_simulation():
    generator = np.random.default_rng(0)
    seeds = seeds_for_power(1.0, 0.9, 0.0, 0.8, 0.95)
    draws = generator.normal(0.9, 1.0, (4000, seeds))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05) == pytest.approx(
        0.8, abs=0.04
    )


def test_seeds_for_a_half_width_are_the_fewest():
    seeds = seeds_for_width(2.0, 0.7, 0.0)

    def half(n):
        return stats.t.ppf(0.975, n - 1) * 2.0 / n**0.5

    assert half(seeds) <= 0.7 < half(seeds - 1)


def test_seeds_cannot_make_up_for_few_clips():
    assert seeds_for_width(0.1, 0.5, clip_error=0.2) > seeds_for_width(0.1, 0.5, 0.0)
    assert seeds_for_width(0.1, 0.5, clip_error=0.3) is None
    assert seeds_for_power(0.1, 0.5, 0.3, 0.8, 0.95) is None


def test_the_upper_limit_of_a_spread_covers_it_in_four_of_five_pilots():
    draws = np.random.default_rng(1).normal(size=(4000, 4)).std(axis=1, ddof=1)
    assert np.mean([upper_sd(sd, 4) >= 1 for sd in draws]) == pytest.approx(0.8, abs=0.02)


PAIR = {"of": {"fake_score_updates": 5}, "minus": {"fake_score_updates": 1}, "scores": ["distance"]}


def pilot(folder, seeds):
    runs = [("alpha", s, c, 2 + c + (s * c) % 3) for c in (1, 5) for s in range(seeds)]
    return write_store(folder, runs, contrasts={"cadence": PAIR})


def test_a_pilot_plans_its_contrasts(tmp_path, capsys):
    store = pilot(tmp_path, 5)
    assert main(["speed", "--store", str(store), "--effect", "1.5", "--power", "0.9"]) == 0
    line = capsys.readouterr().out.splitlines()[1].split()
    values = [4 + (s * 5) % 3 - s % 3 for s in range(5)]
    sd = np.std(values, ddof=1)
    expected = seeds_for_power(sd, 1.5, 0.0, 0.9, 0.95)
    cautious = seeds_for_power(upper_sd(sd, 5), 1.5, 0.0, 0.9, 0.95)
    cells = ["cadence", "Distance", "5", f"{sd:.3g}", "1.5", f"{expected}", f"{expected}"]
    assert line == [*cells, str(cautious)]


def test_contrasts_of_a_sweep_file_are_planned_from_another_sweep(tmp_path, capsys):
    store = pilot(tmp_path, 4)
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "question: q\ngrid: {method: [dmd2], fake_score_updates: [1, 5]}\ncontrasts:\n"
        "  mine: {of: fake_score_updates == 5, minus: fake_score_updates == 1, scores: [speed]}\n"
    )
    command = [str(plan), "--pilot", "speed", "--store", str(store), "--half-width", "50%"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["mine", "Speed", "4"]


@pytest.mark.parametrize(
    ("seeds", "options", "message"),
    [
        (2, ["--effect", "1"], "cadence, distance: the pilot has 2 finished seeds"),
        (4, ["--effect", "speed=1"], "no contrast on the score 'speed'; known: distance"),
        (4, ["--effect", "fast"], "'fast': write a number above 0"),
        (4, ["--effect", "-1"], "'-1': write a number above 0"),
        (4, ["--effect", "1", "--power", "1"], "--power 1: must be between 0 and 1"),
        (4, ["--pilot", "none", "--effect", "1"], "no sweep called 'none'"),
    ],
)
def test_what_cannot_be_planned_is_one_line(tmp_path, capsys, seeds, options, message):
    store = pilot(tmp_path, seeds)
    assert main(["speed", "--store", str(store), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_a_sweep_without_contrasts_is_one_line(tmp_path, capsys):
    store = write_store(tmp_path, [("alpha", 0, 1, 1.0)])
    assert main(["speed", "--store", str(store), "--effect", "1"]) == 2
    assert "declares no contrasts" in capsys.readouterr().err


def test_targets_are_absolute_or_relative_and_per_score():
    targets = parse_targets(["10%", "fvd=0.2"])
    assert (targets[""].value, targets[""].percent) == (10.0, True)
    assert (targets["fvd"].value, targets["fvd"].percent) == (0.2, False)
