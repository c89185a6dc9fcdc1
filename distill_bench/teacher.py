"""Which folder a teacher's name means, and what it counts as. Imports nothing heavy: the command line resolves runs with it."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

EMBEDDED = {name: Path(__file__).parent / "assets" / name for name in ("mini-wan", "gaussian")}
GAUSSIAN_FILE = "gaussian.json"
# configs of teachers whose weights do not ship: what their shapes decide can be said without the weights
OUTLINES = {
    f"Wan-AI/Wan2.1-T2V-{size}-Diffusers": Path(__file__).parent / "assets" / "outlines" / f"wan2.1-t2v-{size.lower()}"
    for size in ("1.3B", "14B")
}
_without_weights = ContextVar("without_weights", default=False)


class TeacherError(ValueError):
    """A teacher that cannot be loaded; the message is one line."""


@contextmanager
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
    """The local folder of a teacher: embedded by name, a folder, or a hub name (downloaded to diffusers' cache).

    Raises:
        TeacherError: if there is none.
    """
    folder, hub = EMBEDDED.get(name, Path(name)), "not a name on the hub"
    if not folder.is_dir() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from diffusers import DiffusionPipeline, logging  # takes seconds

        logging.set_verbosity_error()  # what it has to say is said below, in one line
        local = _without_weights.get() and name in OUTLINES
        try:
            folder = Path(DiffusionPipeline.download(name, local_files_only=local))
        except Exception as error:
            if local:
                return OUTLINES[name]
            hub = f"not from the hub ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
    if not folder.is_dir():
        raise TeacherError(
            f"no teacher {name!r}: not a folder, {hub}; embedded: {', '.join(EMBEDDED)}; "
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


def unfit(folder: Path, frames: int, height: int, width: int) -> str | None:
    """Why a teacher cannot be given clips of this size, or None: its autoencoder has strides, its transformer patches."""
    if is_gaussian(folder):
        return None
    patch = _config(folder / "transformer").get("patch_size", [1, 2, 2])
    vae = _config(folder / "vae")
    if vae.get("_class_name") == "AutoencoderKLWan":
        temporal, spatial = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    else:
        temporal, spatial = 1, 4 if vae else 1  # `autoencoder.FrameAutoencoder`, or latents that are pixels
    for key, size, multiple in (("height", height, spatial * patch[1]), ("width", width, spatial * patch[2])):
        if size % multiple:
            return f"{key} {size} must be a multiple of {multiple} for the teacher {folder.name}"
    if (frames - 1) % temporal or ((frames - 1) // temporal + 1) % patch[0]:
        n, rest = temporal * patch[0], 1 + temporal * (patch[0] - 1)
        allowed = f"a multiple of {n}" if rest == n else f"{rest} more than a multiple of {n}"
        return f"frames {frames} must be {allowed} for the teacher {folder.name}"
    return None


def _config(folder: Path) -> dict:
    path = folder / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


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
