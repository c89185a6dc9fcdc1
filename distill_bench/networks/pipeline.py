"""Loads a teacher's pipeline, and the pipeline of a run.

A teacher is a diffusers pipeline folder (`transformer/`, `scheduler/`, `text_encoder/`,
`tokenizer/`, optional `vae/` and `transformer_2/`), local or by hub name, or has a closed form.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from distill_bench.autoencoder import FrameAutoencoder, frames_to_video, video_to_frames
from distill_bench.config.schema import ProtocolConfig, RunConfig
from distill_bench.domain import controls, shapes
from distill_bench.networks.denoiser import forward_flops
from distill_bench.networks.loading import load_part
from distill_bench.networks.text_pipeline import TextPipeline, load_texts
from distill_bench.noise import Stepping
from distill_bench.teachers.architecture import OWN_AUTOENCODER, Architecture, architecture_of
from distill_bench.teachers.contents import content_hash
from distill_bench.teachers.diffusers_folder import EXPERTS, autoencoder_class, expert_folder
from distill_bench.teachers.experts import Experts
from distill_bench.teachers.folder import TeacherError, teacher_folder
from distill_bench.teachers.kinds import Pipeline, find_teacher
from distill_bench.teachers.prompts import negative_text, prompts_hash, text_hash

# Limits of a batch of sampled clips: number of clips, and pixel values of all their frames.
CLIPS_PER_BATCH = 16
VALUES_PER_BATCH = 2**26


@dataclass(frozen=True, kw_only=True)
class DiffusersPipeline(TextPipeline):
    """A loaded diffusers pipeline folder (`distill_bench.teachers.kinds.Pipeline`)."""

    transformer: nn.Module  # the frozen teacher, float32, in host memory
    vae: nn.Module | None  # None: latents are pixels
    student_folder: Path  # of the pipeline whose transformer student and fake score start from
    student_expert: str = "high_noise"  # that transformer, if the pipeline has two

    @property
    def fps(self) -> float | None:
        """Frames per second of the teacher's clips; None: unknown."""
        return self.architecture.fps

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip; without an autoencoder latents are pixels."""
        return self.architecture.latent_shape(frames, height, width)

    def draw(self, shape: tuple[int, ...], step: int, draws: torch.Generator) -> Tensor:
        """Noise (C, T, H, W) for one sampling step of one clip."""
        return self.architecture.draw(shape, step, draws)

    def student(self) -> nn.Module:
        """A trainable float32 network at the student's starting point."""
        return load_transformer(self.student_folder, self.student_expert)

    def fake_score(self) -> nn.Module:
        """A trainable float32 network; the fake score starts from the student's weights."""
        return self.student()

    def decode_video(self, latents: Tensor) -> Tensor:
        """Video (B, 3, F, Y, X), roughly in [-1, 1], of latents (B, C, T, H, W); differentiable."""
        if self.vae is None:
            return latents
        if isinstance(self.vae, FrameAutoencoder):
            return self.vae.decode(latents)
        return self.architecture.decode(self.vae, latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames uint8 (B, F, 3, Y, X) of latents (B, C, T, H, W), on the CPU."""
        return video_to_frames(self.decode_video(latents))

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Latents (B, C, T, H, W) of frames uint8 (B, F, 3, Y, X)."""
        video = frames_to_video(torch.from_numpy(frames).to(self.device))
        if self.vae is None:
            return video
        if isinstance(self.vae, FrameAutoencoder):
            return self.vae.encode(video)
        return self.architecture.encode(self.vae, video)

    def has_clips(self, prompts: list[str]) -> bool:
        """True if the teacher is of the embedded domain and every prompt is one of its captions.

        Other teachers, which have another autoencoder, may have prompts such as "a red circle" too.
        """
        foreign = self.vae is not None and not isinstance(self.vae, FrameAutoencoder)
        return not foreign and shapes.are_captions(prompts)

    def clips(self, prompts: list[str], keys: Sequence[int]) -> np.ndarray:
        """Frames uint8 (B, F, 3, Y, X) of clips rendered from captions of moving shapes."""
        pairs = zip(prompts, keys, strict=True)
        return np.stack([shapes.render(shapes.parse(prompt), key) for prompt, key in pairs])

    def data(self, prompts: list[str], keys: Sequence[int]) -> Tensor | None:
        """Latents (B, C, T, H, W) of rendered clips; None if any prompt is not a shapes caption."""
        return self.encode(self.clips(prompts, keys)) if self.has_clips(prompts) else None

    def controls(self, prompts: list[str]) -> Mapping[str, controls.Damage]:
        """`equalised`, if every prompt is a caption of the embedded domain."""
        if not shapes.are_captions(prompts):
            return {}
        return {"equalised": lambda frames, seed: controls.equalised(frames, prompts)}

    def flops(self, net: nn.Module, latent_shape: tuple[int, ...], text: Tensor) -> float:
        """FLOPs of one forward pass for one sample; the ledger weighs roles by them."""
        return forward_flops(net, latent_shape, text)

    def exact_fake_score(
        self,
        student: nn.Module,
        sigmas: Tensor,
        stepping: Stepping,
        exits: Sequence[int],
        data: object,
    ) -> None:
        """None: the student's density has no closed form."""

    def facts(
        self,
        net: nn.Module | None,
        sigmas: Tensor,
        stepping: Stepping,
        target_guidance: float,
        guidance_scale: object = 1.0,
    ) -> dict[str, np.ndarray]:
        """Empty: nothing is known exactly about the clips."""
        return {}


def clips_per_batch(config: RunConfig) -> int:
    """Number of clips of a run's size to draw in one batch; a clip's bits depend on it."""
    values = 3 * config.frames * config.height * config.width
    return max(1, min(CLIPS_PER_BATCH, VALUES_PER_BATCH // values))


def pipeline_of(config: RunConfig, device: torch.device, store: Path | None = None) -> Pipeline:
    """The pipeline of a run, with the run's student and prompts.

    With a store, missing embeddings are made first, so that the text encoder is freed before the
    first network is loaded.

    Args:
        config: a resolved run.
        device: of the autoencoder and the texts.
        store: folder of the runs, which holds the embeddings; None: encode in memory.

    Raises:
        TeacherError: if a file of teacher, student or prompts has changed since the run was
            resolved, or cannot be loaded.
    """
    prompts = None if config.prompts is None else Path(config.prompts)
    check_content(config, prompts)
    if store is not None and find_teacher(config.teacher).has_networks:
        texts = load_texts(config.teacher, device, prompts, store)
        reference = texts.negative_text(config.protocol.negative_prompt)
        texts.texts([*texts.prompts(), reference], negative_prompt=config.negative_prompt)
    return load_pipeline(
        config.teacher, device, config.student, prompts, store, config.student_expert
    )


def check_content(config: RunConfig, prompts: Path | None = None) -> None:
    """Compare the content of teacher, student and prompts with the hashes in the run's config.

    Negative prompts are among the prompts.

    Raises:
        TeacherError: if a hash has changed since the run was resolved.
    """
    teacher = find_teacher(config.teacher)
    hashes = {"teacher": content_hash(teacher.folder)}
    if config.student is not None:
        student = expert_folder(teacher_folder(config.student), config.student_expert)
        hashes["student"] = content_hash(student)
    if prompts is not None:
        hashes["prompts"] = prompts_hash(prompts)
    checked: list[tuple[RunConfig | ProtocolConfig, str, str]]
    checked = [(config, key, content) for key, content in hashes.items()]
    for keys in (config, config.protocol):
        text = negative_text(keys.negative_prompt, teacher.negative_prompt)
        checked.append((keys, "negative_prompt", text_hash(text)))
    for keys, key, content in checked:
        recorded = getattr(keys, f"{key}_hash")
        if recorded and content != recorded:
            raise TeacherError(
                f"{key} {getattr(keys, key)} has changed since the run was resolved: its hash is "
                f"{content}, but run.yaml records {recorded}; restore the files, or start the "
                "sweep again to make a new run"
            )


def load_pipeline(
    name: str,
    device: torch.device,
    student: str | None = None,
    prompts: Path | None = None,
    store: Path | None = None,
    student_expert: str = "high_noise",
) -> Pipeline:
    """Load a teacher in float32, frozen.

    Its transformer stays in host memory, so that the caller can shard or offload it.

    Args:
        name: of the teacher: a folder or hub name.
        device: of the autoencoder and the texts.
        student: name of the pipeline whose transformer the student starts from; None: the
            teacher's.
        prompts: file of training prompts; None: the folder's own.
        store: where embeddings are kept; None: encode at every call.
        student_expert: that transformer, if the student's pipeline has two.

    Raises:
        TeacherError: if a part is missing or cannot be loaded.
    """
    teacher = find_teacher(name)
    if not teacher.has_networks:
        return teacher.load(device)
    folder = teacher.folder
    architecture = architecture_of(folder)
    transformer = load_networks(folder).requires_grad_(False)
    vae = load_autoencoder(folder, architecture)
    if vae is not None:
        vae = vae.to(device).eval().requires_grad_(False)
    return DiffusersPipeline(
        folder,
        architecture,
        device,
        store,
        prompts,
        transformer=transformer,
        vae=vae,
        student_folder=teacher_folder(student) if student else folder,
        student_expert=student_expert,
    )


def load_networks(folder: Path) -> nn.Module:
    """A pipeline's transformer, or its two experts, as `load_transformer` loads them.

    Raises:
        TeacherError: as for `load_transformer`.
    """
    boundary = architecture_of(folder).boundary
    if boundary is None:
        return load_transformer(folder)
    return Experts(*(load_transformer(folder, expert) for expert in EXPERTS), boundary).eval()


def load_transformer(folder: Path, expert: str = "high_noise") -> nn.Module:
    """A pipeline's transformer, trainable, in float32, with its `Architecture` as an attribute.

    Args:
        folder: of the pipeline.
        expert: `high_noise`, which is a pipeline's only transformer as well, or `low_noise`.

    Raises:
        TeacherError: if the folder's architecture is unknown or its weights do not fit it.
    """
    architecture = architecture_of(folder)
    network_class = getattr(diffusers, architecture.transformer["_class_name"])
    net = load_part(network_class, expert_folder(folder, expert), no_extra=True).eval()
    net.architecture = architecture
    return net


def load_autoencoder(folder: Path, architecture: Architecture) -> nn.Module | None:
    """A pipeline's autoencoder in float32, with limited memory; None if it has none.

    Raises:
        TeacherError: if the architecture cannot call the folder's autoencoder.
    """
    name = autoencoder_class(architecture)
    if name is None:
        return None
    if name == OWN_AUTOENCODER:
        return load_part(FrameAutoencoder, folder / "vae")
    vae = load_part(getattr(diffusers, name), folder / "vae")
    architecture.limit_memory(vae)
    return vae
