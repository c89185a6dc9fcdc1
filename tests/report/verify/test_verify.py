"""Every edit of a results folder is found: in tables, data files, figures and the page."""

import csv
import io
import json
import shutil

import pytest
from stores import RUNS, load_results, write_store

from distill_bench.report import ResultsError
from distill_bench.report.digests import digests
from distill_bench.report.verify import MOST, main, verify

TABLES = [
    "table.csv",
    "equal_cost.csv",
    "differences.csv",
    "equal_cost_differences.csv",
    "seeds_needed.csv",
]
DATA_FILES = ["sweep.json", "runs.csv", "clips.csv", "checkpoints.csv", "training.csv"]


@pytest.fixture
def copied(tabulated, tmp_path):
    """A results folder that a test may edit, and its store."""
    folder, store = tabulated
    return shutil.copytree(folder, tmp_path / "speed"), store


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "old, new",
    [
        ("11.1 ±", "10.9 ±"),
        ("Lowest in Distance: Beta", "Lowest in Distance: Alpha"),
        ("0 of 2 rows clearly better", "1 of 2 rows clearly better"),
        (">2000</td>", ">1000</td>"),
        ("stroke-width:", "stroke-width:1"),
    ],
)
def test_an_edited_page_is_named(reported, tmp_path, old, new):
    folder = shutil.copytree(reported[0], tmp_path / "speed")
    edit(folder / "report.html", old, new)
    (difference,) = verify(folder, reported[1])
    assert difference.startswith("report.html: its SHA-256 differs from digests.json")


@pytest.mark.slow
def test_a_report_follows_from_its_data_files_and_its_store(reported):
    folder, store = reported
    assert verify(folder) == verify(folder, store) == []


def test_fresh_tables_follow_from_their_data_files_and_their_store(copied, capsys):
    """The command says which files were recomputed, and which were compared with digests only."""
    folder, store = copied
    assert verify(folder) == verify(folder, store) == []
    first = f"{folder}: every table follows from the data files"
    assert main([str(folder), "--store", str(store)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        first,
        f"recomputed from the runs: {', '.join(DATA_FILES)}",
        "unchanged since the report, by digests.json: page and figures",
    ]
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        first,
        f"unchanged since the report, by digests.json: page, figures, {', '.join(DATA_FILES)}",
        "to recompute the data files from the runs: --store RUNS",
    ]


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        (
            "table.csv",
            "11.1",
            "10.9",
            ("table.csv:4: distance_mean of Alpha, K=1 is '10.9', the data give '11.1'"),
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
    edit(folder / "sweep.json", "Does a faster", "Does a slower")
    edit(folder / "table.csv", "11.1", "10.9")
    differences = verify(folder, store)
    assert any("the data give '0.45'" in line for line in differences)
    assert any("Does a slower" in line and "Does a faster" in line for line in differences)
    assert any(line.startswith("table.csv:4: distance_mean") for line in differences)


@pytest.mark.parametrize("name", DATA_FILES)
def test_an_edit_that_is_hidden_by_new_digests_differs_from_the_runs(copied, name):
    """Of every data file; without the store it contradicts a table, or cannot be found."""
    folder, store = copied
    old, new = {
        "sweep.json": ('"unit": ""', '"unit": "px"'),
        "runs.csv": (",11.0,", ",11.5,"),  # seconds of training
        "clips.csv": ("0.2 0.3", "0.3 0.2"),
        "checkpoints.csv": (",30.0", ",30.5"),
        "training.csv": ("0.45", "0.44"),
    }[name]
    edit(folder / name, old, new)
    (folder / "digests.json").write_text(json.dumps(digests(folder)))
    assert any(line.startswith(f"{name}:") for line in verify(folder, store))


@pytest.mark.parametrize("of_sweep", [True, False])
def test_the_store_is_read_with_the_baseline_and_the_budget_of_the_report(tmp_path, of_sweep):
    """The baseline of the command, which sweep.json names, or that of the sweep's file."""
    baseline = {"method": "alpha", "fake_score_updates": "5"}
    store = write_store(tmp_path, RUNS, **({"baseline": baseline} if of_sweep else {}))
    options = {} if of_sweep else {"baseline": baseline}
    load_results(store, tmp_path / "data", budget=1500.0, **options)
    assert not any(
        "sweep.json" in line for line in verify(tmp_path / "data", store) if "SHA" not in line
    )
    manifest = json.loads((tmp_path / "data" / "sweep.json").read_text())
    assert manifest["baseline"] == baseline and manifest["budget"] == 1500.0
    assert ("--baseline" in manifest["provenance"]["command"]) != of_sweep


def test_the_command_fails_on_a_difference_and_on_bad_input(copied, capsys):
    folder, store = copied
    assert main([str(folder / "nothing")]) == 2
    assert "no sweep.json" in capsys.readouterr().err
    assert main([str(folder), "--store", str(folder)]) == 2
    assert "no sweep called 'speed'" in capsys.readouterr().err
    assert main([str(folder), "--store", str(store)]) == 0
    assert "recomputed from the runs: sweep.json, runs.csv" in capsys.readouterr().out
    (folder / "table.csv").write_text("")
    assert main([str(folder)]) == 1
    assert capsys.readouterr().out.startswith("table.csv: its columns are not label, method")


@pytest.mark.parametrize(
    "name", ["training.csv", "digests.json", "report.html", "equal_cost_differences.csv"]
)
def test_a_missing_file_is_named(copied, name):
    folder, _ = copied
    (folder / name).unlink()
    assert any(line.startswith(f"{name} is missing") for line in verify(folder))


def test_every_missing_table_is_named(copied):
    folder, _ = copied
    names = [path.name for path in folder.glob("*") if path.name in [*TABLES, "table.tex"]]
    for name in names:
        (folder / name).unlink()
    assert sorted(verify(folder)) == sorted(f"{name} is missing" for name in names)


@pytest.mark.parametrize("name", ["contrasts.csv", "contrasts.tex", "table-2.csv"])
def test_a_table_that_the_report_does_not_write_is_named(copied, name, capsys):
    """Such as the contrasts of a sweep whose file declared them once."""
    folder, _ = copied
    shutil.copy(folder / "table.csv", folder / name)
    assert main([str(folder)]) == 1
    assert capsys.readouterr().out == f"{name}: the report writes no such file: delete it\n"
    (folder / name).rename(folder / "README.md")
    assert verify(folder) == [], "other files may lie there"


def test_bytes_that_are_no_text_are_a_difference(copied):
    folder, _ = copied
    for name in ("table.md", "table.csv"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-9] + b"\xff" + content[-8:])
    assert {line.partition(":")[0] for line in verify(folder)} == {"table.md", "table.csv"}


