"""A tiny stand-in for a teacher's pipeline: runs a method's own code in milliseconds.

Imports no diffusers, so that a sweep is planned without delay.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distill_bench.noise import Stepping
from distill_bench.teachers.embeddings import Texts

SHAPE = (4, 2, 2, 2)  # (C, T, H, W) of its latents
LAYER = "linear"  # name of the layer in each block, for adapters
PIXELS = 8  # per latent, along both sides


class Block(nn.Module):
    """One linear layer on tokens (B, N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SHAPE[0], SHAPE[0])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens)


class StandInNet(nn.Module):
    """Blocks called like diffusers' transformers: (x_t, timestep, text) -> (velocity,)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(
        self, x_t: Tensor, timestep: Tensor, text: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        tokens = x_t.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return (tokens.transpose(1, 2).reshape(x_t.shape),)


@dataclass(frozen=True)
class StandIn:
    """The parts of a loaded teacher (`distill_bench.teachers.kinds.Pipeline`) that `assemble` uses.

    Attributes:
        blocks: number of blocks of the teacher's network.
        student_blocks: number of blocks of the student and of the fake score.
    """

    blocks: int
    student_blocks: int
    device: torch.device = torch.device("cpu")
    transformer: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        net = StandInNet(self.blocks).requires_grad_(False)
        object.__setattr__(self, "transformer", net)

    def student(self) -> nn.Module:
        return StandInNet(self.student_blocks)

    fake_score = student

    def prompts(self) -> list[str]:
        return ["a prompt"]

    def texts(
        self, prompts: list[str], dtype: torch.dtype = torch.float32, negative_prompt: str = ""
    ) -> Texts:
        embeddings = {prompt: torch.zeros(1, 1) for prompt in [*prompts, ""]}
        return Texts(prompts, embeddings, self.device, dtype)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return SHAPE

    def decode_video(self, latents: Tensor) -> Tensor:
        video = latents[:, :3].repeat_interleave(PIXELS, -1)
        return video.repeat_interleave(PIXELS, -2)

    def flops(self, net: nn.Module, latent_shape: tuple[int, ...], text: Tensor) -> float:
        return 1.0

    def exact_fake_score(
        self,
        student: nn.Module,
        sigmas: Tensor,
        stepping: Stepping,
        exits: Sequence[int],
        data: object,
    ) -> "ExactScore":
        return ExactScore()


class ExactScore:
    """An exact fake score: it is differentiable and costs no pass."""

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return x_t / 2

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        return x_t.flatten(2).transpose(1, 2)
