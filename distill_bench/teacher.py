"""Which folder a teacher's name means, and what it counts as. Imports nothing heavy: the command line resolves runs with it."""

import contextlib
import hashlib
from functools import cache
from pathlib import Path

EMBEDDED = {name: Path(__file__).parent / "assets" / name for name in ("mini-wan", "gaussian")}
GAUSSIAN_FILE = "gaussian.json"


class TeacherError(ValueError):
    """A teacher that cannot be loaded; the message is one line."""


def teacher_folder(name: str) -> Path:
    """The local folder of a teacher: embedded by name, a folder, or a hub name (downloaded to diffusers' cache).

    Raises:
        TeacherError: if there is none.
    """
    folder = EMBEDDED.get(name, Path(name))
    if not folder.is_dir() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        with contextlib.suppress(Exception):
            from diffusers import DiffusionPipeline  # takes seconds

            folder = Path(DiffusionPipeline.download(name))
    if not folder.is_dir():
        raise TeacherError(
            f"no teacher {name!r}: not a folder, not on the hub; embedded: {', '.join(EMBEDDED)}; "
            "make mini-wan with `python -m distill_bench.pretrain`"
        )
    if is_gaussian(folder):
        return folder
    missing = [part for part in ("transformer", "text_encoder", "tokenizer") if not (folder / part).is_dir()]
    if missing:
        raise TeacherError(f"teacher {folder} is no pipeline folder: it lacks {', '.join(missing)}")
    return folder


def is_gaussian(folder: Path) -> bool:
    """Whether the teacher of a folder is a Gaussian, whose scores and divergences are known in closed form."""
    return (folder / GAUSSIAN_FILE).is_file()


def content_hash(folder: Path) -> str:
    """sha256 over the names and bytes of a folder's weights and configs (12 digits): a teacher counts by content."""
    counted = {".safetensors", ".json", ".txt", ".model"}
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.suffix in counted and path.is_file()]
    return _hash_of(folder, tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in files))


@cache
def _hash_of(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:12]