def cells_of(path):
    return list(csv.reader(io.StringIO(path.read_text())))


def write_cells(path, lines):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    path.write_text(text.getvalue())


def last_digit_changed(lines):
    """The lines of a CSV file with another last digit in each cell that is a number."""
    changed = [list(line) for line in lines]
    for line in changed[1:]:
        for i, cell in enumerate(line):
            if cell[-1:].isdigit():
                line[i] = cell[:-1] + str((int(cell[-1]) + 1) % 10)
    return changed


@pytest.mark.parametrize("name", TABLES)
def test_every_changed_number_of_a_table_is_named(copied, name):
    """One line per changed cell, or per changed line of text; at most MOST of them are printed."""
    folder, _ = copied
    lines = cells_of(folder / name)
    changed = last_digit_changed(lines)
    write_cells(folder / name, changed)
    count = sum(
        a != b for x, y in zip(lines, changed, strict=True) for a, b in zip(x, y, strict=True)
    )
    differences = verify(folder)
    assert count and all(line.startswith(f"{name}:") for line in differences)
    shown = min(count, MOST)
    assert len(differences) == shown + (count > MOST)
    if count > MOST:
        assert differences[-1] == f"{name}: and {count - MOST} more"
    number, column = next(
        (i, j)
        for i, line in enumerate(lines)
        for j, cell in enumerate(line)
        if cell != changed[i][j]
    )
    place = f"{name}:{number + 1}: {lines[0][column]} of {lines[number][0]} is "
    cells = f"{changed[number][column]!r}, the data give {lines[number][column]!r}"
    assert differences[0] == place + cells


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: lines[:-1], ": a line is missing"),
        (lambda lines: [*lines, lines[-1]], ": an extra line"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "the data give"),
        (lambda lines: [line[:-1] for line in lines], "its columns are not"),
        (lambda lines: [[*line, ""] for line in lines], "its columns are not"),
        (lambda lines: [lines[0], [*lines[1], "1"], *lines[2:]], "None of"),
        (lambda lines: [line[1::-1] + line[2:] for line in lines], "its columns are not"),
        (lambda lines: [], "its columns are not"),
    ],
    ids=["lost", "doubled", "swapped", "narrower", "wider", "longer", "turned", "empty"],
)
def test_lost_added_and_moved_cells_of_every_table_are_named(copied, change, message):
    folder, _ = copied
    names = [name for name in TABLES if len(cells_of(folder / name)) > 2]
    for name in names:
        write_cells(folder / name, change(cells_of(folder / name)))
    differences = verify(folder)
    for name in names:
        assert any(line.startswith(name) and message in line for line in differences), name


