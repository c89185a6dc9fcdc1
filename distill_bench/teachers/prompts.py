"""Reads files of prompts: .txt, .jsonl, and .json lists as VBench publishes them."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, StringConstraints, TypeAdapter, ValidationError

from distill_bench.store.files import read_text, text_lines


class _Line(BaseModel, strict=True, extra="ignore"):
    """One prompt of a JSON file."""

    prompt: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    seed: Annotated[int, Field(ge=0)] | None = None


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file.

    Formats by suffix: `.json`, a list of strings or objects; `.jsonl`, one string or object per
    line; anything else, one prompt per line. Objects have the key `prompt`, or VBench's
    `prompt_en`. Their `seed` is checked and ignored: seeds belong to the protocol.

    Raises:
        ValueError: if an entry is not a prompt, or the file has no prompts.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"prompts {path}: {reason}") from error
    if path.suffix.lower() == ".json":
        entries = _parse_json(text, f"prompts {path}")
        if not isinstance(entries, list):
            kind = "null" if entries is None else type(entries).__name__
            raise ValueError(
                f"prompts {path}: expected a list of strings or of {{'prompt': TEXT}}, found {kind}"
            )
        prompts = [
            _prompt(entry, f"prompts {path}, entry {number}")
            for number, entry in enumerate(entries, 1)
        ]
    else:
        lines = [(n, line.strip()) for n, line in enumerate(text_lines(text), 1) if line.strip()]
        if path.suffix.lower() == ".jsonl":
            places = [(f"prompts {path}, line {number}", line) for number, line in lines]
            prompts = [_prompt(_parse_json(line, place), place) for place, line in places]
        else:
            prompts = [line for _, line in lines]
    if not prompts:
        raise ValueError(f"prompts {path}: the file has no prompts")
    return prompts


def prompts_hash(path: Path) -> str:
    """Hash (12 hex digits) of a file's prompts, independent of its format."""
    return hashlib.sha256(json.dumps(read_prompts(path)).encode()).hexdigest()[:12]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg}") from error


def _prompt(entry: Any, where: str) -> str:
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if isinstance(entry, dict) and "prompt" not in entry and "prompt_en" in entry:
        entry = entry | {"prompt": entry["prompt_en"]}
    try:
        return TypeAdapter(_Line).validate_python(entry).prompt
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        problem = f"{key}: {first['msg']}" if key else first["msg"]
        raise ValueError(f"{where}: {problem}; write a string or {{'prompt': TEXT}}") from error
