"""Texts are UTF-8 and their lines end at line feeds, whatever the locale and the text."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def faults(source: str) -> Iterator[str]:
    """Calls that read or write text in the locale's encoding, split it at U+2028, or alter it.

    `.splitlines()[0]`, the first line of a message, is allowed. Rich would take brackets and colons
    of paths and errors for its markup and its emoji.
    """
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    first = re.findall(r"\.splitlines\(\)\[0\]", source)
    split = [call for call in calls if _name(call) in ("splitlines", "readlines")]
    if len(split) > len(first):
        yield f"line {split[-1].lineno}: ends lines at other characters than a line feed"
    for call in calls:
        off = {keyword.arg for keyword in call.keywords if ast.unparse(keyword.value) == "False"}
        if _name(call) == "Console" and not off >= {"markup", "emoji"}:
            yield f"line {call.lineno}: Console without markup=False, emoji=False"
        if any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        text = any(
            keyword.arg in ("text", "universal_newlines") and ast.unparse(keyword.value) == "True"
            for keyword in call.keywords
        )
        if text or _name(call) in ("write_text", "NamedTemporaryFile"):
            yield f"line {call.lineno}: no encoding"
        elif _name(call) in ("read_text", "open", "fdopen"):
            function = ast.unparse(call.func)
            modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            binary = any("b" in mode for mode in modes if isinstance(mode, str) and len(mode) < 4)
            # `read_text` alone is the function of `store.files`
            if not binary and function not in ("av.open", "Image.open", "read_text"):
                yield f"line {call.lineno}: {function} without encoding"


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def test_every_text_file_names_its_encoding_and_ends_lines_at_line_feeds():
    folders = ("distill_bench", "methods", "eval")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert [f"{p}, {fault}" for p in paths for fault in faults(p.read_text("utf-8"))] == []


@pytest.mark.parametrize("source", [
    "path.read_text()", "path.write_text(x)", "open(path)", "path.open('a')", "os.fdopen(3, 'w')",
    "subprocess.run(a, text=True)", "text.splitlines()", "file.readlines()", "x.splitlines()[-1]",
    "Console(markup=False)", "Console(emoji=False, markup=True)",
])  # fmt: skip
def test_a_planted_fault_is_found(source):
    assert len(list(faults(source))) == 1


@pytest.mark.parametrize("source", [
    "path.read_text(encoding='utf-8')", "open(path, 'rb')", "path.open('ab')", "av.open(path)",
    "x.splitlines()[0]", "path.read_bytes()", "Console(emoji=False, markup=False)",
    "subprocess.run(a, encoding='utf-8')",
])  # fmt: skip
def test_a_harmless_call_passes(source):
    assert list(faults(source)) == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_shows_a_question_mark_for_what_it_lacks(encoding):
    text = (
        "import distill_bench, sys; print('\\xe9\\u6f22'); print('\\xe9\\u6f22', file=sys.stderr)"
    )
    environment = os.environ | NO_UTF8 | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, check=True
    )
    shown = {"ascii": "??", "latin-1": "é?", "utf-8": "é漢"}[encoding]
    assert done.stdout.decode(encoding).strip() == shown == done.stderr.decode(encoding).strip()
