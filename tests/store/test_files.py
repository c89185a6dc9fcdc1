"""Files of the store: atomic writes, damaged records, torn lines."""

import json
from pathlib import Path

import pytest

from distill_bench.store.files import (
    append_jsonl,
    atomic_file,
    last_lines,
    read_jsonl,
    read_record,
    text_lines,
    unwritable,
    write_json,
    write_once,
)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"status": "done"})
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"status": "done"}
    assert list(tmp_path.iterdir()) == [path]


def test_only_the_first_of_two_writers_writes(tmp_path):
    path = tmp_path / "exit.json"
    assert write_once(path, 1)
    assert not write_once(path, 2)
    assert json.loads(path.read_text()) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00garbage\x80", b"[]", b"{}", b'{"status": "done"', b'{"status": 5}'],
)
def test_a_damaged_record_counts_as_missing_and_is_named_once(content, tmp_path, capsys):
    path = tmp_path / "exit.json"
    path.write_bytes(content)
    for _ in range(2):
        assert read_record(path, status=str) is None
    assert capsys.readouterr().err == f"{path} is damaged and treated as missing\n"
    assert path.read_bytes() == content, "reading changes nothing"


def test_a_missing_record_is_not_damaged(tmp_path, capsys):
    assert read_record(tmp_path / "exit.json", status=str) is None
    assert capsys.readouterr().err == ""


def test_a_torn_line_is_skipped(tmp_path):
    path = tmp_path / "train.jsonl"
    append_jsonl(path, {"a": 1})
    append_jsonl(path, {"a": 2})
    with path.open("a") as file:
        file.write('{"a": 3')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    assert last_lines(path) == ['{"a": 3', '{"a": 2}', '{"a": 1}']
    assert last_lines(tmp_path / "none.txt") == []


def test_a_folder_that_cannot_be_made_has_a_reason(tmp_path):
    assert unwritable(tmp_path / "new" / "folder") is None
    assert not (tmp_path / "new").exists()
    assert unwritable(Path("/proc/nowhere")) is not None


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_a_line_feed_ends_a_line(tmp_path, end):
    word = "a\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029b"
    assert text_lines(f"{word}{end}{end}c{end}") == [word, "", "c"]
    assert text_lines(f"{word}{end}c") == [word, "c"]
    assert text_lines("") == []
    path = tmp_path / "lines.jsonl"
    texts = [json.dumps({"x": word.replace("\r", "") + i}, ensure_ascii=False) for i in "123"]
    path.write_bytes(b"\xef\xbb\xbf" + "".join(text + end for text in texts).encode())
    assert [line["x"][-1] for line in read_jsonl(path)] == ["1", "2", "3"]


def test_the_last_line_of_a_log_is_what_a_terminal_shows(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes("start\n 10%\r 50%\r100%\r\nValueError: a\u2028b\n\n".encode())
    assert last_lines(path) == ["ValueError: a\u2028b", "100%", "start"]


def test_damaged_lines_are_counted_once_but_a_torn_last_line_is_not(tmp_path, capsys):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"a": 1}\n{"a": \n\nnot JSON\n{"a": 2}\n{"a": 3')
    for _ in range(2):
        assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    assert capsys.readouterr().err == f"{path}: 2 damaged lines are skipped\n"
