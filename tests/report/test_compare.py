"""Two runs compared: fields that differ, and scores with their differences."""

import json

import pytest
from stores import edit_lines, score, write_lines, write_run

from distill_bench.report.compare import (
    CompareError,
    clip_difference,
    config_differences,
    find_run,
    main,
    score_differences,
)


@pytest.fixture
def store(tmp_path):
    """Two runs of alpha, at one and at five fake-score updates, and a collapsed run of beta."""
    store = tmp_path / "runs"
    write_run(store, "alpha", 0, 1, 10.0)
    write_run(store, "alpha", 0, 5, 8.0)
    write_run(store, "beta", 1, 1, None, "collapsed")
    return store


@pytest.fixture
def alphas(store):
    """The runs of alpha, the one with fewer updates first."""
    runs = [find_run(path.name, store) for path in store.glob("alpha-*")]
    return sorted(runs, key=lambda run: run.config["fake_score_updates"])


def test_only_the_differing_field_is_listed(alphas):
    assert config_differences(*alphas) == [("fake_score_updates", 1, 5)]


def test_scores_are_subtracted_and_costs_divided(alphas):
    lines = {name: values for name, *values in score_differences(*alphas)}
    assert lines["Distance"] == [10.0, 8.0, "-2.00"]
    assert lines["Training cost (forward equivalents)"] == [2000.0, 6000.0, "3.00 x"]
    difference = lines["Speed"][2]
    assert difference.startswith("+0.025"), "over clips with the same prompts and noise"


@pytest.mark.parametrize(
    "adapter, differing", [(None, []), ({"rank": 4}, ["adapter.rank"])], ids=["default", "set"]
)
def test_a_field_that_an_older_run_lacks_has_its_default(store, adapter, differing):
    added = {
        "weights": "float32",
        "sharding": False,
        "student_hash": "",
        "protocol": {"fps": 8.0},
        "adapter": adapter,
    }
    newer = find_run(write_run(store, "alpha", 7, 1, 10.0, **added), store)
    older = find_run(write_run(store, "alpha", 17, 1, 10.0), store)
    keys = [key for key, *_ in config_differences(older, newer)]
    assert keys == ["seed", *differing]


def test_scores_of_one_title_are_told_apart(store, alphas, capsys):
    """By unit, else by extractor, else by column. Square brackets in a title are not markup."""
    scores = [
        score("fd", 1.0, title="FD[x], to data", extractor="x#1"),
        score("fd_y", 1.0, title="FD[y], to data", extractor="y#1"),
        score("m", 1.0, title="motion", unit="px"),
        score("m_d", 1.0, title="motion", unit="%"),
        score("k", 1.0, title="KD", extractor="x#1"),
        score("k_y", 1.0, title="KD", extractor="y#1"),
        score("v", 1.0, title="other"),
        score("w", 1.0, title="other"),
    ]
    for run in alphas:
        path = run.folder / "metrics.jsonl"
        write_lines(path, [*map(json.loads, path.open()), *scores])
    a, b = (find_run(run.run_id, store) for run in alphas)
    names = [name for name, *_ in score_differences(a, b)]
    assert len(set(names)) == len(names)
    expected = {
        "motion (px)",
        "motion (%)",
        "KD [x#1]",
        "KD [y#1]",
        "other [v]",
        "other [w]",
        "FD[x], to data",
        "FD[y], to data",
    }
    assert expected <= set(names)
    assert main([a.run_id, b.run_id, "--store", str(store)]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in expected)


def test_scores_of_different_protocols_are_not_subtracted(store, alphas):
    a, b = alphas
    edit_lines(b.folder / "metrics.jsonl", lambda line: line | {"protocol": "p9"})
    lines = {name: values for name, *values in score_differences(a, find_run(b.run_id, store))}
    assert lines["Distance"][2] == "not comparable: protocol p1 and p9"


def test_a_collapsed_run_is_compared_and_its_reason_printed(store, alphas, capsys):
    collapsed = find_run("beta", store)
    assert main([alphas[0].run_id, str(collapsed.folder), "--store", str(store)]) == 0
    output = capsys.readouterr().out
    assert "collapsed: the latents are constant at student update 15" in output
    assert "alpha" in output and "beta" in output and "Distance" in output


def test_a_run_is_found_by_the_unique_beginning_of_its_id(store, capsys):
    assert find_run("beta", store).method == "beta"
    with pytest.raises(CompareError, match="matches several runs: alpha-s0-.*, alpha-s0-"):
        find_run("alpha", store)
    assert main(["gamma", "beta", "--store", str(store)]) == 2
    assert "'gamma' is neither a run folder nor a run in" in capsys.readouterr().err


def test_clips_of_one_prompt_are_resampled_together():
    """Pairs of equal clips of one prompt give the interval of half as many clips."""
    differences = [1.0, 2.0, 4.0, 7.0]
    doubled = [value for value in differences for _ in range(2)]

    def half_width(values, prompts):
        a = {"value": 0.0, "per_clip": [0.0] * len(values)}
        b = {"value": 3.5, "per_clip": values}
        return clip_difference(a, b, [f"prompt {i}" for i in prompts]).half

    together = half_width(doubled, [0, 0, 1, 1, 2, 2, 3, 3])
    assert together == pytest.approx(half_width(differences, range(4)), rel=1e-6)
    assert together > 1.3 * half_width(doubled, range(8))
