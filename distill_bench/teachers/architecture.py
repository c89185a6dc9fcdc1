"""Base class of architectures: the call of a pipeline's network, its latents and its texts.

`distill_bench.teachers.architectures` holds one architecture per file.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from distill_bench.teachers import architectures
from distill_bench.teachers.contents import read_config
from distill_bench.teachers.folder import TeacherError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

SUFFIX = "Transformer3DModel"
OWN_AUTOENCODER = "FrameAutoencoder"  # `distill_bench.autoencoder`; allowed for any architecture

# runs the network: takes all of its arguments but return_dict, returns its output
Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Architecture:
    """Use of one pipeline folder, decided by its configs.

    The base class calls the network as (x_t, 1000 sigma, text) -> velocity. Subclasses override the
    call, and name their classes in diffusers and transformers and the keys of their configs.
    """

    PIPELINE: ClassVar[str] = ""
    AUTOENCODER: ClassVar[str] = ""
    TEXT_ENCODER: ClassVar[str] = ""
    TEXT_LENGTH: ClassVar[int] = 0  # tokens per prompt, unless the tokenizer allows fewer
    TEXT_WIDTH: ClassVar[str] = ""  # key of the transformer's config
    LATENT_CHANNELS: ClassVar[str] = "latent_channels"  # key of the autoencoder's config
    FRAMEWISE: ClassVar[bool] = False  # the autoencoder can decode a few frames at a time
    NEGATIVE_PROMPT: ClassVar[str] = ""  # published with the released models

    folder: Path | None = None
    transformer: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)  # model_index.json
    transformer_2: Mapping[str, Any] = field(default_factory=dict)  # of a pipeline with two experts

    # ---- the network

    def velocity(
        self, net: nn.Module, call: Call, x_t: Tensor, sigma: Tensor, text: Tensor
    ) -> Tensor:
        """Velocity noise - x0 of the network, (B, C, T, H, W).

        Args:
            net: read for its config only.
            call: runs the network, possibly with other weights.
            x_t: (B, C, T, H, W).
            sigma: (B,) in (0, 1].
            text: (B, L, D).
        """
        return call(x_t, 1000 * sigma, text)

    def blocks(self, net: nn.Module) -> nn.ModuleList:
        """The blocks of the network, in the order in which they run."""
        return net.blocks

    def tokens(self, output: Any) -> Tensor:
        """The video's tokens (B, N, width) in a block's output."""
        return output

    def diffusers_names(self, names: list[str]) -> dict[str, str]:
        """Names of weights or LoRA entries in released files -> diffusers' names of them."""
        return {name: name for name in names}

    @property
    def boundary(self) -> float | None:
        """Noise level, in (0, 1], below which `transformer_2` runs; None: there is one network."""
        return self.index.get("boundary_ratio")

    # ---- shapes

    @property
    def released(self) -> bool:
        """True if the folder has the released model's autoencoder, not one of this project."""
        return self.vae.get("_class_name") == self.AUTOENCODER

    @property
    def negative_prompt(self) -> str:
        """Negative prompt published with the trained model; "" if there is none."""
        return self.NEGATIVE_PROMPT if self.released else ""

    @property
    def fps(self) -> float | None:
        """Frames per second of the trained model; None if the folder has another autoencoder."""
        return self.own_fps if self.released else None

    @property
    def own_fps(self) -> float:
        """Frames per second of the released model."""
        raise NotImplementedError

    def own_strides(self) -> tuple[int, int]:
        """(temporal, spatial) strides of the released autoencoder: frames and pixels per latent."""
        raise NotImplementedError

    def strides(self) -> tuple[int, int]:
        """(temporal, spatial) strides of the folder's autoencoder; (1, 1) if it has none."""
        if not self.vae:
            return 1, 1
        return (1, 4) if self.vae["_class_name"] == OWN_AUTOENCODER else self.own_strides()

    def patch(self) -> tuple[int, int, int]:
        """Latents per token: temporal, vertical, horizontal."""
        raise NotImplementedError

    def frames_rule(self) -> tuple[int, int]:
        """(n, rest): the number of frames must be a multiple of n, plus `rest`."""
        temporal, patch = self.strides()[0], self.patch()[0]
        return temporal * patch, (1 + temporal * (patch - 1)) % (temporal * patch)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip."""
        temporal, spatial = self.strides()
        return (
            self.transformer["in_channels"],
            (frames - 1) // temporal + 1,
            height // spatial,
            width // spatial,
        )

    def mismatch(self) -> str | None:
        """Reason why the parts of the folder do not belong together; None if they do."""
        encoded = self.vae.get(self.LATENT_CHANNELS)
        inputs = self.transformer.get("in_channels")
        outputs = self.transformer.get("out_channels") or inputs
        if inputs != outputs:
            return (
                f"its transformer takes latents of {inputs} channels and gives {outputs}: "
                "it is not a text-to-video model"
            )
        if encoded is not None and encoded != inputs:
            return (
                f"its autoencoder makes latents of {encoded} channels, its transformer takes "
                f"{inputs}: they belong to different models"
            )
        return self._mismatch_of_experts()

    def _mismatch_of_experts(self) -> str | None:
        boundary, low_noise = self.boundary, self.transformer_2
        if boundary is None and not low_noise:
            return None
        if not isinstance(boundary, int | float) or not 0 < boundary <= 1:
            return (
                f"it has a transformer_2, but boundary_ratio is {boundary!r} in its "
                "model_index.json, not a number in (0, 1]; download or copy the whole folder"
            )
        if not low_noise:
            return (
                f"boundary_ratio is {boundary} in its model_index.json, but it has no "
                "transformer_2 for lower noise; download or copy the whole folder"
            )
        for key in sorted(self.transformer.keys() | low_noise.keys()):
            if not key.startswith("_") and self.transformer.get(key) != low_noise.get(key):
                return (
                    f"{key} is {self.transformer.get(key)} in its transformer and "
                    f"{low_noise.get(key)} in its transformer_2: experts must be of one shape"
                )
        return None

    def unfit(self, frames: int, height: int, width: int) -> str | None:
        """Reason why clips of this size are impossible; None if they are possible."""
        name = f"the teacher {self.folder.name}"
        reason = self.mismatch()
        if reason is not None:
            return f"{name}: {reason}"
        (temporal, spatial), patch = self.strides(), self.patch()
        for key, size, multiple in (
            ("height", height, spatial * patch[1]),
            ("width", width, spatial * patch[2]),
        ):
            if size % multiple:
                return f"{key} {size} must be a multiple of {multiple} for {name}"
        n, rest = self.frames_rule()
        if frames % n != rest % n:
            allowed = f"{rest} more than a multiple of {n}" if rest else f"a multiple of {n}"
            return f"frames {frames} must be {allowed} for {name}"
        if frames <= temporal:
            least = next(f for f in range(temporal + 1, temporal + 1 + n) if f % n == rest % n)
            return (
                f"frames {frames} is too short for {name}: a clip needs two latents in time, "
                f"here at least {least} frames"
            )
        return None

    def unlike(self, student: "Architecture") -> str | None:
        """Reason why another pipeline cannot be this teacher's student; None if it can."""
        config, student_config = self.transformer, student.transformer
        for name, expected, actual in (
            ("transformer", config["_class_name"], student_config.get("_class_name")),
            (
                "number of latent channels",
                config.get("in_channels"),
                student_config.get("in_channels"),
            ),
            ("text width", config.get(self.TEXT_WIDTH), student_config.get(self.TEXT_WIDTH)),
            (
                "expand_timesteps",
                self.index.get("expand_timesteps", False),
                student.index.get("expand_timesteps", False),
            ),
        ):
            if expected != actual:
                teacher = f"the teacher {self.folder.name}"
                return f"its {name} is {actual}, but that of {teacher} is {expected}"
        return None

    # ---- texts and clips

    def text_length(self, tokenizer: Any) -> int:
        """Tokens per prompt's embedding."""
        return min(tokenizer.model_max_length, self.TEXT_LENGTH)

    def encode_text(self, pipeline: "DiffusionPipeline", prompts: list[str], length: int) -> Tensor:
        """Embeddings (B, L, D) of prompts by the pipeline's encoder; masked tokens are zero."""
        return pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=length
        )[0]

    def limit_memory(self, vae: nn.Module) -> None:
        """Make an autoencoder process one clip at a time, and large frames in tiles.

        The results for frames smaller than a tile stay the same to the bit.
        """
        vae.enable_slicing()
        vae.enable_tiling(**self.tiles())
        if self.FRAMEWISE:
            vae.use_framewise_decoding = True

    def tiles(self) -> dict[str, int]:
        """Arguments of the autoencoder's `enable_tiling`; {} for the defaults of diffusers."""
        return {}

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Video (B, 3, F, Y, X), roughly in [-1, 1], of latents (B, C, T, H, W)."""
        raise NotImplementedError

    def encode(self, vae: nn.Module, video: Tensor) -> Tensor:
        """Latents (B, C, T, H, W), variance about 1, of a video (B, 3, F, Y, X) in [-1, 1]."""
        raise NotImplementedError

    # ---- sampling and export

    def draw(self, shape: tuple[int, ...], step: int, draws: torch.Generator) -> Tensor:
        """Noise (C, T, H, W) for one step of one clip, drawn in diffusers' order."""
        return torch.randn(*shape, generator=draws)

    def student_scheduler(self, nfe: int, shift: float, stepping: str) -> "SchedulerMixin":
        """Scheduler that makes diffusers' pipeline take the steps of `distill_bench.rollout`."""
        from distill_bench.schedulers import flow_matching  # diffusers takes seconds

        return flow_matching(nfe, shift, stepping)


