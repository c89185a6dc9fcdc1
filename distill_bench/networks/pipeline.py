"""Pipelines and their networks: everything that knows diffusers lies here and in `architectures`, and ends in a `Denoiser`.

A teacher is a diffusers pipeline folder (`transformer/`, `scheduler/`, `text_encoder/`, `tokenizer/`, optional `vae/`), local
or by hub name; `mini-wan` is the one that ships with the package. Latent axes are always B, C, T, H, W.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from distill_bench.autoencoder import FrameAutoencoder
from distill_bench.config.schema import RunConfig
from distill_bench.domain import shapes
from distill_bench.networks.denoiser import forward_flops
from distill_bench.networks.loading import load_part
from distill_bench.networks.text_pipeline import TextPipeline, load_texts
from distill_bench.teachers.architectures import OWN_AUTOENCODER, Architecture, architecture_of
from distill_bench.teachers.contents import content_hash
from distill_bench.teachers.diffusers_folder import autoencoder_class
from distill_bench.teachers.folder import TeacherError, teacher_folder
from distill_bench.teachers.kinds import Pipeline, find_teacher
from distill_bench.teachers.texts import prompts_hash

# Clips drawn in one batch, and a bound on the values of their frames, which makes batches of large clips smaller.
CLIPS_PER_BATCH = 16
VALUES_PER_BATCH = 2**26


@dataclass(frozen=True, kw_only=True)
class DiffusersPipeline(TextPipeline):
    """A loaded diffusers pipeline folder (`distill_bench.teachers.kinds.Pipeline`)."""

    transformer: nn.Module
    vae: nn.Module | None
    student_folder: (
        Path  # of the pipeline whose transformer the student and the fake score begin from
    )

    @property
    def fps(self) -> float | None:
        """Frames a second of the teacher's clips, where it is known."""
        return self.architecture.fps

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip; without an autoencoder latents are pixels."""
        return self.architecture.latent_shape(frames, height, width)

    def draw(self, shape: tuple[int, ...], step: int, draws: torch.Generator) -> Tensor:
        """Noise (C, T, H, W) for a step of one clip."""
        return self.architecture.draw(shape, step, draws)

    def student(self) -> nn.Module:
        """A trainable float32 network, where the student begins: the teacher's, or that of the run's own folder."""
        return load_transformer(self.student_folder)

    def fake_score(self) -> nn.Module:
        """A trainable float32 network, where the fake score begins: as the student's."""
        return load_transformer(self.student_folder)

    def decode_video(self, latents: Tensor) -> Tensor:
        """Video (B, 3, T, H, W), about [-1, 1], of latents (B, C, T, H, W); differentiable."""
        if self.vae is None:
            return latents
        if isinstance(self.vae, FrameAutoencoder):
            return self.vae.decode(latents)
        return self.architecture.decode(self.vae, latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames uint8 (B, T, 3, H, W) of latents (B, C, T, H, W)."""
        frames = (
            ((self.decode_video(latents).float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        )
        return frames.transpose(1, 2).cpu()

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Latents (B, C, T, H, W) of frames uint8 (B, T, 3, H, W)."""
        video = torch.from_numpy(frames).to(self.device).float().transpose(1, 2) / 127.5 - 1
        if self.vae is None:
            return video
        if isinstance(self.vae, FrameAutoencoder):
            return self.vae.encode(video)
        return self.architecture.encode(self.vae, video)

    def data(self, prompts: list[str], keys: Sequence[int]) -> Tensor | None:
        """Latents (B, C, T, H, W) of real clips for the prompts, where their domain can be rendered; else None."""
        try:
            attributes = [shapes.parse(prompt) for prompt in prompts]
        except ValueError:
            return None
        return self.encode(
            np.stack([shapes.render(a, key) for a, key in zip(attributes, keys, strict=True)])
        )

    def flops(self, net: nn.Module, latent_shape: tuple[int, ...], text: Tensor) -> float:
        """FLOPs of one forward of one sample, for the weight of a role in the ledger."""
        return forward_flops(net, latent_shape, text)

    def exact_fake_score(
        self, student: nn.Module, sigmas: Tensor, stepping: str, exits: Sequence[int]
    ) -> None:
        """None: the student's density has no closed form."""

    def facts(
        self, student: nn.Module, sigmas: Tensor, stepping: str, guidance_scale: float
    ) -> dict[str, np.ndarray]:
        """Empty: nothing is known exactly about the student's samples."""
        return {}


def clips_per_batch(config: RunConfig) -> int:
    """Number of clips of a run's size that are drawn in one batch; the batch size is part of a clip's bits."""
    values = 3 * config.frames * config.height * config.width
    return max(1, min(CLIPS_PER_BATCH, VALUES_PER_BATCH // values))


def pipeline_of(config: RunConfig, device: torch.device, store: Path | None = None) -> Pipeline:
    """The pipeline of a run: its teacher, with what the run says of students and prompts, and the store's embeddings.

    Raises:
        TeacherError: if one of them is not what it was when the run was resolved.
    """
    prompts = None if config.prompts is None else Path(config.prompts)
    check_content(config, prompts)
    if store is not None and find_teacher(config.teacher).has_networks:
        texts = load_texts(config.teacher, device, prompts, store)
        texts.texts(texts.prompts())  # a text encoder is gone before the first network comes
    return load_pipeline(config.teacher, device, config.student, prompts, store)


def check_content(config: RunConfig, prompts: Path | None = None) -> None:
    """TeacherError where teacher, student or prompts are not what they were when the run was resolved."""
    found = {"teacher": content_hash(teacher_folder(config.teacher))}
    if config.student is not None:
        found["student"] = content_hash(teacher_folder(config.student) / "transformer")
    if prompts is not None:
        found["prompts"] = prompts_hash(prompts)
    for key, content in found.items():
        recorded = getattr(config, f"{key}_hash")
        if recorded and content != recorded:
            raise TeacherError(
                f"{key} {getattr(config, key)} is not what the run was resolved with: its content is {content}, run.yaml has "
                f"{recorded}; put the files back, or start the sweep again, for a run of its own"
            )


def load_pipeline(
    name: str,
    device: torch.device,
    student: str | None = None,
    prompts: Path | None = None,
    store: Path | None = None,
) -> Pipeline:
    """The teacher `name` in float32, frozen; its students begin from the folder `student`, where it is given.

    Its transformer is in host memory, for whoever runs it to place: it may be sharded, offloaded, or not needed at all.
    """
    teacher = find_teacher(name)
    if not teacher.has_networks:
        return teacher.load(device)
    folder = teacher.folder
    architecture = architecture_of(folder)
    transformer = load_transformer(folder).eval().requires_grad_(False)
    vae = load_autoencoder(folder, architecture)
    if vae is not None:
        vae = vae.to(device).eval().requires_grad_(False)
    begin = teacher_folder(student) if student else folder
    return DiffusersPipeline(
        folder,
        architecture,
        device,
        store,
        prompts,
        transformer=transformer,
        vae=vae,
        student_folder=begin,
    )


def load_transformer(folder: Path) -> nn.Module:
    """A trainable float32 copy of the pipeline's transformer, which knows the architecture that calls it."""
    architecture = architecture_of(folder)
    net = load_part(
        getattr(diffusers, architecture.transformer["_class_name"]),
        folder / "transformer",
        every=True,
    ).eval()
    net.architecture = architecture
    return net


def load_autoencoder(folder: Path, architecture: Architecture) -> nn.Module | None:
    """The pipeline's autoencoder in float32, set to take clips of any size; None where it has none.

    Raises:
        TeacherError: if it is another architecture's.
    """
    name = autoencoder_class(architecture)
    if name is None:
        return None
    if name == OWN_AUTOENCODER:
        return load_part(FrameAutoencoder, folder / "vae")
    vae = load_part(getattr(diffusers, name), folder / "vae")
    architecture.at_size(vae)
    return vae
