"""Every edit of a results folder is found: in tables, data files, figures and the page."""

import shutil
from pathlib import Path

import pytest

from distill_bench.report.verify import main, verify

COMMITTED = sorted((Path(__file__).parents[2] / "results").glob("*/sweep.json"))
DATA_FILES = ["sweep.json", "runs.csv", "clips.csv", "checkpoints.csv", "training.csv"]


@pytest.mark.slow
@pytest.mark.parametrize("manifest", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_results_follow_from_their_data_files(manifest):
    assert verify(manifest.parent) == []


@pytest.fixture
def copied(reported, tmp_path):
    """A results folder that a test may edit, and its store."""
    folder, store = reported
    return shutil.copytree(folder, tmp_path / "speed"), store


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_fresh_report_follows_from_its_data_files_and_its_store(copied, capsys):
    folder, store = copied
    assert verify(folder) == verify(folder, store) == []
    assert main([str(folder), "--store", str(store)]) == 0
    assert "every table follows" in capsys.readouterr().out
    assert main([str(folder)]) == 0
    output = capsys.readouterr().out
    assert "unchanged since the report" in output
    assert "training.csv" in output, "files that were only compared with digests are named"


PAGE = "report.html: its SHA-256 differs from digests.json"


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        (
            "table.csv",
            "11.1",
            "10.9",
            (
                "table.csv:4: distance_mean of alpha fake_score_updates=1 is '10.9', "
                "the data give '11.1'"
            ),
        ),
        ("table.md", "11.1", "10.9", "table.md:"),
        ("table.tex", "11.1", "10.9", "table.tex:"),
        (
            "differences.csv",
            "40.4",
            "44.4",
            "difference of distance is '44.4', the data give '40.4'",
        ),
        ("equal_cost.csv", "2000", "3000", "equal_cost.csv:2: cost_forward_equivalents"),
        ("equal_cost_differences.csv", ",3,", ",4,", "equal_cost_differences.csv:"),
        ("seeds_needed.csv", "distance,", "distanze,", "seeds_needed.csv:2: column"),
        ("report.html", "11.1 ±", "10.9 ±", PAGE),
        ("report.html", "Lowest in Distance: beta", "Lowest in Distance: alpha", PAGE),
        ("report.html", "0 of 2 rows clearly better", "1 of 2 rows clearly better", PAGE),
        ("report.html", ">2000</td>", ">1000</td>", PAGE),
        ("report.html", 'stroke-width="', 'stroke-width="1', PAGE),
        ("training.csv", "0.45", "0.44", "training.csv: its SHA-256 differs from digests.json"),
        (
            "checkpoints.csv",
            ",10,1000.0,5.0,30.0",
            ",10,1000.0,5.0,31.0",
            "checkpoints.csv: its SHA-256",
        ),
        ("clips.csv", "0.1 0.2 0.3", "0.1 0.2 0.9", "its clips average"),
        (
            "checkpoints.csv",
            ",20,2000.0,10.0,10.0",
            ",20,2000.0,10.0,9.0",
            "its last line in checkpoints.csv has 9",
        ),
    ],
)
def test_an_edited_number_is_named(copied, capsys, name, old, new, message):
    folder, _ = copied
    edit(folder / name, old, new)
    assert main([str(folder)]) == 1
    assert message in capsys.readouterr().out


def test_an_edited_run_contradicts_every_table_that_uses_it(copied):
    folder, _ = copied
    edit(folder / "runs.csv", ",10.0,", ",7.0,")
    differences = "\n".join(verify(folder))
    for name in ("runs.csv:", "table.csv:", "table.md:", "differences.csv:", "table.tex:"):
        assert name in differences


def test_with_the_store_data_files_are_recomputed_from_the_runs(copied):
    folder, store = copied
    edit(folder / "training.csv", "0.45", "0.44")
    assert any("the data give '0.45'" in line for line in verify(folder, store))


@pytest.mark.parametrize(
    "name", ["training.csv", "digests.json", "report.html", "equal_cost_differences.csv"]
)
def test_a_missing_file_is_named(copied, name):
    folder, _ = copied
    (folder / name).unlink()
    assert any(line.startswith(f"{name} is missing") for line in verify(folder))


@pytest.mark.parametrize("name", DATA_FILES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_data_file_is_named(copied, name, share, capsys):
    folder, _ = copied
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    assert main([str(folder)]) in (1, 2)
    assert name in "".join(capsys.readouterr())


def test_changed_and_missing_figures_are_named(copied, capsys):
    folder, _ = copied
    (folder / "figures" / "overview.png").write_bytes(b"x")
    (folder / "figures" / "overview.svg").unlink()
    assert main([str(folder)]) == 1
    output = capsys.readouterr().out
    assert "figures/overview.png: its SHA-256" in output
    assert "figures/overview.svg is missing" in output
