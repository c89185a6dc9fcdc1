"""Architectures of video diffusion, one file each: what a network is called with, and what its latents and texts are.

The file name is the registry: a pipeline whose transformer/config.json names an
`XyTransformer3DModel` is read by xy.py here, which holds one `Architecture`. wan.py is the one to
imitate. diffusers is imported where it is used: it takes seconds.
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

from distill_bench.teachers.contents import read_config
from distill_bench.teachers.folder import TeacherError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

SUFFIX = "Transformer3DModel"
OWN_AUTOENCODER = (
    "FrameAutoencoder"  # `distill_bench.autoencoder`: it may stand in for any architecture's
)

Call = Callable[..., Tensor]  # the network: its own arguments, without return_dict -> its output


@dataclass(frozen=True)
class Architecture:
    """How the pipeline of one folder is used, by its configs. This one is the plain call, (x_t, 1000 sigma, text) -> velocity."""

    PIPELINE: ClassVar[str] = ""  # names of classes in diffusers and transformers
    AUTOENCODER: ClassVar[str] = ""
    TEXT_ENCODER: ClassVar[str] = ""
    TEXT_LENGTH: ClassVar[int] = 0  # tokens of a prompt, where the tokenizer does not say fewer
    TEXT_WIDTH: ClassVar[str] = ""  # key of the transformer's config
    LATENT_CHANNELS: ClassVar[str] = "latent_channels"  # key of the autoencoder's
    FRAMEWISE: ClassVar[bool] = (
        False  # the autoencoder decodes few frames at a time, but only where it is told to
    )

    folder: Path | None = None
    transformer: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)  # model_index.json

    # ---- the network

    def velocity(
        self, net: nn.Module, call: Call, x_t: Tensor, sigma: Tensor, text: Tensor
    ) -> Tensor:
        """The velocity (B, C, T, H, W) at x_t (B, C, T, H, W), sigma (B,) in (0, 1], text (B, L, D).

        `call` runs the network, whatever weights it is to run with; `net` is asked for its config
        alone.
        """
        return call(x_t, 1000 * sigma, text)

    def blocks(self, net: nn.Module) -> nn.ModuleList:
        """The blocks that the network runs one after the other."""
        return net.blocks

    def tokens(self, output: Any) -> Tensor:
        """The video's tokens (B, N, width) in the output of a block."""
        return output

    # ---- shapes

    @property
    def fps(self) -> float | None:
        """Frames a second that the model was trained at; None where the autoencoder is not its own."""
        return self.own_fps if self.vae.get("_class_name") == self.AUTOENCODER else None

    @property
    def own_fps(self) -> float:
        """Frames a second of the architecture itself."""
        raise NotImplementedError

    def own_strides(self) -> tuple[int, int]:
        """Frames and pixels that a latent stands for: temporal, spatial."""
        raise NotImplementedError

    def strides(self) -> tuple[int, int]:
        """Likewise, of the autoencoder that is there: without one latents are pixels."""
        if not self.vae:
            return 1, 1
        return (1, 4) if self.vae["_class_name"] == OWN_AUTOENCODER else self.own_strides()

    def patch(self) -> tuple[int, int, int]:
        """Latents of a token: temporal, vertical, horizontal."""
        raise NotImplementedError

    def frames_rule(self) -> tuple[int, int]:
        """(n, rest): a clip has `rest` frames more than a multiple of n."""
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
        """Why the parts of the folder do not belong together, or None."""
        made, taken = self.vae.get(self.LATENT_CHANNELS), self.transformer.get("in_channels")
        given = self.transformer.get("out_channels") or taken
        if taken != given:
            return (
                f"its transformer takes latents of {taken} channels and gives {given}: it is "
                "no text-to-video model"
            )
        if made is not None and made != taken:
            return (
                f"its autoencoder makes latents of {made} channels, its transformer takes "
                f"{taken}: they are of two models"
            )
        return None

    def unfit(self, frames: int, height: int, width: int) -> str | None:
        """Why clips of this size cannot be made, or None."""
        name = f"the teacher {self.folder.name}"
        wrong = self.mismatch()
        if wrong is not None:
            return f"{name}: {wrong}"
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
                f"frames {frames} is too short for {name}: a clip has two latents in time at "
                f"least, here {least} frames"
            )
        return None

    def unlike(self, student: "Architecture") -> str | None:
        """Why the pipeline of another folder cannot be this teacher's student, or None."""
        for what, mine, its in (
            (
                "a transformer",
                self.transformer["_class_name"],
                student.transformer.get("_class_name"),
            ),
            (
                "latents of channels",
                self.transformer.get("in_channels"),
                student.transformer.get("in_channels"),
            ),
            (
                "texts of width",
                self.transformer.get(self.TEXT_WIDTH),
                student.transformer.get(self.TEXT_WIDTH),
            ),
            (
                "one timestep a token",
                self.index.get("expand_timesteps", False),
                student.index.get("expand_timesteps", False),
            ),
        ):
            if mine != its:
                return f"{what}: {its}, the teacher {self.folder.name} has {mine}"
        return None

    # ---- texts and clips

    def text_length(self, tokenizer: Any) -> int:
        """Tokens of every prompt's embedding."""
        return min(tokenizer.model_max_length, self.TEXT_LENGTH)

    def encode_text(self, pipeline: "DiffusionPipeline", prompts: list[str], length: int) -> Tensor:
        """Embeddings (B, L, D) of prompts by the pipeline's own text encoder; what it masks is zero."""
        return pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=length
        )[0]

    def at_size(self, vae: nn.Module) -> None:
        """Have an autoencoder take one clip at a time, and large frames in tiles: below their size no value changes."""
        vae.enable_slicing()
        vae.enable_tiling(**self.tiles())
        if self.FRAMEWISE:
            vae.use_framewise_decoding = True

    def tiles(self) -> dict[str, int]:
        """Sizes for the autoencoder's `enable_tiling`; where there are none it has its own."""
        return {}

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Video (B, 3, F, Y, X), about [-1, 1], of latents (B, C, T, H, W)."""
        raise NotImplementedError

    def encode(self, vae: nn.Module, video: Tensor) -> Tensor:
        """Latents (B, C, T, H, W), about of unit variance, of a video (B, 3, F, Y, X) in [-1, 1]."""
        raise NotImplementedError

    # ---- out

    def draw(self, shape: tuple[int, ...], step: int, draws: torch.Generator) -> Tensor:
        """Noise (C, T, H, W) for a step of one clip, in the order in which diffusers' pipeline and its scheduler draw it."""
        return torch.randn(*shape, generator=draws)

    def student_scheduler(self, nfe: int, shift: float, stepping: str) -> "SchedulerMixin":
        """A scheduler with which diffusers' pipeline samples the student as `distill_bench.rollout` does."""
        from distill_bench.schedulers import flow_matching

        return flow_matching(nfe, shift, stepping)


def known() -> list[str]:
    """Names of the files here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def architecture_of(folder: Path) -> Architecture:
    """The architecture of a pipeline folder.

    Raises:
        TeacherError: if nobody knows it.
    """
    transformer = read_config(folder / "transformer")
    name = transformer.get("_class_name", "")
    key = name.removesuffix(SUFFIX).lower()
    if not name.endswith(SUFFIX) or key not in known():
        raise TeacherError(
            f"{folder}: its transformer is a {name or 'network without config.json'}, which no "
            "architecture reads; known: "
            f"{', '.join(known())}; to add one, imitate distill_bench/architectures/wan.py"
        )
    module = importlib.import_module(f"{__name__}.{key}")
    classes = [
        c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__
    ]
    (found,) = (c for c in classes if issubclass(c, Architecture))
    return found(
        folder, transformer, read_config(folder / "vae"), read_config(folder, "model_index.json")
    )


def architecture_called(net: nn.Module) -> Architecture:
    """The architecture that knows how a network is called: that of its folder, else the plain call."""
    return getattr(net, "architecture", None) or Architecture()
