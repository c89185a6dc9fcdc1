import json

import pytest
from stores import score, write_lines, write_run

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
    store = tmp_path / "runs"
    write_run(store, "alpha", 0, 1, 10.0)
    write_run(store, "alpha", 0, 5, 8.0)
    write_run(store, "beta", 1, 1, None, "collapsed")
    return store


def pair(store, first="alpha", second="beta"):
    return [find_run(next(store.glob(f"{name}-s*")).name, store) for name in (first, second)]


def test_what_differs_is_listed_and_nothing_else(store):
    a, b = (
        find_run(path.name, store)
        for path in sorted(store.glob("alpha-*"), key=lambda p: (p / "run.yaml").read_text())
    )
    assert config_differences(a, b) == [("fake_score_updates", 1, 5)]
    lines = {title: (mine, theirs, told) for title, mine, theirs, told in score_differences(a, b)}
    assert lines["Distance"] == (10.0, 8.0, "-2.00")
    assert lines["Training cost (forward equivalents)"] == (2000.0, 6000.0, "3.00 x")
    assert lines["Speed"][2].startswith("+0.025"), "over clips on the same prompts and noise"


def test_what_an_older_run_does_not_say_is_its_default(store):
    """Fields that came after a run are no difference at their default, and one where the newer run has another value."""
    for adapter, said in ((None, []), ({"rank": 4}, ["adapter.rank"])):
        later = {
            "weights": "float32",
            "sharding": False,
            "student_hash": "",
            "protocol": {"fps": 8.0},
            "adapter": adapter,
        }
        run_id = write_run(store, "alpha", 7 + len(said), 1, 10.0, **later)
        older = write_run(store, "alpha", 17 + len(said), 1, 10.0)
        told = [
            key for key, *_ in config_differences(find_run(older, store), find_run(run_id, store))
        ]
        assert told == ["seed", *said]


def test_no_two_scores_share_a_name(store, capsys):
    """By unit, else by extractor, else by column; a title in brackets is no markup."""
    a, b = (find_run(path.name, store) for path in sorted(store.glob("alpha-*")))
    more = [
        score("fd", 1.0, title="FD[x], to data", extractor="x#1"),
        score("fd_y", 1.0, title="FD[y], to data", extractor="y#1"),
        score("m", 1.0, title="motion", unit="px"),
        score("m_d", 1.0, title="motion", unit="%"),
        score("k", 1.0, title="KD", extractor="x#1"),
        score("k_y", 1.0, title="KD", extractor="y#1"),
        score("v", 1.0, title="other"),
        score("w", 1.0, title="other"),
    ]
    for run in (a, b):
        lines = [
            json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()
        ]
        write_lines(run.folder / "metrics.jsonl", lines + more)
    names = [
        name for name, *_ in score_differences(*(find_run(run.run_id, store) for run in (a, b)))
    ]
    assert len(set(names)) == len(names)
    wanted = [
        "motion (px)",
        "motion (%)",
        "KD [x#1]",
        "KD [y#1]",
        "other [v]",
        "other [w]",
        "FD[x], to data",
        "FD[y], to data",
    ]
    assert set(wanted) <= set(names)
    assert main([a.run_id, b.run_id, "--store", str(store)]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in wanted)


def test_unlike_scores_are_not_subtracted(store):
    a, b = (find_run(path.name, store) for path in sorted(store.glob("alpha-*")))
    lines = [json.loads(line) for line in (b.folder / "metrics.jsonl").read_text().splitlines()]
    write_lines(b.folder / "metrics.jsonl", [line | {"protocol": "p9"} for line in lines])
    told = {title: told for title, _, _, told in score_differences(a, find_run(b.run_id, store))}
    assert told["Distance"] == "not comparable: protocol p1 and p9"


def test_a_collapsed_run_is_compared_and_its_reason_said(store, capsys):
    a, b = pair(store)
    assert main([a.run_id, str(b.folder), "--store", str(store)]) == 0
    told = capsys.readouterr().out
    assert "collapsed: the latents are constant at student update 15" in told
    assert "alpha" in told and "beta" in told and "Distance" in told


def test_a_run_is_found_by_the_beginning_of_its_id_if_it_is_one(store, capsys):
    assert find_run("beta", store).method == "beta"
    with pytest.raises(CompareError, match="matches several runs: alpha-s0-.*, alpha-s0-"):
        find_run("alpha", store)
    assert main(["gamma", "beta", "--store", str(store)]) == 2
    assert "'gamma' is neither a run folder nor a run in" in capsys.readouterr().err


def test_clips_of_one_prompt_are_drawn_together():
    """Two clips a prompt that differ by the prompt alone are one clip: the interval is that of half as many."""
    each = [1.0, 2.0, 4.0, 7.0]
    a, b = (
        {"value": 0.0, "per_clip": [0.0] * 8},
        {"value": 3.5, "per_clip": [v for v in each for _ in range(2)]},
    )
    together = clip_difference(a, b, [f"prompt {i}" for i in range(4) for _ in range(2)])
    half = {key: [0.0] * 4 if key == "per_clip" else 0.0 for key in a}
    alone = clip_difference(
        half, {"value": 3.5, "per_clip": each}, [f"prompt {i}" for i in range(4)]
    )
    assert together.half == pytest.approx(alone.half, rel=1e-6)
    assert together.half > 1.3 * clip_difference(a, b, [f"prompt {i}" for i in range(8)]).half
