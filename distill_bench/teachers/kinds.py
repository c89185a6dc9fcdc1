"""Kinds of teachers: one Protocol for a teacher's folder, one for the loaded teacher.

A folder that holds one of the marker files of `CLOSED_FORM` is read by the class named there. Every
other folder must be a diffusers pipeline. To add a kind: write one module with a subclass of
`ClosedFormTeacher` and a `Pipeline`, and name the class in `CLOSED_FORM`. The rest of the package
tests the capabilities of a `Teacher`, never its kind.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from distill_bench.teachers.diffusers_folder import DiffusersTeacher
from distill_bench.teachers.folder import TeacherError, is_outline, teacher_folder

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from distill_bench.noise import Stepping
    from distill_bench.teachers.embeddings import Texts

# Marker file -> "module:class". The class is imported late: it needs torch and a higher layer.
CLOSED_FORM = {
    "gaussian.json": "distill_bench.domain.gaussian_teacher:GaussianTeacher",
    "mixture.json": "distill_bench.domain.mixture_teacher:MixtureTeacher",
}


class Teacher(Protocol):
    """A teacher's folder: its capabilities and checks, available before any network is loaded."""

    folder: Path
    kind: ClassVar[str]  # for messages
    # a transformer that can be adapted, sharded, offloaded and exported, and takes any prompt
    has_networks: ClassVar[bool]
    has_exact_fake_score: ClassVar[bool]  # `fake_score: exact` is possible
    shares_architecture: ClassVar[bool]  # by student and fake score, so their weights can be mixed

    @property
    def fps(self) -> float | None:
        """Frames per second of the teacher's clips; None: unknown."""

    @property
    def negative_prompt(self) -> str:
        """Negative prompt published with the teacher; "" if there is none."""

    @property
    def boundary(self) -> float | None:
        """Lowest noise level of the first of two experts; None for a teacher of one network."""

    def check_parts(self, student: Path | None = None) -> None:
        """Check the files that a job would load, without loading them.

        Args:
            student: folder of the pipeline that the student starts from; None: the teacher's.

        Raises:
            TeacherError: if a file is missing, truncated or of an unknown model.
        """

    def unfit(
        self, frames: int, height: int, width: int, student: Path | None = None
    ) -> str | None:
        """Reason why clips of this size, or this student, are impossible; None if possible.

        Args:
            frames: frames per clip.
            height: pixels.
            width: pixels.
            student: folder of the pipeline that the student starts from; None: the teacher's.
        """


class RealLatents(Protocol):
    """Real latents with their texts, of which training draws each row equally often."""

    def every(self) -> "Mapping[str, Tensor]":
        """All rows: `x0` (N, C, T, H, W) and `text` (N, L, D)."""


