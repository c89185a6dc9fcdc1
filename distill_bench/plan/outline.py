"""A run's pipeline without weights, built from the configs in its folders."""

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from torch import Tensor, nn

from distill_bench.autoencoder import FrameAutoencoder
from distill_bench.config.schema import RunConfig
from distill_bench.networks.pipeline import DiffusersPipeline
from distill_bench.teachers.architecture import OWN_AUTOENCODER, Architecture, architecture_of
from distill_bench.teachers.contents import read_config
from distill_bench.teachers.diffusers_folder import EXPERTS
from distill_bench.teachers.embeddings import Texts
from distill_bench.teachers.experts import Experts
from distill_bench.teachers.folder import teacher_folder


@dataclass(frozen=True, kw_only=True)
class Outline(DiffusersPipeline):
    """A pipeline whose networks have the right shapes and no trained weights.

    Attributes:
        layers: blocks of the student; None: as in its config.
    """

    layers: int | None = None

    def student(self) -> nn.Module:
        return _transformer_outline(self.student_folder, self.layers)

    fake_score = student

    def encode_text(self, prompts: list[str]) -> Tensor:
        tokenizer = read_config(self.folder / "tokenizer", "tokenizer_config.json")
        longest = tokenizer.get("model_max_length", math.inf)
        length = self.architecture.text_length(SimpleNamespace(model_max_length=longest))
        width = self.architecture.transformer[self.architecture.TEXT_WIDTH]
        return torch.empty(len(prompts), int(length), width)

    def texts(
        self, prompts: list[str], dtype: torch.dtype = torch.float32, negative_prompt: str = ""
    ) -> Texts:
        (text,) = self.encode_text([""])
        return Texts(prompts, dict.fromkeys([*prompts, ""], text), self.device, dtype)

    def prompts(self) -> list[str]:
        if self.prompts_file is None and not (self.folder / "prompts.txt").is_file():
            return ["a prompt"]
        return super().prompts()


def outline(config: RunConfig, layers: tuple[int | None, int | None] = (None, None)) -> Outline:
    """The outline of a run's pipeline; under `fake_tensors` it takes no memory.

    Args:
        config: a resolved run.
        layers: blocks of the teacher and of the student; None: as in their configs.
    """
    teacher_layers, student_layers = layers
    folder = teacher_folder(config.teacher)
    architecture = architecture_of(folder)
    return Outline(
        folder,
        architecture,
        torch.device("cpu"),
        transformer=networks_outline(folder, teacher_layers).requires_grad_(False),
        vae=_autoencoder_outline(architecture),
        student_folder=folder if config.student is None else teacher_folder(config.student),
        prompts_file=None if config.prompts is None else Path(config.prompts),
        layers=student_layers,
    )


def networks_outline(folder: Path, layers: int | None = None) -> nn.Module:
    """Build the transformer of a folder, or its two experts, as `_transformer_outline` does."""
    boundary = architecture_of(folder).boundary
    if boundary is None:
        return _transformer_outline(folder, layers)
    return _EitherExpert(*(_transformer_outline(folder, layers) for _ in EXPERTS), boundary)


class _EitherExpert(Experts):
    """Experts for noise levels without values: the first half of a batch is taken for high noise.

    All samples of one expert would take less memory: its offloaded blocks alone are copied.
    """

    def rows(self, sigma: Tensor) -> tuple[list[int], list[int]]:
        samples = list(range(len(sigma)))
        half = -(-len(samples) // 2)
        return samples[:half], samples[half:]


def _transformer_outline(folder: Path, layers: int | None = None) -> nn.Module:
    """Build the transformer of a folder, untrained, with `layers` blocks (None: as configured)."""
    architecture = architecture_of(folder)
    config = dict(architecture.transformer)
    if layers is not None:
        config["num_layers"] = layers
    net = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    net.architecture = architecture
    return net


def _autoencoder_outline(architecture: Architecture) -> nn.Module | None:
    if not architecture.vae:
        return None
    name = architecture.vae["_class_name"]
    if name == OWN_AUTOENCODER:
        vae = FrameAutoencoder.from_config(architecture.vae)
    else:
        vae = getattr(diffusers, name).from_config(architecture.vae)
        architecture.limit_memory(vae)
    return vae.eval().requires_grad_(False)
