"""The processes that train one run, with one interface for a single process and for several.

Gradients are averaged over the ranks once, at the end of a phase, and no network is wrapped:
data-parallel wrappers are silently wrong for two forwards before one backward, and accelerate's
accumulation counter is shared by all optimisers.
"""

from collections.abc import Iterable, Mapping

import torch
from accelerate.utils import gather, reduce, wait_for_everyone
from torch import Tensor

from distill_bench.networks.ranks import Ranks, connect
from distill_bench.networks.sharding import is_sharded


class OneProcess:
    """A run in one process, without communication.

    Args:
        device: the device that trains.
        world: number of ranks that share a batch; above 1 only in rehearsals of rank 0, where the
            other ranks do not exist.
    """

    rank = 0

    def __init__(self, device: torch.device, world: int = 1) -> None:
        self.device = device
        self.world = world

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over the ranks."""
        return tensor

    def means(self, scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean of each scalar over the ranks: its value for the whole batch."""
        return dict(scalars)

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace gradients by their means over the ranks."""

    def any(self, flag: bool) -> bool:
        """True if `flag` is true on any rank."""
        return flag

    def unequal(self, values: Mapping[str, float]) -> list[str]:
        """Names of the values that differ between ranks; NaN on every rank counts as equal."""
        return []

    def wait(self) -> None:
        """Wait until every rank has called this method."""


class ManyProcesses:
    """The ranks of one launch. The methods are those of `OneProcess`; each is a collective."""

    def __init__(self, ranks: Ranks) -> None:
        self.rank = ranks.rank
        self.world = ranks.world
        self.device = ranks.device

    def mean(self, tensor: Tensor) -> Tensor:
        return reduce(tensor, "mean")

    def means(self, scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = torch.stack([value.double() for value in scalars.values()])
        return dict(zip(scalars, self.mean(values), strict=True))

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            if not is_sharded(parameter):  # FSDP has averaged gradients of shards
                parameter.grad = self.mean(parameter.grad)

    def any(self, flag: bool) -> bool:
        return bool(reduce(torch.tensor(float(flag), device=self.device), "sum"))

    def unequal(self, values: Mapping[str, float]) -> list[str]:
        own = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        by_rank = gather(own).reshape(-1, len(own))
        # a collapsed run may hold NaN, on every rank
        equal = (by_rank == by_rank[0]).all(0) | by_rank.isnan().all(0)
        return [name for name, same in zip(values, equal.tolist(), strict=True) if not same]

    def wait(self) -> None:
        wait_for_everyone()


Processes = OneProcess | ManyProcesses


def launched() -> Processes:
    """The processes of this launch, connected."""
    ranks = connect()
    return OneProcess(ranks.device) if ranks.world == 1 else ManyProcesses(ranks)