@pytest.mark.parametrize("name", ["table.md", "table.tex", "equal_cost.tex"])
def test_changed_lost_and_added_lines_of_a_text_are_named(copied, name):
    folder, _ = copied
    text = (folder / name).read_text()
    lines = text.splitlines()
    (folder / name).write_text("\n".join(["x", *lines[1:]]))
    assert verify(folder) == [f"{name}:1: is 'x', the data give {lines[0]!r}"]
    (folder / name).write_text("\n".join(lines[:-1]) + "\n")
    assert verify(folder) == [f"{name}:{len(lines)}: is None, the data give {lines[-1]!r}"]
    for count in (1, MOST, MOST + 1):
        (folder / name).write_text(text + "more\n" * count)
        shown = [f"{name}:{len(lines) + i}: is 'more', the data give None" for i in range(1, 99)]
        rest = [f"{name}: and 1 more"] if count > MOST else []
        assert verify(folder) == shown[: min(count, MOST)] + rest


@pytest.mark.parametrize("count", [1, 3])
def test_every_lost_and_every_added_line_of_a_table_is_named(copied, count):
    folder, _ = copied
    lines = cells_of(folder / "differences.csv")
    write_cells(folder / "differences.csv", lines[:-count])
    places = [f"differences.csv:{len(lines) + 1 - i}" for i in range(count, 0, -1)]
    assert verify(folder) == [f"{place}: a line is missing" for place in places]
    write_cells(folder / "differences.csv", [*lines, *lines[-count:]])
    places = [f"differences.csv:{len(lines) + i}" for i in range(1, count + 1)]
    assert verify(folder) == [f"{place}: an extra line" for place in places]


@pytest.mark.parametrize("name", DATA_FILES[1:])
def test_every_line_of_a_data_file_counts(copied, name):
    """A line that is lost, moved or added, and a number that differs in its last digit."""
    folder, _ = copied
    lines = cells_of(folder / name)
    changes = [
        lines[:-1],
        [lines[0], *lines[:0:-1]],
        [*lines, lines[-1]],
        last_digit_changed(lines),
    ]
    for changed in changes:
        write_cells(folder / name, changed)
        try:
            differences = verify(folder)
        except ResultsError as error:
            differences = [str(error)]
        assert any(name in line for line in differences)
    write_cells(folder / name, lines)
    assert verify(folder) == []


def test_a_changed_lost_or_added_digest_is_named(copied):
    folder, _ = copied
    path = folder / "digests.json"
    recorded = json.loads(path.read_text())
    assert set(DATA_FILES) < set(recorded) and "report.html" in recorded
    for name in ["sweep.json", "report.html", "figures/overview.svg"]:
        digest = recorded[name]
        path.write_text(
            json.dumps(recorded | {name: digest[:-1] + ("0" if digest[-1] != "0" else "1")})
        )
        assert verify(folder) == [
            f"{name}: its SHA-256 differs from digests.json: it was changed after the report"
        ]
        path.write_text(json.dumps({key: value for key, value in recorded.items() if key != name}))
        (difference,) = verify(folder)
        assert difference.startswith(name) and "digests.json" in difference
    path.write_text(json.dumps(recorded | {"figures/other.svg": "0"}))
    assert verify(folder) == ["figures/other.svg is missing"]
    path.write_text("{")
    assert verify(folder)[0].startswith("digests.json is missing or damaged")


@pytest.mark.parametrize("name", DATA_FILES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_data_file_is_named(copied, name, share, capsys):
    folder, _ = copied
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    assert main([str(folder)]) in (1, 2)
    assert name in "".join(capsys.readouterr())


def test_changed_missing_and_added_figures_are_named(copied, capsys):
    folder, _ = copied
    (folder / "figures" / "overview.png").write_bytes(b"x")
    (folder / "figures" / "overview.svg").unlink()
    (folder / "figures" / "other.svg").write_bytes(b"x")
    assert main([str(folder)]) == 1
    changed = "its SHA-256 differs from digests.json: it was changed after the report"
    assert capsys.readouterr().out.splitlines() == [
        f"figures/overview.png: {changed}",
        "figures/overview.svg is missing",
        "figures/other.svg is not in digests.json: it was added after the report",
    ]
