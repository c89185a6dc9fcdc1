"""Reads files of prompts (.txt, .jsonl, and .json lists as VBench's) and negative prompts."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, StringConstraints, TypeAdapter, ValidationError

from distill_bench.store.files import read_text, text_lines, warn_of_unused

VBENCH = ("prompt_en", "dimension", "auxiliary_info")  # keys of its list of prompts
TABLES = (".csv", ".tsv")  # their lines are no prompts
PUBLISHED = "default"  # the value of a key `negative_prompt` that selects the teacher's own
FILE_PREFIX = "file:"  # prefix of a value that names a file


class PromptEntry(BaseModel, strict=True, extra="ignore"):
    """One prompt of a file."""

    prompt: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    seed: Annotated[int, Field(ge=0)] | None = None


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file.

    Formats by suffix: `.json`, a list of strings or objects; `.jsonl`, one string or object per
    line; anything else but a table, one prompt per line. Objects have the key `prompt`, or VBench's
    `prompt_en`, and optionally `seed` (`read_seeds`).

    Raises:
        ValueError: if an entry is not a prompt, or the file is a table or has no prompts.
    """
    return [entry.prompt for entry in read_entries(path)]


def read_seeds(path: Path) -> list[int | None]:
    """Seed of each prompt's first clip in a protocol; None for a prompt without a seed.

    Raises:
        ValueError: if an entry is not a prompt, or the file has no prompts.
    """
    return [entry.seed for entry in read_entries(path)]


def read_entries(path: Path) -> list[PromptEntry]:
    """Prompts of a file with their seeds; formats and errors as in `read_prompts`."""
    if path.suffix.lower() in TABLES:
        raise ValueError(
            f"prompts {path}: tables are not read; write one prompt per line into a .txt file, or "
            "{'prompt': TEXT, 'seed': NUMBER} into a .jsonl file"
        )
    text = _read(path, "prompts")
    if path.suffix.lower() == ".json":
        entries = _parse_json(text, f"prompts {path}")
        if not isinstance(entries, list):
            kind = "null" if entries is None else type(entries).__name__
            raise ValueError(
                f"prompts {path}: expected a list of strings or of {{'prompt': TEXT}}, found {kind}"
            )
        places = [(f"prompts {path}, entry {number}", e) for number, e in enumerate(entries, 1)]
        prompts = _prompts(path, places)
    else:
        lines = [(n, line.strip()) for n, line in enumerate(text_lines(text), 1) if line.strip()]
        if path.suffix.lower() == ".jsonl":
            places = [(f"prompts {path}, line {number}", line) for number, line in lines]
            prompts = _prompts(path, [(place, _parse_json(line, place)) for place, line in places])
        else:
            prompts = [PromptEntry(prompt=line) for _, line in lines]
    if not prompts:
        raise ValueError(f"prompts {path}: the file has no prompts")
    return prompts


def check_negative_prompt(value: str) -> None:
    """Raise ValueError for a text that names a file, as if `file:` had been forgotten."""
    if os.path.isfile(value):  # of a long text, a Path would raise an error
        raise ValueError(
            f"negative_prompt {value!r} would be a text, but a file has this name: write "
            f"{FILE_PREFIX}{value} for the text in the file"
        )


def negative_text(value: str, published: str) -> str:
    """Text of a key `negative_prompt`: the teacher's own, that of a file, or the value itself.

    Args:
        value: `default`, `file:PATH`, or a text.
        published: the text that `default` selects.

    Raises:
        ValueError: if the file cannot be read or is empty.
    """
    if value == PUBLISHED:
        return published
    if not value.startswith(FILE_PREFIX):
        return value
    path = Path(value.removeprefix(FILE_PREFIX))
    text = _read(path, "negative_prompt").strip()
    if not text:
        raise ValueError(f'negative_prompt {path}: the file is empty; write "" for no text')
    return text


def text_hash(text: str) -> str:
    """Hash (12 hex digits) of a text; "" for the empty text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12] if text else ""


def prompts_hash(path: Path) -> str:
    """Hash (12 hex digits) of a file's prompts and seeds, independent of its format."""
    lines = read_entries(path)
    content: list[Any] = [line.prompt for line in lines]
    if any(line.seed is not None for line in lines):
        content = [[line.prompt, line.seed] for line in lines]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _read(path: Path, key: str) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{key} {path}: {reason}") from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg}") from error


def _prompts(path: Path, places: Sequence[tuple[str, Any]]) -> list[PromptEntry]:
    """The entries of a JSON file.

    Args:
        places: place of each entry for messages, and the entry.
    """
    prompts = [_prompt(entry, place) for place, entry in places]
    known = [*PromptEntry.model_fields, *VBENCH]
    warn_of_unused(path, (entry for _, entry in places), known)
    return prompts


def _prompt(entry: Any, where: str) -> PromptEntry:
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if isinstance(entry, dict) and "prompt" not in entry and "prompt_en" in entry:
        entry = entry | {"prompt": entry["prompt_en"]}
    for key in entry if isinstance(entry, dict) else ():
        if key not in PromptEntry.model_fields and key.lower() in PromptEntry.model_fields:
            raise ValueError(f"{where}: unknown key {key!r}; write {key.lower()!r}")
    try:
        return TypeAdapter(PromptEntry).validate_python(entry)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        problem = f"{key}: {first['msg']}" if key else first["msg"]
        raise ValueError(f"{where}: {problem}; write a string or {{'prompt': TEXT}}") from error
