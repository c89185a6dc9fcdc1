"""Two runs compared: fields that differ, and scores with their differences."""

import dataclasses
import io
import json
import re
import sys

import numpy as np
import pytest
from rich.console import Console
from stores import edit_lines, score, update_json, write_lines, write_run

from distill_bench.report.compare import (
    CompareError,
    clip_difference,
    config_differences,
    find_run,
    main,
    print_comparison,
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


def test_method_seed_code_and_hardware_are_compared_too(store, alphas):
    collapsed = find_run("beta", store)
    expected = [("method", "alpha", "beta"), ("seed", 0, 1)]
    assert config_differences(alphas[0], collapsed) == expected
    update_json(collapsed.folder / "attempts" / "001" / "start.json", hardware="GPU")
    update_json(collapsed.folder / "result.json", version="0.2.0", protocol="p2")
    recorded = [("version", "0.1.0", "0.2.0"), ("hardware", None, "GPU"), ("protocol", "p1", "p2")]
    found = config_differences(alphas[0], find_run("beta", store))
    assert found[:2] == expected and sorted(found[2:]) == sorted(recorded)


def test_an_old_protocol_without_a_field_has_its_default(store, alphas):
    """Each field of the protocol counts for itself, in run.yaml's own spelling."""
    for fields in ({"fps": 8.0}, {"fps": 9.0, "clips": 5}):
        newer = find_run(write_run(store, "alpha", 7, 1, 10.0, protocol=fields), store)
        keys = {key: b for key, _, b in config_differences(alphas[0], newer)}
        assert keys == {"seed": 7} | {f"protocol.{k}": v for k, v in fields.items() if v != 8.0}


def test_scores_are_subtracted_and_costs_divided(alphas):
    lines = {name: values for name, *values in score_differences(*alphas)}
    assert lines["Distance"] == [10.0, 8.0, "-2.00"]
    assert lines["Training cost (forward equivalents)"] == [2000.0, 6000.0, "3.00 x"]
    assert lines["Training time (s)"] == [10.0, 10.0, "1.00 x"]
    assert lines["Speed"][2] == "+0.0250", "clips that differ by the same have no interval"


def test_the_interval_is_over_clips_of_the_same_prompts_and_noise(store, alphas):
    """In the newest samples. Without the same clips there is a difference, and no interval."""
    a, b = alphas
    values = [0.1, 0.5, 0.3]
    change = {"per_clip": values, "value": float(np.mean(values))}
    edit_lines(
        b.folder / "metrics.jsonl",
        lambda line: line | (change if line["column"] == "speed" else {}),
    )

    def speed():
        lines = score_differences(find_run(a.run_id, store), find_run(b.run_id, store))
        return {name: difference for name, *_, difference in lines}["Speed"]

    changes = np.subtract(values, a.scores["speed"]["per_clip"])
    mean, sign = f"{changes.mean():+.2f}", "±"
    assert speed().startswith(mean) and sign in speed()
    manifest = b.folder / "samples" / "20" / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for field, other in (("seed", 99), ("prompt", "another")):
        write_lines(manifest, [*lines[:-1], lines[-1] | {field: other}])
        assert sign not in speed(), field
    write_lines(manifest, lines[::-1])
    assert sign not in speed(), "clips in another order are no pairs"
    write_lines(manifest, [*lines[:-1], lines[-1] | {"seed": 99}])
    write_lines(b.folder / "samples" / "10" / "manifest.jsonl", lines)
    assert sign not in speed(), "the clips of an earlier checkpoint are not compared"
    manifest.unlink()
    assert sign not in speed()


def test_a_score_of_an_unknown_network_is_not_subtracted(store, alphas):
    a, b = alphas
    line = a.scores["distance"]
    edit_lines(
        b.folder / "metrics.jsonl",
        lambda one: {k: v for k, v in one.items() if k != "extractor"},
    )
    b = find_run(b.run_id, store)
    assert line["extractor"] and "extractor" not in b.scores["distance"]
    for first, second in ((a, b), (b, a)):
        (difference,) = (
            d for name, *_, d in score_differences(first, second) if name == "Distance"
        )
        assert not re.match(r"[+-]\d", difference) and "extractor" in difference


def test_what_one_run_lacks_is_not_subtracted(store, alphas):
    a, b = alphas
    edit_lines(b.folder / "metrics.jsonl", lambda line: line if line["column"] == "speed" else None)
    b = find_run(b.run_id, store)
    b = dataclasses.replace(b, result=b.result | {"train_seconds": None, "peak_memory_gib": 0.0})
    for first, second in ((a, b), (b, a)):
        lines = {name: values for name, *values in score_differences(first, second)}
        assert {name for name, values in lines.items() if values[2] == "—"} == {
            "Distance",
            "Detail",
            "Training time (s)",
            "Peak memory (GiB)",
        }
        assert sorted(lines["Distance"][:2], key=str) == [10.0, None]
        assert sorted(lines["Training time (s)"][:2], key=str) == [10.0, None]
        assert sorted(lines["Peak memory (GiB)"][:2]) == [0.0, 0.5]


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
        score("s", 1.0, title="smile :smile:"),
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
        "smile :smile:",
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


def test_a_run_that_never_started_is_compared(store, alphas, capsys):
    """It has neither samples nor scores; its config is compared."""
    write_run(store, "gamma", 0, 1, None, "missing")
    assert main(["gamma", alphas[0].run_id, "--store", str(store)]) == 0
    output = capsys.readouterr().out
    assert "missing" in output and "gamma" in output


def test_a_run_is_found_by_the_unique_beginning_of_its_id(store, capsys):
    assert find_run("beta", store).method == "beta"
    with pytest.raises(CompareError, match="matches several runs: alpha-s0-.*, alpha-s0-"):
        find_run("alpha", store)
    for seed in range(1, 6):
        write_run(store, "alpha", seed, 1, 10.0)
    with pytest.raises(CompareError, match="^[^,]*(, [^,]*){4}$"):
        find_run("alpha", store)  # names five of seven
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


def test_without_values_per_clip_the_difference_has_no_interval():
    """Also if the runs have other clips, or other numbers of clips."""
    a, b = {"value": 1.0, "per_clip": [0.0, 2.0]}, {"value": 4.0, "per_clip": [5.0, 3.0]}
    none = {"value": 4.0, "per_clip": None}
    prompts = ["x", "y"]
    whole = clip_difference(a, b, prompts)
    assert whole.mean == pytest.approx(3.0) and np.isfinite(whole.half)
    for other, clips in ((none, prompts), (b, None), (b, ["x"]), (b, [])):
        interval = clip_difference(a, other, clips)
        assert interval.mean == 3.0 and interval.n == 1
        assert np.isnan([interval.low, interval.high]).all()


def printed(a, b, **options):
    file = io.StringIO()
    print_comparison(a, b, Console(file=file, width=120, markup=False, emoji=False, **options))
    return file.getvalue()


def table_under(title, text):
    """Cells of a table, as drawn in its columns; the title stands above it at the left edge."""
    lines = [line.rstrip() for line in text.splitlines()]
    below = lines[lines.index(title) + 1 :]
    end = next(i for i, line in enumerate(below) if line.startswith("└"))
    return [
        line.strip("│┃").replace("┃", "│").split("│") for line in below[:end] if line[0] in "│┃"
    ]


def stripped(rows):
    return [[cell.strip() for cell in row] for row in rows]


SCORES = "Scores (± over clips, on the same prompts and noise)"


def test_both_tables_are_printed(store, alphas):
    """Each run with its state, then each difference with the value of A before that of B."""
    a, b = alphas[0], find_run("beta", store)
    update_json(b.folder / "attempts" / "001" / "start.json", commit="", hardware="CPU")
    b = find_run("beta", store)
    text = printed(a, b)
    heads = [f"A  {a.run_id}  done", f"B  {b.run_id}  collapsed"]
    assert text.splitlines()[:2] == heads
    assert text.splitlines()[-1] == f"B collapsed: {b.reason}", "A has no reason"
    assert stripped(table_under("Differences", text)) == [
        ["config", "A", "B"],
        ["method", "alpha", "beta"],
        ["seed", "0", "1"],
        ["commit", "abc123", "—"],
        ["hardware", "—", "CPU"],
    ]
    assert stripped(table_under(SCORES, text)) == [
        ["score", "A", "B", "B - A"],
        ["Distance", "10", "—", "—"],
        ["Speed", "0.2", "—", "—"],
        ["Detail", "0.5", "—", "—"],
        ["Training cost (forward equivalents)", "2000", "2000", "1.00 x"],
        ["Training time (s)", "10", "11", "1.10 x"],
        ["Peak memory (GiB)", "0.5", "0.5", "1.00 x"],
    ]
    assert text.splitlines()[-1] == printed(b, a).splitlines()[-1].replace("A coll", "B coll")


def test_numbers_stand_at_the_right_edge_of_their_column(alphas):
    _, *values = zip(*table_under(SCORES, printed(*alphas)), strict=True)
    for column in values:
        assert all(cell.endswith(f"{cell.strip()} ") for cell in column)
        assert any(cell.startswith("  ") for cell in column), "some cell is narrower"


def test_equal_configs_are_said_to_be_equal(alphas):
    a, _ = alphas
    assert printed(a, a).splitlines()[2] == "The configs are the same."


def test_ids_and_reasons_have_no_colours(alphas):
    """The table may have them; an id must not read like a number with a word."""
    a, b = (dataclasses.replace(run, run_id="15 of 20", reason="at update 15") for run in alphas)
    text = printed(a, b, force_terminal=True, color_system="standard")
    assert "A  15 of 20  done\n" in text and "B  15 of 20  done\n" in text
    assert "A done: at update 15\n" in text and "B done: at update 15\n" in text


def test_a_table_is_as_wide_as_the_terminal_else_120_letters(store, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "90")
    value = "/a/very/long/path" * 20
    runs = [write_run(store, "alpha", 3, 1, 10.0, init=value), "beta"]
    for terminal, width in ((False, 120), (True, 90)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        assert main([*runs, "--store", str(store)]) == 0
        output = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)  # without styles
        assert max(map(len, output.splitlines())) == width
    assert output.index("alpha-s3") < output.index("beta-s1")


def test_runs_of_the_folder_runs_are_compared_by_default(store, monkeypatch, capsys):
    monkeypatch.chdir(store.parent)
    assert main(["beta", "beta"]) == 0
    assert "The configs are the same." in capsys.readouterr().out
