"""Counter-based randomness: every draw is keyed by (seed, student update, phase, purpose, global sample index).

So a run does not depend on the number of processes, on resuming, or on what another term drew, and two methods with
one seed see the same prompts and the same noise.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_bench.noise import warp


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by a hash of the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Draws:
    """The draws of one phase ("student", "fake_score/0", ...) of one student update for some global sample indices."""

    seed: int
    student_update: int
    phase: str
    indices: Sequence[int]
    device: torch.device
    dtype: torch.dtype = (
        torch.float32
    )  # drawn in float32 whatever it is: a wider run sees the same values

    def _each(self, purpose: str, draw) -> Tensor:
        key = (self.seed, self.student_update, self.phase, purpose)
        return torch.stack([draw(generator(*key, index)) for index in self.indices]).to(
            self.device, self.dtype
        )

    def noise(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Gaussian noise (B, *shape)."""
        return self._each(purpose, lambda g: torch.randn(*shape, generator=g))

    def sigma(self, purpose: str, shift: float, low: float, high: float) -> Tensor:
        """Noise levels (B,): uniform, warped by shift, clamped to [low, high]."""
        return warp(self.uniform(purpose), shift).clamp(low, high)

    def uniform(self, purpose: str) -> Tensor:
        """One number in [0, 1) a sample, (B,)."""
        return self._each(purpose, lambda g: torch.rand((), generator=g))

    def integers(self, purpose: str, high: int) -> list[int]:
        """One integer in [0, high) a sample."""
        key = (self.seed, self.student_update, self.phase, purpose)
        return [
            int(torch.randint(high, (), generator=generator(*key, index))) for index in self.indices
        ]

    def shared_integer(self, purpose: str, high: int) -> int:
        """One integer in [0, high), the same on every rank and in every micro-batch (keyed without the index)."""
        key = (self.seed, self.student_update, self.phase, purpose)
        return int(torch.randint(high, (), generator=generator(*key)))
