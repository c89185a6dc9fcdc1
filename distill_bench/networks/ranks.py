"""Rank, world size, device and threads of this process, and exchanges of objects between ranks.

`ranks()` describes the processes of the launch, `group_ranks()` the process group, which can
exchange values. The two differ: sampling shares clips through files and needs no process group, and
training ends its group before rank 0 scores the clips alone.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState

from distill_bench.store.machine import usable_cores

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process among those that share a task."""

    rank: int  # 0 <= rank < world
    world: int  # number of processes
    device: torch.device  # of this process

    @property
    def first(self) -> bool:
        """True on rank 0, which writes shared files and prints."""
        return self.rank == 0


def ranks() -> Ranks:
    """The processes of this launch, from RANK, WORLD_SIZE and LOCAL_RANK; rank 0 of 1 without them.

    torchrun, accelerate launch and the workers of a sweep (on this machine and under SLURM) set
    these variables. If a process sees fewer GPUs than there are local ranks, the index wraps around
    as in accelerate: SLURM may show each rank one GPU, its own.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", _variable("LOCAL_RANK", 0) % torch.cuda.device_count())
    return Ranks(_variable("RANK", 0), _variable("WORLD_SIZE", 1), device)


def connect() -> Ranks:
    """Join the launch's processes in the process group that accelerate uses; returns `ranks()`."""
    if ranks().world > 1:
        PartialState(cpu=not torch.cuda.is_available())
    return ranks()


def group_ranks() -> Ranks:
    """The processes of the process group; rank 0 of 1 if there is no group."""
    device = ranks().device
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)
    return Ranks(0, 1, device)


def broadcast(value: T) -> T:
    """Rank 0's `value`, on every rank of the process group; any picklable object."""
    if group_ranks().world == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, 0)
    return values[0]


def gather(value: T) -> list[T]:
    """The values of all ranks of the process group, in order of rank; any picklable objects."""
    world = group_ranks().world
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    torch.distributed.all_gather_object(values, value)
    return values


def on_first_rank(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 of the process group; return its value on every rank.

    Use it for decisions on which all ranks must agree. If each rank read a file itself, another job
    could write the file between two reads, and the ranks would diverge and deadlock.

    Raises:
        ValueError, OSError: on every rank, if `make` raised it on rank 0.
    """
    outcome: T | Exception | None = None
    if group_ranks().first:
        try:
            outcome = make()
        except (ValueError, OSError) as error:
            outcome = error
    outcome = broadcast(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return cast(T, outcome)


def set_threads(threads: int | None) -> None:
    """Set the number of torch's threads.

    Args:
        threads: None: torch's default, but at most the cores that this process may use, unless
            OMP_NUM_THREADS states a number. torch does not know a container's quota.
    """
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = min(torch.get_num_threads(), usable_cores())
    if threads is not None:
        torch.set_num_threads(threads)


def _variable(name: str, default: int) -> int:
    return int(os.environ.get(name, default))
