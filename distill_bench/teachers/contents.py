"""Contents of a teacher's folder: JSON configs, shapes of weights, and a hash of the files."""

import contextlib
import hashlib
import json
import os
from functools import cache
from pathlib import Path

from distill_bench.store.files import write_bytes
from distill_bench.teachers.folder import TeacherError, is_outline

LARGE = 2**30  # bytes; the hash of a larger folder is cached on disk
WEIGHTS = "diffusion_pytorch_model"  # stem of diffusers' weight files
HASHED_SUFFIXES = {".safetensors", ".json", ".txt", ".model"}

HashedFiles = tuple[tuple[Path, int, int], ...]  # path, bytes, modification time in ns


def read_config(folder: Path, name: str = "config.json") -> dict:
    """JSON config of one part of a pipeline; {} if the file does not exist.

    Raises:
        TeacherError: if it is not a JSON object.
    """
    path = folder / name
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TeacherError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise TeacherError(
            f"cannot read {path}: a config must be a JSON object; found {type(config).__name__}"
        )
    return config


def weight_shapes(part: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's weights by name, from the headers of its safetensors files.

    Empty for an outline, which has no weights, and for `.bin` files, which have no header.

    Raises:
        TeacherError: if there are no weights, or a file is missing or truncated.
    """
    if is_outline(part.parent):
        return {}
    shards = read_config(part, f"{WEIGHTS}.safetensors.index.json").get("weight_map")
    names = sorted(set(shards.values())) if shards else [f"{WEIGHTS}.safetensors"]
    files = [part / name for name in names]
    if not files[0].is_file() and any(part.glob("*.bin")):
        return {}
    shapes = {}
    for path in files:
        if not path.is_file():
            raise TeacherError(
                f"{part} lacks weights: it has no {path.name}; download or copy the whole folder"
            )
        stat = path.stat()
        shapes |= _shapes_in(path, stat.st_size, stat.st_mtime_ns)
    return shapes


@cache
def _shapes_in(path: Path, _size: int, _mtime_ns: int) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open  # only weights need it

    try:
        with safe_open(path, "np") as file:
            names = file.keys()  # a safe_open file is not iterable
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise TeacherError(f"cannot load {path}: {error}") from error


def content_hash(folder: Path) -> str:
    """sha256 (12 hex digits) over the names and bytes of a folder's weights and configs.

    A teacher enters a run's id by this hash, not by its name. Hashes of large folders are cached in
    `~/.cache/distill-bench/hashes` until a file's size or modification time changes.
    """
    return hash_of(folder, _hashed_files(folder))


def file_hash(path: Path) -> str:
    """sha256 (12 hex digits) over a file's name and bytes, cached like `content_hash`."""
    stat = path.stat()
    return hash_of(path.parent, ((path, stat.st_size, stat.st_mtime_ns),))


def hash_is_slow(folder: Path) -> bool:
    """True if a folder is larger than LARGE and its hash is not cached."""
    files = _hashed_files(folder)
    cached = _cached_hash(files)
    return _is_large(files) and not (cached is not None and cached.is_file())


def _hashed_files(folder: Path) -> HashedFiles:
    stats = [
        (path, path.stat())
        for path in sorted(folder.rglob("*"))
        if path.suffix in HASHED_SUFFIXES and path.is_file()
    ]
    return tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)


def _is_large(files: HashedFiles) -> bool:
    return sum(size for _, size, _ in files) > LARGE


def _cached_hash(files: HashedFiles) -> Path | None:
    """File that remembers the hash; None for a user without a home."""
    key = hashlib.sha256(repr(files).encode()).hexdigest()[:32]
    cache_home = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    if not cache_home.is_absolute():
        return None
    return cache_home / "distill-bench" / "hashes" / key


@cache
def hash_of(folder: Path, files: HashedFiles) -> str:
    large = _is_large(files)
    cached = _cached_hash(files)
    if large and cached is not None and cached.is_file():
        return cached.read_text(encoding="utf-8")
    sha = hashlib.sha256()
    for path, _, _ in files:
        sha.update(str(path.relative_to(folder)).encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                sha.update(block)
    digest = sha.hexdigest()[:12]
    if large and cached is not None:
        with contextlib.suppress(OSError):  # a read-only home must not stop the run
            write_bytes(cached, digest.encode())
    return digest
