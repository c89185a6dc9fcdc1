"""Maps a teacher's name to a local folder; needs no network access and no slow imports."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from distill_bench import ASSETS

EMBEDDED = {name: ASSETS / name for name in ("mini-wan", "gaussian", "mixture")}

# Configs of teachers whose weights do not ship: enough to plan a sweep and predict its memory.
OUTLINES = {
    f"Wan-AI/{name}-Diffusers": ASSETS / "outlines" / name.lower()
    for name in ("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.2-T2V-A14B")
}

_outlines_allowed = ContextVar("outlines_allowed", default=False)


class TeacherError(ValueError):
    """A teacher that cannot be used; the message is one line."""


@contextlib.contextmanager
def outlines() -> Iterator[None]:
    """Plan with the configs in OUTLINES for teachers whose weights are not cached.

    Ids of runs resolved inside differ from those of the runs with weights, because a teacher's
    content enters the id.
    """
    token = _outlines_allowed.set(True)
    try:
        yield
    finally:
        _outlines_allowed.reset(token)


def is_outline(folder: Path) -> bool:
    """True for a folder of OUTLINES, which holds configs and no weights."""
    return folder in OUTLINES.values()


def teacher_folder(name: str) -> Path:
    """Local folder of a teacher.

    Args:
        name: an embedded teacher, a path, or a hub name `OWNER/NAME` or `OWNER/NAME@REVISION`. A
            hub name is looked up in the Hugging Face cache, which
            `distill_bench.teachers.hub.download` fills.

    Raises:
        TeacherError: if there is no such folder.
    """
    folder = EMBEDDED.get(name, Path(name))
    if folder.is_dir():
        return folder
    if name in EMBEDDED:
        raise TeacherError(f"teacher {name} is not built yet; run `distill-bench pretrain`")
    repository, revision = split_hub_name(name)
    if repository is None:
        raise TeacherError(
            f"no teacher {name!r}: not a folder, not a hub name OWNER/NAME; "
            f"embedded: {', '.join(EMBEDDED)}"
        )
    snapshot = _cached_snapshot(repository, revision)
    if snapshot is not None:
        return snapshot
    if _outlines_allowed.get() and repository in OUTLINES:
        return OUTLINES[repository]
    raise TeacherError(
        f"no teacher {name!r}: not a folder, not in the Hugging Face cache; download it with "
        f"`distill-bench download {name}`; embedded: {', '.join(EMBEDDED)}"
    )


def is_local_folder(name: object) -> bool:
    """True if a teacher's name is the path of a folder."""
    return isinstance(name, str) and name not in EMBEDDED and Path(name).is_dir()


def split_hub_name(name: str) -> tuple[str | None, str | None]:
    """(repository, revision) of a hub name, or (None, None) for any other name.

    The revision is None for the default branch.
    """
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None, None
    repository, _, revision = name.partition("@")
    return repository, revision or None


def _cached_snapshot(repository: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download  # takes half a second; few sweeps need it
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):  # ValueError: invalid repository name
        return None
