import shutil
from pathlib import Path

import pytest

from distill_bench.report.verify import main, verify

COMMITTED = sorted(
    path.parent for path in (Path(__file__).parents[2] / "results").glob("*/sweep.json")
)


@pytest.mark.slow
@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_every_committed_table_follows_from_the_data_beside_it(folder):
    assert verify(folder) == []


@pytest.fixture
def made(reported, tmp_path):
    """A copy of the results that a test may edit, and their store."""
    shutil.copytree(reported[0], tmp_path / "speed")
    return tmp_path / "speed", reported[1]


def edit(folder, name, old, new):
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))


def test_a_fresh_report_follows_from_its_data_and_its_store(made, capsys):
    folder, store = made
    assert verify(folder) == [] and verify(folder, store) == []
    assert main([str(folder), "--store", str(store)]) == 0
    assert "every table follows" in capsys.readouterr().out
    assert main([str(folder)]) == 0
    assert (
        "unchanged since the report" in (told := capsys.readouterr().out) and "training.csv" in told
    ), "what nothing else holds is named"


@pytest.mark.parametrize(
    "name, old, new, said",
    [
        (
            "table.csv",
            "11.1",
            "10.9",
            "table.csv:4: distance_mean of alpha fake_score_updates=1 is '10.9', the data give '11.1'",
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
        ("seeds_needed.csv", "distance,", "distanze,", "seeds_needed.csv:2: column"),
        (
            "report.html",
            "11.1 ±",
            "10.9 ±",
            "report.html: its SHA-256 differs",
        ),
        (
            "report.html",
            "Lowest in Distance: beta",
            "Lowest in Distance: alpha",
            "report.html: its SHA-256 differs",
        ),
        (
            "report.html",
            "0 of 2 rows clearly better",
            "1 of 2 rows clearly better",
            "report.html: its SHA-256 differs",
        ),
        ("report.html", ">2000</td>", ">1000</td>", "report.html: its SHA-256 differs"),
        ("report.html", 'stroke-width="', 'stroke-width="1', "report.html: its SHA-256"),
        ("equal_cost_differences.csv", ",3,", ",4,", "equal_cost_differences.csv:"),
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
def test_a_number_that_was_edited_is_named(made, capsys, name, old, new, said):
    edit(made[0], name, old, new)
    assert main([str(made[0])]) == 1
    assert said in capsys.readouterr().out


def test_an_edited_run_shows_in_every_table_made_of_it(made):
    lines = (made[0] / "runs.csv").read_text().splitlines()
    line = next(line for line in lines if ",10.0," in line)
    edit(made[0], "runs.csv", line, line.replace(",10.0,", ",7.0,", 1))
    found = "\n".join(verify(made[0]))
    assert all(
        name in found
        for name in ("runs.csv:", "table.csv:", "table.md:", "differences.csv:", "table.tex:")
    )


def test_with_the_store_the_data_files_are_held_against_the_runs(made):
    folder, store = made
    edit(folder, "training.csv", "0.45", "0.44")
    assert any("the data give '0.45'" in line for line in verify(folder, store))


@pytest.mark.parametrize(
    "name", ["training.csv", "digests.json", "report.html", "equal_cost_differences.csv"]
)
def test_a_file_that_is_gone_is_missed(made, name):
    (made[0] / name).unlink()
    assert any(line.startswith(f"{name} is missing") for line in verify(made[0]))


@pytest.mark.parametrize(
    "name", ["sweep.json", "runs.csv", "clips.csv", "checkpoints.csv", "training.csv"]
)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_data_file_that_is_cut_off_is_named(made, name, share, capsys):
    folder, _ = made
    text = (folder / name).read_bytes()
    (folder / name).write_bytes(text[: int(share * len(text))])
    assert main([str(folder)]) in (1, 2)
    assert name in "".join(capsys.readouterr())


def test_a_figure_that_was_changed_or_is_gone_is_named(made, capsys):
    folder, _ = made
    (folder / "figures" / "overview.png").write_bytes(b"x")
    (folder / "figures" / "overview.svg").unlink()
    assert main([str(folder)]) == 1
    said = capsys.readouterr().out
    assert "figures/overview.png: its SHA-256" in said and "figures/overview.svg is missing" in said
