"""The store: one folder a run, atomic writes, claims by mkdir, and a state that is a pure function of the folder.

    runs/<run_id>/run.yaml               the resolved config, written once
        attempts/001/                    making this folder is the claim; never deleted
            start.json  heartbeat  exit.json
        checkpoints/  samples/  train.jsonl  metrics.jsonl
        result.json                      the only definition of "done"
    submissions/  cancels/               one file a call

One writer a file, no pickles, no database; a torn last line of a JSON-lines file is ignored, a record that says nothing is set
aside. Where a run's own folder cannot be written (read-only), its error lies in errors/<run_id>.json until the run is claimed
again.
"""

import contextlib
import errno
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is there whole or not at all: temporary file beside it, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, or it cannot be made; None where it can."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        return error.strerror
    return None


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a JSON file, or None where there is no file or no such thing in it."""
    try:
        return _mapping(path.read_bytes())
    except FileNotFoundError:
        return None


def _mapping(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_record(path: Path, **needs: type | tuple[type, ...]) -> dict[str, Any] | None:
    """`read_json` of a file of the store; one that does not say what it must is set aside with a message, and is then absent."""
    try:
        found = _mapping(path.read_bytes())
    except FileNotFoundError:
        return None
    if found is not None and all(isinstance(found.get(key), kind) for key, kind in needs.items()):
        return found
    aside, where = path.with_name(f"{path.name}.corrupt"), "left where it is"
    with contextlib.suppress(OSError):
        path.rename(aside)
        where = f"set aside as {aside.name}"
    print(f"{path} cannot be read; {where}", file=sys.stderr, flush=True)
    return None


def write_once(path: Path, value: Any) -> bool:
    """`write_json` for whoever comes first; False where the file is there."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(value, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)


def append_jsonl(path: Path, value: Any) -> None:
    """Append one line; only one process may write a file."""
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def last_lines(path: Path, size: int = 16384) -> list[str]:
    """The lines at the end of a text file that say something, the last one first; none where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line.strip() for line in reversed(lines) if line.strip()]


def read_jsonl(path: Path) -> list[Any]:
    """The lines of a JSON-lines file; a torn line (a crash in the midst of a write) is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


def first_line(error: BaseException) -> str:
    """What an error says in one line of 300 characters at most; its kind where it says nothing."""
    said = str(error).strip().splitlines()
    return said[0][:300] if said else type(error).__name__


def kind_of_write(error: OSError) -> str:
    """The kind of a failure to write, for `--retry-failed=KIND`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk_full"
    return "read_only" if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else "exception"