class Pipeline(Protocol):
    """A loaded teacher: everything that training and sampling need from it.

    Latents are (B, C, T, H, W), texts (B, L, D), frames uint8 (B, F, 3, Y, X).
    """

    folder: Path
    device: "torch.device"
    transformer: "nn.Module"  # the frozen teacher

    @property
    def fps(self) -> float | None:
        """Frames per second of the teacher's clips; None: unknown."""

    def prompts(self) -> list[str]:
        """Training prompts."""

    def encode_text(self, prompts: list[str]) -> "Tensor":
        """Embeddings (B, L, D) of prompts; "" is the empty prompt."""

    def texts(
        self, prompts: list[str], dtype: "torch.dtype" = ..., negative_prompt: str = ""
    ) -> "Texts":
        """Embeddings of prompts, read on demand.

        Args:
            prompts: item i of the result is the embedding of prompts[i].
            dtype: of the embeddings.
            negative_prompt: `default`, `file:PATH` or a text; its embedding is `null_text`.
        """

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip."""

    def draw(self, shape: tuple[int, ...], step: int, draws: "torch.Generator") -> "Tensor":
        """Noise (C, T, H, W) for one sampling step of one clip."""

    def student(self) -> "nn.Module":
        """New trainable network, at the student's starting point."""

    def fake_score(self) -> "nn.Module":
        """New trainable network, at the fake score's starting point."""

    def has_clips(self, prompts: list[str]) -> bool:
        """True if real clips exist for every prompt."""

    def clips(self, prompts: list[str], keys: Sequence[int]) -> "np.ndarray":
        """Frames uint8 (B, F, 3, Y, X) of real clips, one per prompt and key."""

    def data(self, prompts: list[str], keys: Sequence[int]) -> "Tensor | None":
        """Latents (B, C, T, H, W) of real clips, one per prompt and key; None if none exist."""

    def controls(
        self, prompts: list[str]
    ) -> "Mapping[str, Callable[[np.ndarray, int], np.ndarray]]":
        """Kind of a control row -> (frames, seed) -> damaged frames, both uint8 (B, F, 3, Y, X).

        These replace the controls of every domain, `distill_bench.domain.controls.CONTROL_ROWS`,
        and add to them.

        Args:
            prompts: of the frames, B of them.
        """

    def encode(self, frames: "np.ndarray") -> "Tensor":
        """Latents (B, C, T, H, W) of frames uint8 (B, F, 3, Y, X)."""

    def decode_video(self, latents: "Tensor") -> "Tensor":
        """Video (B, 3, F, Y, X), roughly in [-1, 1], of latents; differentiable."""

    def decode(self, latents: "Tensor") -> "Tensor":
        """Frames uint8 (B, F, 3, Y, X) of latents, on the CPU."""

    def flops(self, net: "nn.Module", latent_shape: tuple[int, ...], text: "Tensor") -> float:
        """FLOPs of one forward pass for one sample; the ledger weighs roles by them."""

    def exact_fake_score(
        self,
        student: "nn.Module",
        sigmas: "Tensor",
        stepping: "Stepping",
        exits: Sequence[int],
        data: "RealLatents | None",
    ) -> "Callable[[Tensor, Tensor, Tensor], Tensor] | None":
        """Clean prediction (x_t, sigma, text) -> x0 of the student's own density.

        None: the density has no closed form.

        Args:
            student: read at every call, so that the score follows its training.
            sigmas: the student's noise levels, high to low.
            stepping: as for `distill_bench.rollout.rollout`.
            exits: the steps whose samples the fake score learns from; they form a mixture.
            data: the real latents that the student predicts from; None: its own rollouts.
        """

    def facts(
        self,
        net: "nn.Module | None",
        sigmas: "Tensor",
        stepping: "Stepping",
        target_guidance: float,
        guidance_scale: float = 1.0,
    ) -> "dict[str, np.ndarray]":
        """Exact knowledge of a row's clips, for evaluators; empty if there is none.

        Args:
            net: whose samples the clips are, a student or the teacher; None: of no network.
            sigmas: the noise levels of its steps, high to low.
            stepping: as for `distill_bench.rollout.rollout`.
            target_guidance: of the teacher's reference clips.
            guidance_scale: with which the network was sampled.
        """


@dataclass(frozen=True)
class ClosedFormTeacher:
    """Base of teachers in closed form: there is no transformer and no autoencoder."""

    kind: ClassVar[str]
    has_networks: ClassVar[bool] = False
    has_exact_fake_score: ClassVar[bool] = True
    shares_architecture: ClassVar[bool] = False
    fps: ClassVar[float | None] = None
    negative_prompt: ClassVar[str] = ""
    boundary: ClassVar[float | None] = None

    folder: Path

    def check_parts(self, student: Path | None = None) -> None:
        """Check nothing: `load` reads only two small files."""

    def unfit(
        self, frames: int, height: int, width: int, student: Path | None = None
    ) -> str | None:
        """Refuse any student folder. The size of the clips has no effect."""
        if student is None:
            return None
        return (
            f"student {student}: a {self.kind} teacher makes its own student; leave `student` out"
        )

    def load(self, device: "torch.device") -> Pipeline:
        """Load the teacher onto a device."""
        raise NotImplementedError


def read_teacher(folder: Path) -> Teacher:
    """The teacher in a folder.

    Raises:
        TeacherError: if the folder is of no known kind.
    """
    for marker, name in CLOSED_FORM.items():
        if (folder / marker).is_file():
            module, _, class_name = name.partition(":")
            return getattr(importlib.import_module(module), class_name)(folder)
    missing = [part for part in ("transformer", "tokenizer") if not (folder / part).is_dir()]
    if missing and not is_outline(folder):
        raise TeacherError(
            f"teacher {folder} is not a pipeline folder: it lacks {', '.join(missing)}; "
            "download or copy the whole folder"
        )
    return DiffusersTeacher(folder)


def find_teacher(name: str) -> Teacher:
    """The teacher with a name (see `teacher_folder`).

    Raises:
        TeacherError: if there is no such folder, or the folder is of no known kind.
    """
    return read_teacher(teacher_folder(name))
