"""Which folder a teacher's name means, and what it counts as. Imports nothing heavy: the command line resolves runs with it."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from distill_bench import ASSETS
from distill_bench.store.files import first_line, write_bytes

EMBEDDED = {name: ASSETS / name for name in ("mini-wan", "gaussian")}


GAUSSIAN_FILE = "gaussian.json"


LARGE = 2**30  # bytes


WEIGHTS = "diffusion_pytorch_model"  # what diffusers calls the files of a network


# configs of teachers whose weights do not ship: what their shapes decide can be said without the weights
OUTLINES = {
    f"Wan-AI/Wan2.1-T2V-{size}-Diffusers": ASSETS / "outlines" / f"wan2.1-t2v-{size.lower()}"
    for size in ("1.3B", "14B")
}


_without_weights = ContextVar("without_weights", default=False)


class TeacherError(ValueError):
    """A teacher that cannot be loaded; the message is one line."""


@contextlib.contextmanager
def outlines() -> Iterator[None]:
    """Inside, a teacher of OUTLINES may stand without its weights, and nothing is downloaded for it.

    For what asks for shapes alone. Ids of runs are then not those of the runs with weights: a teacher counts by content.
    """
    token = _without_weights.set(True)
    try:
        yield
    finally:
        _without_weights.reset(token)


def is_outline(folder: Path) -> bool:
    """Whether the folder has configs and no weights."""
    return folder in OUTLINES.values()


def teacher_folder(name: str) -> Path:
    """The local folder of a teacher: embedded by name, a folder, or a hub name, `OWNER/NAME` or `OWNER/NAME@REVISION`.

    From the hub it is downloaded to diffusers' cache, and found there without a network.

    Raises:
        TeacherError: if there is none.
    """
    folder = EMBEDDED.get(name, Path(name))
    why, hint = (
        "not a folder, not a name on the hub",
        "make mini-wan with `distill-bench pretrain`",
    )
    if not folder.is_dir() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from diffusers import DiffusionPipeline, logging  # takes seconds

        logging.set_verbosity_error()  # what it has to say is said below, in one line
        owner_and_name, _, revision = name.partition("@")
        local = _without_weights.get() and owner_and_name in OUTLINES
        try:
            folder = Path(
                DiffusionPipeline.download(
                    owner_and_name, revision=revision or None, local_files_only=local
                )
            )
        except Exception as error:
            if local:
                return OUTLINES[owner_and_name]
            said = re.split(r" \(|\. ", first_line(error))[0]
            asked = f"; is {revision!r} a branch, tag or commit of it?" if revision else ""
            why = f"not a folder, not from the hub ({type(error).__name__}: {said}{asked})"
            hint = "name a folder, or download it where there is a network, without HF_HUB_OFFLINE"
    if not folder.is_dir():
        raise TeacherError(f"no teacher {name!r}: {why}; {hint}; embedded: {', '.join(EMBEDDED)}")
    if is_gaussian(folder):
        return folder
    missing = [part for part in ("transformer", "tokenizer") if not (folder / part).is_dir()]
    if missing:
        raise TeacherError(f"teacher {folder} is no pipeline folder: it lacks {', '.join(missing)}")
    return folder


def is_gaussian(folder: Path) -> bool:
    """Whether the teacher of a folder is a Gaussian, whose scores and divergences are known in closed form."""
    return (folder / GAUSSIAN_FILE).is_file()


def weights_of(part: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a network in a pipeline folder; empty for an outline, and where they lie in `.bin` files.

    Raises:
        TeacherError: if there are none, or a file is missing or cut short.
    """
    if is_outline(part.parent):
        return {}
    shards = read_config(part, f"{WEIGHTS}.safetensors.index.json").get("weight_map")
    files = (
        [part / name for name in sorted(set(shards.values()))]
        if shards
        else [part / f"{WEIGHTS}.safetensors"]
    )
    if not files[0].is_file() and any(part.glob("*.bin")):
        return {}
    shapes = {}
    for path in files:
        if not path.is_file():
            raise TeacherError(f"{part} lacks weights: it has no {path.name}")
        stat = path.stat()
        shapes |= _shapes_in(path, stat.st_size, stat.st_mtime_ns)
    return shapes


@cache
def _shapes_in(path: Path, _size: int, _time: int) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise TeacherError(f"cannot load {path}: {error}") from error


def read_config(folder: Path, name: str = "config.json") -> dict:
    """The config of a part of a pipeline, empty where it is not there.

    Raises:
        TeacherError: if it is no JSON of keys and values.
    """
    path = folder / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TeacherError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise TeacherError(
            f"cannot read {path}: a config is an object of keys and values; found {type(found).__name__}"
        )
    return found


def content_hash(folder: Path) -> str:
    """sha256 over the names and bytes of a folder's weights and configs (12 digits): a teacher counts by content."""
    counted = {".safetensors", ".json", ".txt", ".model"}
    files = [
        (path, path.stat())
        for path in sorted(folder.rglob("*"))
        if path.suffix in counted and path.is_file()
    ]
    return _hash_of(folder, tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in files))


@cache
def _hash_of(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """The digest of files of these sizes and times; of gigabytes it is kept, for they are read at every start otherwise."""
    stated = hashlib.sha256(repr(files).encode()).hexdigest()[:32]
    kept = (
        Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        / "distill-bench"
        / "hashes"
        / stated
    )
    large = sum(size for _, size, _ in files) > LARGE
    if large and kept.is_file():
        return kept.read_text()
    digest = hashlib.sha256()
    for path, _, _ in files:
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    found = digest.hexdigest()[:12]
    if large:
        with contextlib.suppress(OSError):  # a home that cannot be written is no reason to stop
            write_bytes(kept, found.encode())
    return found
