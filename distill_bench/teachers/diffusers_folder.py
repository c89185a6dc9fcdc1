"""Teachers in a diffusers pipeline folder; checks configs and weights without loading networks."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from distill_bench.teachers.contents import read_config, weight_shapes
from distill_bench.teachers.folder import TeacherError, is_outline

if TYPE_CHECKING:
    from distill_bench.teachers.architecture import Architecture

COPY_ALL = "download or copy the whole folder"
EXPERTS = {"high_noise": "transformer", "low_noise": "transformer_2"}  # parts of a pipeline


@dataclass(frozen=True)
class DiffusersTeacher:
    """A diffusers pipeline folder (`distill_bench.teachers.kinds.Teacher`)."""

    kind: ClassVar[str] = "diffusers"
    has_networks: ClassVar[bool] = True
    has_exact_fake_score: ClassVar[bool] = False
    shares_architecture: ClassVar[bool] = True

    folder: Path

    @property
    def fps(self) -> float | None:
        """Frames per second of the trained model; None: unknown.

        Raises:
            TeacherError: if no architecture reads the folder.
        """
        return _architecture(self.folder).fps

    @property
    def negative_prompt(self) -> str:
        """Negative prompt published with the trained model; "" if there is none.

        Raises:
            TeacherError: if no architecture reads the folder.
        """
        return _architecture(self.folder).negative_prompt

    @property
    def boundary(self) -> float | None:
        """Lowest noise level of the high-noise expert; None for a single transformer.

        Raises:
            TeacherError: if no architecture reads the folder.
        """
        return _architecture(self.folder).boundary

    def check_parts(self, student: Path | None = None) -> None:
        """Check the configs and the headers of the weight files.

        Raises:
            TeacherError: if an autoencoder is unknown, or a file is missing or truncated.
        """
        folders = [self.folder] if student is None else [self.folder, student]
        for folder in folders:
            _check_configs(folder)
        if autoencoder_class(_architecture(self.folder)) is not None:
            weight_shapes(self.folder / "vae")
        for folder in folders:
            for part in transformer_folders(folder):
                _check_blocks(part)

    def unfit(
        self, frames: int, height: int, width: int, student: Path | None = None
    ) -> str | None:
        """Reason why clips of this size, or this student, are impossible; None if possible.

        Sizes must be multiples of the autoencoder's strides times the transformer's patches. A
        student must take the teacher's latents and texts.

        Raises:
            TeacherError: if no architecture reads one of the folders.
        """
        architecture = _architecture(self.folder)
        reason = architecture.unfit(frames, height, width)
        if reason is not None or student is None:
            return reason
        reason = architecture.unlike(_architecture(student))
        return reason and f"student {student.name}: {reason}"


def transformer_folders(pipeline: Path) -> list[Path]:
    """Folders of a pipeline's experts, high noise first, or of its only transformer."""
    return [pipeline / part for part in EXPERTS.values() if (pipeline / part).is_dir()]


def expert_folder(pipeline: Path, expert: str) -> Path:
    """Folder of a pipeline's transformer for `high_noise` (its only one, too) or `low_noise`.

    Raises:
        TeacherError: if the pipeline has no such expert.
    """
    folder = pipeline / EXPERTS[expert]
    if expert != "high_noise" and not folder.is_dir():
        raise TeacherError(
            f"student_expert {expert!r}: {pipeline.name} has no {EXPERTS[expert]}, so one network "
            "for all noise levels; leave `student_expert` out"
        )
    return folder


def autoencoder_class(architecture: "Architecture") -> str | None:
    """Class name of a pipeline's autoencoder; None if it has none because its latents are pixels.

    Raises:
        TeacherError: if it belongs to another architecture.
    """
    from distill_bench.teachers.architecture import OWN_AUTOENCODER  # torch takes seconds

    folder = architecture.folder
    if not architecture.vae:
        if (folder / "vae").is_dir():
            raise TeacherError(
                f"{folder / 'vae'} has no config.json; {COPY_ALL}, or remove vae/ if the latents "
                "are pixels"
            )
        if any(architecture.index.get("vae") or ()):
            raise TeacherError(
                f"{folder} has no vae/, but its model_index.json lists one; {COPY_ALL}"
            )
        return None
    name = architecture.vae.get("_class_name")
    known = (architecture.AUTOENCODER, OWN_AUTOENCODER)
    if name not in known:
        raise TeacherError(f"unknown autoencoder {name!r} in {folder}; known: {', '.join(known)}")
    return name


def _architecture(folder: Path) -> "Architecture":
    from distill_bench.teachers.architecture import architecture_of  # torch takes seconds

    return architecture_of(folder)


def _check_configs(folder: Path) -> None:
    """Raise TeacherError if model_index.json, the scheduler's config or the tokenizer is missing.

    diffusers would silently use its defaults, which belong to another model.
    """
    if is_outline(folder):
        return
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        if "_class_name" not in read_config(folder, name):
            problem = "names no class" if (folder / name).is_file() else "is missing"
            raise TeacherError(
                f"teacher {folder} is not a pipeline folder: its {name} {problem}; {COPY_ALL}"
            )
    if not any((folder / "tokenizer").iterdir()):
        raise TeacherError(
            f"teacher {folder} is not a pipeline folder: its tokenizer is empty; {COPY_ALL}"
        )


def _check_blocks(part: Path) -> None:
    """Raise TeacherError if a transformer's config and weights disagree on the number of blocks."""
    matches = (re.match(r"\w*blocks\.(\d+)\.", name) for name in weight_shapes(part))
    blocks = {match[1] for match in matches if match}
    configured = read_config(part).get("num_layers", len(blocks))
    if blocks and len(blocks) != configured:
        raise TeacherError(
            f"{part}: num_layers is {configured} in config.json, but the weights have "
            f"{len(blocks)} blocks; {COPY_ALL}"
        )
