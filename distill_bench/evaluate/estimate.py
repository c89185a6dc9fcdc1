"""Estimate the time and memory of scoring: run one batch per network, and extrapolate to all clips.

Inside `estimating`, passes of networks over clips run their first batch only, and repeat its rows.
"""

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NetworkPass:
    """Cost of one network over clips."""

    name: str
    seconds: float  # per clip
    peak: int  # bytes: of a GPU's tensors, or of the process on a processor
    device: str


class PassEstimate:
    """Passes of networks over clips, each known by its first batch."""

    def __init__(self) -> None:
        self._passes: dict[Hashable, tuple[NetworkPass, Tensor]] = {}
        self._left_out = 0.0  # seconds of parts of the batch that runs now

    @property
    def passes(self) -> list[NetworkPass]:
        """Every network with every shape of clips, once: features of references are cached."""
        return [known for known, _ in self._passes.values()]

    def rows(
        self,
        name: str,
        shape: Hashable,
        count: int,
        size: int,
        first: Callable[[], Tensor],
        device: torch.device,
        peak: Callable[[], int],
    ) -> Tensor:
        """Rows (count, ...) made of those of the first batch.

        Args:
            name: of the network.
            shape: of its clips; another one is another pass.
            count: number of clips.
            size: clips per batch.
            first: runs the first batch.
            device: of the network.
            peak: peak memory, in bytes.
        """
        if (name, shape) not in self._passes:
            if device.type != "cpu":
                first()  # loads kernels
            began, self._left_out = time.perf_counter(), 0.0
            rows = first()
            seconds = time.perf_counter() - began + self._left_out
            cost = NetworkPass(name, seconds / min(size, count), peak(), str(device))
            self._passes[name, shape] = cost, rows.float()
        _, rows = self._passes[name, shape]
        repeated = rows[torch.arange(count) % len(rows)]
        # constant features of different clips would be an error
        return repeated + 1e-3 * torch.randn(
            repeated.shape, generator=torch.Generator().manual_seed(0)
        )

    def leave_out(self, seconds: float) -> None:
        """Add the seconds of parts of a batch that are not run because they are like others."""
        self._left_out += seconds


_estimate: ContextVar[PassEstimate | None] = ContextVar("estimate", default=None)


@contextmanager
def estimating() -> Iterator[PassEstimate]:
    """Estimate the passes of networks in this context instead of running them."""
    estimate = PassEstimate()
    token = _estimate.set(estimate)
    try:
        yield estimate
    finally:
        _estimate.reset(token)


def current_estimate() -> PassEstimate | None:
    """The estimate of this context; None outside `estimating`."""
    return _estimate.get()
