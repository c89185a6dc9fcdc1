"""CSV files of results: cells come back as they were written, and damage is found by line."""

import os

import numpy as np
import pandas as pd
import pytest

from distill_bench.report.csv_files import ResultsError, cells, csv_text, read_frame, read_texts


def test_texts_numbers_and_switches_come_back_as_they_were_written(tmp_path):
    """Empty cells are null; a column of words that look like switches stays text."""
    lines = [
        {"both": True, "on": True, "off": False, "word": "True", "x": 0.1 + 0.2, "text": "a,b"},
        {"both": False, "on": None, "off": None, "word": "graph", "x": None, "text": "None"},
        {"both": None, "on": True, "off": False, "word": "", "x": 1e-300, "text": 'c "d"\ne'},
    ]
    header = ["both", "on", "off", "word", "x", "empty", "text"]
    path = tmp_path / "runs.csv"
    path.write_text(csv_text(cells(lines, header)))
    frame = read_frame(path)
    assert frame.columns.tolist() == header and list(frame.index) == [0, 1, 2]
    for name in ("both", "on", "off"):
        assert frame[name].dtype == "boolean"
        expected = [pd.NA if line[name] is None else line[name] for line in lines]
        assert frame[name].tolist() == expected
    assert frame["word"].tolist() == ["True", "graph", ""]
    np.testing.assert_array_equal(frame["x"], [0.1 + 0.2, np.nan, 1e-300])
    assert frame["empty"].dtype == float and frame["empty"].isna().all()
    assert frame["text"].tolist() == [line["text"] for line in lines]
    assert read_texts(path)["x"].tolist() == ["0.30000000000000004", "", "1e-300"]


def test_a_file_has_the_same_bytes_on_every_system(monkeypatch):
    monkeypatch.setattr(os, "linesep", "\r\n")
    assert csv_text(cells([{"a": 1}, {"b": [1, {"c": None}]}], ["a", "b"])) == (
        'a,b\n1,\n,"[1, {""c"": null}]"\n'
    )


@pytest.mark.parametrize(
    "lines, place",
    [
        (["1"], ":2 "),
        (["1,2", "3,4", "5"], ":4 "),
        (["1,2", "3,4,5"], "line 3"),
        (["0,1,2"], "line 2"),
        (["1,2,3", "4,5,6", "7,8,9"], "line 2"),
        (["1,2,3", "4"], "line 2"),
    ],
)
def test_a_line_with_fewer_or_more_cells_than_the_header_is_named(tmp_path, lines, place):
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(["a,b", *lines, ""]))
    with pytest.raises(ResultsError, match=f"{place}.*writes it again$"):
        read_texts(path)


def test_cells_stay_as_they_are_under_a_header_of_numbers(tmp_path):
    (tmp_path / "runs.csv").write_text("7,0.10\n1e-4,007\n")
    frame = read_texts(tmp_path / "runs.csv")
    assert frame.columns.tolist() == ["7", "0.10"] and frame.loc[0].tolist() == ["1e-4", "007"]


def test_a_header_without_lines_has_columns_and_a_missing_file_has_none(tmp_path):
    (tmp_path / "runs.csv").write_text("a,b\n")
    frame = read_texts(tmp_path / "runs.csv")
    assert frame.empty and frame.columns.tolist() == ["a", "b"]
    assert read_frame(tmp_path / "none.csv").columns.empty
