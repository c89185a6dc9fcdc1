"""Parts that teachers in closed form share: one-hot texts, and networks on flattened latents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from distill_bench.domain.controls import Damage
from distill_bench.noise import Stepping
from distill_bench.store.files import read_text, text_lines
from distill_bench.teachers.embeddings import Texts
from distill_bench.teachers.kinds import RealLatents

PROMPTS_FILE = "prompts.txt"


class FlatNetwork(nn.Module):
    """A block with the call of diffusers' transformers: (x_t, timestep, text) -> (velocity,).

    The block takes (x_t (B, d), sigma (B,), text (B, E)) and returns velocities as tokens
    (B, 1, d).
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def forward(
        self, x_t: Tensor, timestep: Tensor, text: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        velocity = self.blocks[0](x_t.flatten(1), timestep.to(x_t.dtype) / 1000, text[:, 0])
        return (velocity[:, 0].reshape(x_t.shape),)


@dataclass(frozen=True)
class ClosedFormPipeline:
    """Base of loaded teachers in closed form (`distill_bench.teachers.kinds.Pipeline`).

    Subclasses define its other methods.
    """

    kind: ClassVar[str]  # for messages
    fps: ClassVar[float | None] = None

    folder: Path
    device: torch.device
    shape: tuple[int, int, int, int]  # (C, T, H, W)
    transformer: nn.Module

    def prompts(self) -> list[str]:
        """Training prompts; prompt i is component i of an embedding."""
        lines = text_lines(read_text(self.folder / PROMPTS_FILE))
        return [line for line in lines if line.strip()]

    def encode_text(self, prompts: list[str]) -> Tensor:
        """One-hot embeddings (B, 1, E) of prompts; the empty prompt is zero.

        Raises:
            ValueError: for a prompt that the teacher does not have.
        """
        known = self.prompts()
        unknown = [prompt for prompt in prompts if prompt and prompt not in known]
        if unknown:
            raise ValueError(
                f"the {self.kind} teacher has no prompt {unknown[0]!r}; it has: {', '.join(known)}"
            )
        rows = [[float(prompt == other) for other in known] for prompt in prompts]
        return torch.tensor(rows, device=self.device)[:, None]

    def texts(
        self, prompts: list[str], dtype: torch.dtype = torch.float32, negative_prompt: str = ""
    ) -> Texts:
        """Embeddings of prompts and of the null text; no other negative prompt is possible."""
        with_null = [*prompts, ""]
        embedded = dict(zip(with_null, self.encode_text(with_null), strict=True))
        return Texts(prompts, embedded, self.device, dtype)

    def draw(self, shape: tuple[int, ...], step: int, draws: torch.Generator) -> Tensor:
        """Noise (C, T, H, W) for one sampling step of one clip."""
        return torch.randn(*shape, generator=draws)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the data; the arguments have no effect."""
        return self.shape

    def clips(self, prompts: list[str], keys: Sequence[int]) -> np.ndarray:
        """Frames uint8 (B, F, 3, Y, X) of latents drawn from the data, one per prompt and key."""
        return self.decode(self.data(prompts, keys)).numpy()

    def controls(self, prompts: list[str]) -> Mapping[str, Damage]:
        """Empty: the controls of every domain, and no others."""
        return {}

    def flops(self, net: nn.Module, latent_shape: tuple[int, ...], text: Tensor) -> float:
        """1 for every role, as if all were networks of one size."""
        return 1.0

    def exact_fake_score(
        self,
        student: nn.Module,
        sigmas: Tensor,
        stepping: Stepping,
        exits: Sequence[int],
        data: RealLatents | None,
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """None: the student's density has no closed form."""
        return None


def enlarged(grey: Tensor, frames: int, pixels: int) -> Tensor:
    """Video (B, 3, F, Y, X) in which each value of `grey` (B, 1, T, H, W) fills several places.

    Args:
        frames: that show a value.
        pixels: along both sides of its square.
    """
    for axis, times in ((-1, pixels), (-2, pixels), (-3, frames)):
        grey = grey.repeat_interleave(times, axis)
    return grey.expand(-1, 3, -1, -1, -1)
