"""Which folder a teacher's name means, and what it counts as. Imports nothing heavy: the command line resolves runs with it."""

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from distill_bench import ASSETS
from distill_bench.store.files import first_line

EMBEDDED = {name: ASSETS / name for name in ("mini-wan", "gaussian")}


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
    return folder
