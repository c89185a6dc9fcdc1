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
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from distill_bench.stop import slurm_job

STALE_SECONDS = 120.0
BEAT_SECONDS = 5.0
RESERVED_BYTES = 4096  # that an attempt holds for its last word: the disk may be full by then
FAILURES = (  # kinds of failure, for `--retry-failed=KIND`
    "cuda_oom",
    "host_oom",
    "disk_full",
    "read_only",
    "timeout",
    "code_changed",
    "not_started",
    "exception",
)


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


def sweep_called(sweep: str | Path) -> str:
    """The name of the sweep that a name, its YAML, its manifest or its folder of results means; names may have dots."""
    path = Path(sweep)
    return path.stem if path.suffix in (".yaml", ".yml", ".json") else path.name


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


def result_of(run_dir: Path) -> dict[str, Any] | None:
    """The result of a run that has one."""
    found = read_record(
        run_dir / "result.json",
        run_id=str,
        status=str,
        student_updates=int,
        train_seconds=(int, float),
    )
    return found if found is not None and found["run_id"] == run_dir.name else None


def start_of(attempt: Path) -> dict[str, Any]:
    """Who works in an attempt, and with what."""
    return {"host": None, "pid": 0, "job": None, "restart": 0, "time": 0.0} | (
        read_record(attempt / "start.json") or {}
    )


def end_of(attempt: Path) -> dict[str, Any] | None:
    """How an attempt ended, where it has said so."""
    return read_record(attempt / "exit.json", status=str)


def file_of_call(folder: Path) -> Path:
    """A file for what one call of a command leaves; sorted by name they are sorted by time."""
    return folder / f"{time.time():.3f}-{socket.gethostname()}-{os.getpid()}.json"


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


