"""Seeds that contrasts need, against statsmodels, a simulation, and a pilot in a store."""

import io
import re
import sys
from math import hypot, sqrt

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from statsmodels.stats.power import TTestPower
from stores import write_store

from distill_bench.report.declarations import FIRST
from distill_bench.report.results import Column
from distill_bench.report.stats import Interval, power, t_quantile
from distill_bench.report.tables.contrasts import Estimate
from distill_bench.report.tables.power import (
    PlanError,
    SeedPlan,
    Target,
    main,
    parse_targets,
    plan_seeds,
    print_plan,
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


@pytest.mark.parametrize("sd", [0.3, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("clip_error", [0.0, 0.2])
def test_seeds_for_a_half_width_are_the_fewest(sd, confidence, clip_error):
    seeds = seeds_for_width(sd, 0.7, clip_error, confidence)

    def half(n):
        return stats.t.ppf((1 + confidence) / 2, n - 1) * (sd**2 / n + clip_error**2) ** 0.5

    assert half(seeds) <= 0.7
    assert seeds == 2 or half(seeds - 1) > 0.7


@pytest.mark.parametrize("seeds", [2, 3, 7, 999, 1000, 1001])
def test_as_many_seeds_as_just_suffice_are_planned_up_to_a_thousand(seeds):
    planned = seeds if seeds <= 1000 else None
    half = float(t_quantile(seeds - 1, 0.9)) * hypot(2.0 / sqrt(seeds), 0.0)
    assert seeds_for_width(2.0, half, 0.0, 0.9) == planned
    assert seeds_for_power(2.0, 0.5, 0.0, power(seeds, 2.0, 0.5, 0.9), 0.9) in (planned, None)
    if seeds < 10:  # the power of a thousand is 1
        assert seeds_for_power(2.0, 0.5, 0.0, power(seeds, 2.0, 0.5, 0.9), 0.9) == seeds


def test_seeds_cannot_make_up_for_few_clips():
    assert seeds_for_width(0.1, 0.5, clip_error=0.2) > seeds_for_width(0.1, 0.5, 0.0)
    assert seeds_for_width(0.1, 0.5, clip_error=0.3) is None
    assert seeds_for_power(0.1, 0.5, 0.3, 0.8, 0.95) is None


def test_the_upper_limit_of_a_spread_covers_it_in_four_of_five_pilots():
    draws = np.random.default_rng(1).normal(size=(4000, 4)).std(axis=1, ddof=1)
    assert np.mean([upper_sd(sd, 4) >= 1 for sd in draws]) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("seeds", [2, 3, 4, 12])
def test_the_upper_limit_of_a_spread_is_of_a_chi_square(seeds):
    quantile = stats.chi2.ppf(0.2, seeds - 1)
    assert upper_sd(3.0, seeds) == pytest.approx(3.0 * sqrt((seeds - 1) / quantile))


def estimate(score, sd, seeds, level=1.0, clip_error=0.0):
    interval = Interval(1.0, 0.0, 2.0, seeds)
    contrast = {"name": f"of {score}", "declared": FIRST, "at": "end"}
    return Estimate(contrast, Column(score, score), interval, seeds, sd, clip_error, level)


def test_each_estimate_is_planned_for_its_target_alone_and_at_the_strictest_level():
    """An estimate of two seeds is left out, and counts as a comparison, also of the same score."""
    found = [
        estimate("a", 1.0, 3),
        estimate("a", 0.5, 2),
        estimate("c", 2.0, 6, level=-40.0, clip_error=0.1),
        estimate("d", float("nan"), 6),
    ]
    targets = {"": Target(1.0), "c": Target(5.0, percent=True)}
    goals = {"a": 1.0, "c": 2.0}
    strict = 1 - 0.05 / 4
    plans = plan_seeds(found, targets, 0.9)
    assert [plan.estimate for plan in plans] == [found[0], found[2]]
    for plan in plans:
        one = plan.estimate
        assert plan.target == pytest.approx(goals[one.column.name])
        upper = upper_sd(one.sd, one.seeds)
        arguments = (plan.target, one.clip_error, 0.9)
        assert plan.alone == seeds_for_power(one.sd, *arguments, 0.95)
        assert plan.corrected == seeds_for_power(one.sd, *arguments, strict)
        assert plan.cautious == seeds_for_power(upper, *arguments, strict)
        assert plan.alone < plan.corrected < plan.cautious
    for plan in plan_seeds(found, targets, None):
        one = plan.estimate
        assert plan.alone == plan.corrected == seeds_for_width(one.sd, plan.target, one.clip_error)
        upper = upper_sd(one.sd, one.seeds)
        assert plan.cautious == seeds_for_width(upper, plan.target, one.clip_error)
    with pytest.raises(PlanError, match="no target for a"):
        plan_seeds(found, {"c": Target(1.0)}, 0.9)


def cells_of(plans, wanted):
    """Printed cells, line by line; the first stands at the left edge."""
    file = io.StringIO()
    print_plan([plan.estimate for plan in plans], plans, wanted, Console(file=file, width=300))
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert not any(line.startswith(" ") for line in lines)
    return [re.split(r"\s{2,}", line) for line in lines]


def test_a_plan_is_printed_with_its_targets_and_the_seeds_at_each_level():
    few = estimate("b", 0.25, 3, clip_error=0.3)
    plans = [
        SeedPlan(estimate("a", 1.0, 4), 1.25, 5, 7, None),
        SeedPlan(few, 1.96 * 0.3, None, 9, 11),
        SeedPlan(few, 0.6, None, 9, None),
    ]
    heads = ["contrast", "score", "pilot seeds", "sd of a seed"]
    upper = "seeds at the upper 80% limit of the sd"
    assert cells_of(plans, 0.9) == [
        [*heads, "difference, power 90%", "seeds", "seeds (Holm over 3)", upper],
        ["of a", "a", "4", "1", "1.25", "5", "7", "over 1000"],
        ["of b", "b", "3", "0.25", "0.588", "more clips", "9", "11"],
        ["of b", "b", "3", "0.25", "0.6", "over 1000", "9", "over 1000"],
    ]
    assert cells_of(plans, None) == [
        [*heads, "half width", "seeds", upper],
        ["of a", "a", "4", "1", "1.25", "5", "over 1000"],
        ["of b", "b", "3", "0.25", "0.588", "more clips", "11"],
        ["of b", "b", "3", "0.25", "0.6", "over 1000", "over 1000"],
    ]


PAIR = {"of": {"fake_score_updates": 5}, "minus": {"fake_score_updates": 1}, "scores": ["distance"]}


def pilot(folder, seeds, name="cadence", pair=PAIR):
    runs = [("alpha", s, c, 2 + c + (s * c) % 3) for c in (1, 5) for s in range(seeds)]
    return write_store(folder, runs, contrasts={name: pair})


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


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_the_pilot_of_a_sweep_file_is_its_own_sweep(tmp_path, suffix, capsys):
    """With the contrasts of the file, not with those of the store."""
    store = pilot(tmp_path, 3)
    plan = tmp_path / f"speed.{suffix}"
    plan.write_text(
        "question: q\ngrid: {method: [dmd2], fake_score_updates: [1, 5]}\ncontrasts:\n"
        "  mine: {of: fake_score_updates == 5, minus: fake_score_updates == 1, scores: [speed]}\n"
    )
    assert main([str(plan), "--store", str(store), "--half-width", "0.01"]) == 0
    captured = capsys.readouterr()
    head, line = captured.out.splitlines()
    assert "half width" in head and "Holm" not in head and not captured.err
    assert line.split()[:3] == ["mine", "Speed", "3"]


def test_names_are_printed_as_they_are_in_the_width_of_the_terminal(tmp_path, monkeypatch, capsys):
    store = pilot(tmp_path, 3, "[x] :smile: " + "and more " * 30)
    monkeypatch.chdir(store.parent)  # the store is the folder `runs` by default
    monkeypatch.setenv("COLUMNS", "120")
    for terminal, width in ((False, 160), (True, 120)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        assert main(["speed", "--effect", "1"]) == 0
        output = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
        assert max(map(len, output.splitlines())) == width
        assert "[x] :smile:" in output


def test_a_plan_needs_a_goal(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["speed", "--store", str(pilot(tmp_path, 3))])
    assert ended.value.code == 2
    assert "--effect --half-width is required" in capsys.readouterr().err


def test_an_unknown_score_is_told_the_known_ones(tmp_path, capsys):
    store = pilot(tmp_path, 3, pair=PAIR | {"scores": ["distance", "speed"]})
    assert main(["speed", "--store", str(store), "--effect", "fvd=1"]) == 2
    assert "'fvd'; known: distance, speed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seeds", "options", "message"),
    [
        (2, ["--effect", "1"], "cadence, distance: the pilot has 2 finished seeds"),
        (4, ["--effect", "speed=1"], "no contrast on the score 'speed'; known: distance"),
        (4, ["--effect", "fast"], "'fast': write a number above 0"),
        (4, ["--effect", "-1"], "'-1': write a number above 0"),
        (4, ["--effect", "inf"], "'inf': write a number above 0"),
        (4, ["--effect", "1", "--power", "1"], "--power 1: must be between 0 and 1"),
        (4, ["--effect", "1", "--power", "0"], "--power 0: must be between 0 and 1"),
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
