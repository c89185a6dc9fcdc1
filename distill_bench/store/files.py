"""Atomic file writes, JSON records and JSON-lines files."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file that appears complete or not at all: temporary file, fsync, rename.

    Args:
        durable: wait for the disk, so that a power cut cannot leave an empty file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_bytes(path: Path, data: bytes, durable: bool = True) -> None:
    """Write a file atomically; `durable` as in `atomic_file`."""
    with atomic_file(path, durable) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_bytes(path, _json_bytes(value))


def write_once(path: Path, value: Any) -> bool:
    """Write indented JSON unless the file exists; returns whether this process wrote it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_json_bytes(value))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.link(temporary, path)  # unlike a rename, fails if the file exists
        return True
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a JSON file; None if the file is missing, damaged or holds no mapping."""
    try:
        return _mapping(path.read_bytes())
    except FileNotFoundError:
        return None


def read_record(path: Path, **required: type | tuple[type, ...]) -> dict[str, Any] | None:
    """Read a JSON record; None, with a warning, if a required key is missing or mistyped."""
    try:
        record = _mapping(path.read_bytes())
    except FileNotFoundError:
        return None
    if record is not None and all(
        isinstance(record.get(key), kind) for key, kind in required.items()
    ):
        return record
    _warn_damaged(path)
    return None


def _mapping(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@cache  # once per process: --watch reads the same file every few seconds
def _warn_damaged(path: Path) -> None:
    print(f"{path} is damaged and treated as missing", file=sys.stderr, flush=True)


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, without a byte order mark; line ends stay as they are.

    Raises:
        UnicodeDecodeError: if it is not UTF-8.
    """
    return path.read_bytes().decode("utf-8-sig")


def text_lines(text: str) -> list[str]:
    """Lines of a text; only `\\n`, or `\\r\\n` as Windows writes it, ends a line.

    `str.splitlines` would also split at U+2028, U+0085 and six others, which prompts may contain.
    """
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def append_jsonl(path: Path, value: Any) -> None:
    """Append one line to a JSON-lines file; each file must have only one writer."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def read_jsonl(path: Path) -> list[Any]:
    """Values in a JSON-lines file; [] if the file is missing.

    A last line torn by a crash is skipped; other damaged lines too, with one warning per file.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
    except FileNotFoundError:
        return []
    values, damaged = [], 0
    lines = text_lines(text)
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            torn = number == len(lines) and not text.endswith("\n")
            damaged += bool(line.strip()) and not torn
    if damaged:
        _warn_skipped(path, damaged)
    return values


@cache  # once per process
def _warn_skipped(path: Path, count: int) -> None:
    print(f"{path}: {count} damaged lines are skipped", file=sys.stderr, flush=True)


def warn_of_unused(path: Path, entries: Iterable[Any], known: Collection[str]) -> None:
    """Print the keys of a user's entries that nothing reads, with their number, once per process.

    Args:
        entries: of a JSON file; those that are no mappings have no keys.
        known: keys that are read, or left out on purpose.
    """
    counts = Counter(key for entry in entries if isinstance(entry, dict) for key in entry)
    unused = {key: count for key, count in counts.items() if key not in known}
    if unused:
        keys = ", ".join(f"{key!r} ({count} times)" for key, count in unused.items())
        _print_once(f"{path}: keys that are not used: {keys}; known: {', '.join(known)}")


@cache  # once per process
def _print_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def last_lines(path: Path, size: int = 16384) -> list[str]:
    """Non-empty lines in the last `size` bytes of a text file, newest first; [] if missing."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            lines = text_lines(file.read().decode(errors="replace"))
    except OSError:
        return []
    # after a carriage return a terminal, and so a progress bar, writes the line again
    shown = [line.rstrip().rpartition("\r")[2].strip() for line in reversed(lines)]
    return [line for line in shown if line]


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_text(text: str) -> str:
    """A text of a command line; bytes that the locale cannot decode, as in C, count as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        with contextlib.suppress(UnicodeDecodeError):
            return os.fsencode(text).decode()
    return text


def user_path(text: str) -> Path:
    """A path of a command line; shells leave the `~` of `--store=~/runs` as it is."""
    return Path(os.path.expanduser(text))


def existing_folder(folder: Path) -> Path:
    """The folder, or the innermost one around it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def unwritable(folder: Path) -> str | None:
    """Reason why a folder cannot be created or written to; None if it can."""
    try:
        with tempfile.TemporaryFile(dir=existing_folder(folder)) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        return error.strerror or str(error)
    return None