def flat(tree: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested mappings as joined keys."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result |= flat(value, separator, f"{prefix}{key}{separator}")
        else:
            result[f"{prefix}{key}"] = value
    return result


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Where two nested mappings differ, for instance "clips 144 and 256, references.teacher 1a2b3c4d and 5e6f7a8b"."""
    a, b = flat(mine), flat(theirs)
    return ", ".join(
        f"{key} {a.get(key)} and {b.get(key)}"
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key)
    )


class Claim:
    """The right to work on a folder: attempts/NNN, made by mkdir, kept alive by a heartbeat until `close`."""

    def __init__(self, attempt: Path, start: dict) -> None:
        self.attempt, self.taken_over = attempt, False
        write_json(attempt / "start.json", start)
        write_bytes(attempt / "reserve", bytes(RESERVED_BYTES))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                (self.attempt / "heartbeat").touch()
                self.taken_over = not self.newest()
            if self._stop.wait(BEAT_SECONDS):
                return

    def newest(self) -> bool:
        """False once another attempt has taken the folder over: this one must not write results."""
        return attempts(self.attempt.parent.parent)[-1:] == [self.attempt]

    def close(self, status: str, **more: Any) -> None:
        """Record how the attempt ended: "done", "collapsed", "stopped", "superseded" by another attempt, "lost" with another
        process of the run, or "error" (with `error`, its last line, and `kind`)."""
        self._stop.set()
        self._thread.join()
        end_attempt(self.attempt, status, **more)


def end_attempt(attempt: Path, status: str, **more: Any) -> None:
    """Write an attempt's exit.json, on a full disk in its reserve; of several ranks the first to end says why."""
    said, path, reserve = (
        {"status": status, "time": time.time()} | more,
        attempt / "exit.json",
        attempt / "reserve",
    )
    try:
        write_once(path, said)
    except OSError as error:
        if kind_of_write(error) != "disk_full":
            raise
        if "error" in said:
            said["error"] = said["error"][-500:]
        with reserve.open("r+b") as file:
            file.write(json.dumps(said).encode().ljust(RESERVED_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(reserve, path)
    with contextlib.suppress(OSError):
        reserve.unlink()


def first_line(error: BaseException) -> str:
    """What an error says in one line of 300 characters at most; its kind where it says nothing."""
    said = str(error).strip().splitlines()
    return said[0][:300] if said else type(error).__name__


def kind_of_write(error: OSError) -> str:
    """The kind of a failure to write, for `--retry-failed=KIND`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk_full"
    return "read_only" if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else "exception"


def record_outside(run_dir: Path, **said: Any) -> None:
    """Leave a run's error where its own folder cannot hold it; what cannot be written at all is in the log."""
    print(f"{run_dir.name}: {said['error']}", file=sys.stderr, flush=True)
    path = run_dir.parent / "errors" / f"{run_dir.name}.json"
    try:
        write_json(path, {"status": "error", "time": time.time(), "log": output_file()} | said)
    except OSError as error:
        print(f"and cannot write {path}: {error.strerror}", file=sys.stderr, flush=True)


def output_file() -> str | None:
    """The file that this process's output goes to."""
    path = Path(os.path.realpath("/proc/self/fd/1"))
    return str(path) if path.is_file() else None


def attempts(folder: Path) -> list[Path]:
    """Attempts of a folder, oldest first."""
    root = folder / "attempts"
    return (
        sorted((p for p in root.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
        if root.is_dir()
        else []
    )


def claim(folder: Path, start: dict, stale_seconds: float = STALE_SECONDS) -> Claim | None:
    """Claim a folder, or None where somebody else is alive in it or came first.

    An attempt without exit.json is dead if its process is gone (same host), if this is the same SLURM job in a later life, or if
    its heartbeat is older than `stale_seconds`.
    """
    before = attempts(folder)
    if before and _alive(before[-1], stale_seconds):
        return None
    attempt = folder / "attempts" / f"{len(before) + 1:03d}"
    attempt.parent.mkdir(parents=True, exist_ok=True)
    try:
        attempt.mkdir()
    except FileExistsError:
        return None
    try:
        return Claim(attempt, identity() | start)
    except OSError:
        shutil.rmtree(attempt, ignore_errors=True)  # nobody is in it: it must not look alive
        raise


def note_cancel(store: Path, runs: Iterable[str], jobs: Iterable[str]) -> None:
    """Note which runs are to stop and not to be started: for the drivers of local sweeps, wherever they are, and for --status."""
    write_json(file_of_call(store / "cancels"), {"runs": sorted(runs), "jobs": sorted(jobs)})


def cancels(store: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """What was cancelled after a moment, in seconds since the epoch."""
    paths = sorted(
        path for path in (store / "cancels").glob("*.json") if path.name > f"{since:.3f}"
    )
    return [found for path in paths if (found := read_record(path, runs=list, jobs=list))]


def once(
    folder: Path,
    ready: Callable[[], bool],
    make: Callable[[], None],
    wait: bool = True,
    poll_seconds: float = 0.5,
) -> None:
    """Make what several processes share: whoever claims `folder` first makes it, the others `wait` until it is `ready`, or not.

    A maker that died is replaced; what `make` raises is raised in the process that made, and the next in line tries again.
    """
    while not ready():
        mine = claim(folder, {})
        if mine is None:
            if not wait:
                return
            time.sleep(poll_seconds)
            continue
        try:
            if not ready():
                make()
        except BaseException as error:
            mine.close("error", error=f"{type(error).__name__}: {error}")
            raise
        mine.close("done")


def identity() -> dict:
    """Who is working: host, process and, under SLURM, job and restart count."""
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": slurm_job(),
        "restart": restart,
        "time": time.time(),
    }


def _alive(attempt: Path, stale_seconds: float) -> bool:
    if (attempt / "exit.json").is_file():
        return False
    start, me = start_of(attempt), identity()
    if start["job"] and start["job"] == me["job"] and me["restart"] > start["restart"]:
        return False
    if start["host"] == me["host"] and not _process_exists(start["pid"]):
        return False
    beats = (p.stat().st_mtime for p in (attempt / "heartbeat", attempt) if p.exists())
    return time.time() - next(beats, 0.0) < stale_seconds


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):  # a zombie has ended, though nobody has waited for it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def state(run_dir: Path, queued: bool = False) -> str:
    """What a run is doing, from its folder; `queued`: one of its jobs is in the scheduler's queue.

    - "done", "collapsed": it has a result
    - "running": somebody works in it
    - "queued": it waits for its first attempt; "preempted": for its next one, saved; "requeued": for its next one, after a
      loss without warning (the checkpoint before serves)
    - "failed": its last attempt ended with an error; "stopped": on request, saved; "lost": without a word
    - "missing": nothing was tried
    """
    result = result_of(run_dir)
    if result is not None:
        return result["status"]
    tried = attempts(run_dir)
    if tried and _alive(tried[-1], STALE_SECONDS):
        return "running"
    ended = end_of(tried[-1]) if tried else None
    if not queued and read_record(run_dir.parent / "errors" / f"{run_dir.name}.json") is not None:
        return "failed"
    if not tried:
        return "queued" if queued else "missing"
    if ended is None or ended["status"] == "lost":
        return "requeued" if queued else "lost"
    if ended["status"] == "stopped":
        return "preempted" if queued else "stopped"
    return "queued" if queued else {"error": "failed"}.get(ended["status"], "lost")
