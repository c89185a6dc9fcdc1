"""TODO: teachers.checks."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from distill_bench.teachers.folder import (
    TeacherError,
    is_gaussian,
    is_outline,
    read_config,
    weights_of,
)

if TYPE_CHECKING:
    from distill_bench.teachers.architectures import Architecture


def unfit(
    folder: Path, frames: int, height: int, width: int, student: Path | None = None
) -> str | None:
    """Why a teacher cannot be given clips of this size or this student, or None.

    Its autoencoder has strides and its transformer patches; a student in another folder takes the same latents and texts.

    Raises:
        TeacherError: if no architecture reads one of the folders.
    """
    if is_gaussian(folder):
        return (
            None
            if student is None
            else f"student {student}: the student of a gaussian teacher is linear, and no folder's"
        )
    from distill_bench.teachers.architectures import architecture_of  # torch takes seconds

    architecture = architecture_of(folder)
    why = architecture.unfit(frames, height, width)
    if why is None and student is not None:
        why = architecture.unlike(architecture_of(student))
        why = why and f"student {student.name}: {why}"
    return why


def autoencoder_of(architecture: "Architecture") -> str | None:
    """The class of a pipeline's autoencoder; None where it has none.

    Raises:
        TeacherError: if it is another architecture's.
    """
    from distill_bench.teachers.architectures import OWN_AUTOENCODER  # torch takes seconds

    folder = architecture.folder
    if not architecture.vae:
        if (folder / "vae").is_dir():
            raise TeacherError(
                f"{folder / 'vae'} has no config.json; a pipeline whose latents are pixels has no vae/"
            )
        if any(architecture.index.get("vae") or ()):
            raise TeacherError(
                f"{folder} has no vae/, and its model_index.json names one; download or copy the whole folder"
            )
        return None
    name = architecture.vae.get("_class_name")
    if name not in (architecture.AUTOENCODER, OWN_AUTOENCODER):
        raise TeacherError(
            f"unknown autoencoder {name!r} in {folder}; known: {architecture.AUTOENCODER}, {OWN_AUTOENCODER}"
        )
    return name


def check_parts(folder: Path, student: Path | None = None) -> None:
    """Look for what a job would load, by configs and by the heads of the files of weights.

    Raises:
        TeacherError: if an autoencoder is unknown, or files are missing or cut short.
    """
    if is_gaussian(folder):
        return
    for each in filter(None, (folder, student)):
        _check_configs(each)
    from distill_bench.teachers.architectures import architecture_of  # torch takes seconds

    if autoencoder_of(architecture_of(folder)) is not None:
        weights_of(folder / "vae")
    for each in filter(None, (folder, student)):
        _check_blocks(each / "transformer")


def _check_configs(folder: Path) -> None:
    """TeacherError for a folder that lacks what says how its parts are used: defaults would be another model."""
    if is_outline(folder):
        return
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        if "_class_name" not in read_config(folder, name):
            kind = "says nothing of a class" if (folder / name).is_file() else "is not there"
            raise TeacherError(
                f"teacher {folder} is no pipeline folder: its {name} {kind}; download or copy the whole folder"
            )
    if not any((folder / "tokenizer").iterdir()):
        raise TeacherError(
            f"teacher {folder} is no pipeline folder: its tokenizer is empty; download or copy the whole folder"
        )


def _check_blocks(part: Path) -> None:
    """TeacherError where a transformer's config asks for other blocks than its weights have."""
    found = {
        match[1] for name in weights_of(part) if (match := re.match(r"\w*blocks\.(\d+)\.", name))
    }
    asked = read_config(part).get("num_layers", len(found))
    if found and len(found) != asked:
        raise TeacherError(
            f"{part}: its config.json asks for num_layers {asked}, its weights are of {len(found)} blocks"
        )


def frames_a_second(folder: Path) -> float | None:
    """The rate that a teacher's clips play at, where it is known.

    Raises:
        TeacherError: if no architecture reads the folder.
    """
    if is_gaussian(folder):
        return None
    from distill_bench.teachers.architectures import architecture_of  # torch takes seconds

    return architecture_of(folder).fps
