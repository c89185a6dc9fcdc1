"""Counter-based randomness: each draw is keyed by (seed, student update, phase, purpose, sample).

A run therefore does not depend on the number of ranks, on resuming, or on other draws, and two
methods with the same seed see the same prompts and noise.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill_bench.noise import warp


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by a hash of the key; equal keys give equal draws."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def seeds(key: tuple[object, ...], indices: Iterable[int]) -> list[int]:
    """Seed of `generator(*key, index)` for each index.

    Small networks train no faster than noise is drawn, so the key's common part is hashed once.

    Args:
        key: at least two parts.
        indices: last part of each key.
    """
    start = hashlib.blake2b(repr(key).removesuffix(")").encode(), digest_size=8)
    digests = []
    for index in indices:
        digest = start.copy()
        digest.update(b", %d)" % index)
        digests.append(digest.digest())
    found: list[int] = (np.frombuffer(b"".join(digests), "<u8") >> 1).tolist()
    return found


@dataclass(frozen=True)
class Draws:
    """The draws of one phase of one student update for some samples of the global batch.

    Values are drawn in float32 and converted to `dtype`, so that float64 runs see the same draws.
    """

    seed: int
    student_update: int
    phase: str  # "student", "fake_score/0", "fake_score/1", ...
    indices: Sequence[int]  # of the samples in the global batch, (B,)
    device: torch.device
    dtype: torch.dtype = torch.float32

    def noise(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Gaussian noise (B, *shape)."""
        noise = self._per_sample(purpose, shape, Tensor.normal_)
        return noise.to(self.device, self.dtype)

    def sigma(
        self, purpose: str, shift: float, low: float, high: float, shared: bool = False
    ) -> Tensor:
        """Noise levels (B,): uniform in [0, 1), warped by the shift, clamped to [low, high].

        Args:
            shared: the same level for every sample, on every rank and in every micro-batch.
        """
        uniform = self.shared_uniform(purpose) if shared else self.uniform(purpose)
        return warp(uniform, shift).clamp(low, high)

    def uniform(self, purpose: str) -> Tensor:
        """One number in [0, 1) per sample, (B,)."""
        draws = self._per_sample(purpose, (), Tensor.uniform_)
        return draws.to(self.device, self.dtype)

    def shared_uniform(self, purpose: str) -> Tensor:
        """One number in [0, 1) for all samples, (B,), equal on every rank and micro-batch."""
        draw = torch.rand((), generator=generator(*self._key(purpose)))
        return draw.to(self.device, self.dtype).expand(len(self.indices))

    def integers(self, purpose: str, high: int) -> list[int]:
        """One integer in [0, high) per sample, B of them."""
        draws = self._per_sample(
            purpose, (), lambda row, generator: row.random_(high, generator=generator), torch.int64
        )
        return draws.tolist()

    def shared_integer(self, purpose: str, high: int) -> int:
        """One integer in [0, high), the same on every rank and in every micro-batch."""
        return int(torch.randint(high, (), generator=generator(*self._key(purpose))))

    def _key(self, purpose: str) -> tuple[object, ...]:
        return (self.seed, self.student_update, self.phase, purpose)

    def _per_sample(
        self,
        purpose: str,
        shape: Sequence[int],
        draw: Callable[..., Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        values = torch.empty(len(self.indices), *shape, dtype=dtype)
        one = torch.Generator()
        for row, seed in zip(values.unbind(), seeds(self._key(purpose), self.indices), strict=True):
            draw(row, generator=one.manual_seed(seed))
        return values