def architecture_names() -> list[str]:
    """Names of the architectures."""
    return sorted(module.name for module in pkgutil.iter_modules(architectures.__path__))


def architecture_of(folder: Path) -> Architecture:
    """The architecture of a pipeline folder.

    Raises:
        TeacherError: if no architecture reads its transformer.
    """
    transformer = read_config(folder / "transformer")
    name = transformer.get("_class_name", "")
    key = name.removesuffix(SUFFIX).lower()
    if not name.endswith(SUFFIX) or key not in architecture_names():
        raise TeacherError(
            f"{folder}: its transformer is a {name or 'network without config.json'}, which no "
            f"architecture reads; known: {', '.join(architecture_names())}; to add one, start from "
            "distill_bench/teachers/architectures/wan.py"
        )
    module = importlib.import_module(f"{architectures.__name__}.{key}")
    (architecture,) = (
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and issubclass(value, Architecture)
    )
    index = read_config(folder, "model_index.json")
    vae, transformer_2 = read_config(folder / "vae"), read_config(folder / "transformer_2")
    return architecture(folder, transformer, vae, index, transformer_2)


def architecture_called(net: nn.Module) -> Architecture:
    """Architecture of a network: that of its folder, or the base class if it has no folder."""
    return getattr(net, "architecture", None) or Architecture()


def block_count(folder: Path) -> int:
    """Number of transformer blocks of the pipeline in a folder, from its config."""
    return architecture_of(folder).transformer["num_layers"]
