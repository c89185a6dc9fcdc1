"""TODO: plan.outline."""

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
from distill_bench.teachers.architecture import OWN_AUTOENCODER, architecture_of
from distill_bench.teachers.contents import read_config
from distill_bench.teachers.embeddings import Texts
from distill_bench.teachers.folder import teacher_folder


@dataclass(frozen=True, kw_only=True)
class Outline(DiffusersPipeline):
    """A pipeline without weights, from the configs in its folder."""

    layers: int | None = None  # of the student; None: as many as it has

    def student(self) -> nn.Module:
        return outline_transformer(self.student_folder, self.layers)

    fake_score = student

    def encode_text(self, prompts: list[str]) -> Tensor:
        config = read_config(self.folder / "tokenizer", "tokenizer_config.json")
        length = self.architecture.text_length(
            SimpleNamespace(model_max_length=config.get("model_max_length", math.inf))
        )
        return torch.empty(
            len(prompts), int(length), self.architecture.transformer[self.architecture.TEXT_WIDTH]
        )

    def texts(self, prompts: list[str], dtype: torch.dtype = torch.float32) -> Texts:
        (any_of_them,) = self.encode_text([""])
        return Texts(prompts, dict.fromkeys([*prompts, ""], any_of_them), self.device, dtype)

    def prompts(self) -> list[str]:
        return (
            super().prompts()
            if self.prompts_file or (self.folder / "prompts.txt").is_file()
            else ["one"]
        )


def outline(config: RunConfig, layers: tuple[int | None, int | None] = (None, None)) -> Outline:
    """The networks of a run's pipelines by their configs; under FakeTensorMode without data.

    Args:
        layers: blocks of the teacher and of the student; None: as many as they have.
    """
    folder = teacher_folder(config.teacher)
    architecture, vae = architecture_of(folder), None
    if architecture.vae:
        name = architecture.vae["_class_name"]
        kind = FrameAutoencoder if name == OWN_AUTOENCODER else getattr(diffusers, name)
        vae = kind.from_config(architecture.vae).eval().requires_grad_(False)
        if name != OWN_AUTOENCODER:
            architecture.at_size(vae)
    return Outline(
        folder,
        architecture,
        torch.device("cpu"),
        transformer=outline_transformer(folder, layers[0]).requires_grad_(False),
        vae=vae,
        student_folder=folder if config.student is None else teacher_folder(config.student),
        prompts_file=None if config.prompts is None else Path(config.prompts),
        layers=layers[1],
    )


def outline_transformer(folder: Path, layers: int | None = None) -> nn.Module:
    architecture = architecture_of(folder)
    config = dict(architecture.transformer) | ({} if layers is None else {"num_layers": layers})
    net = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    net.architecture = architecture
    return net
