"""Rank, world size and device of this process, and the few exchanges between ranks that need no accelerator.

The launch and the process group are two different facts. Sampling shares clips through files and needs only the launch;
scoring exchanges features and needs a process group. After training, the group is gone while the launch still has its ranks.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the processes that share a task."""

    rank: int  # 0 <= rank < world
    world: int  # number of processes
    device: torch.device  # of this process

    @property
    def first(self) -> bool:
        """True on rank 0, which writes shared files and prints."""
        return self.rank == 0


def ranks() -> Ranks:
    """The processes of this launch, from RANK, WORLD_SIZE and LOCAL_RANK; rank 0 of 1 without them.

    torchrun, accelerate launch and the sweep's own workers (on this machine and under SLURM) set these variables. With more
    local ranks than visible GPUs the ranks share the GPUs in turn, as accelerate has it.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", _variable("LOCAL_RANK", 0) % torch.cuda.device_count())
    return Ranks(_variable("RANK", 0), _variable("WORLD_SIZE", 1), device)


def connect() -> Ranks:
    """Join the launch's processes in a process group, the one that accelerate's `Accelerator` will use; returns `ranks()`."""
    if ranks().world > 1:
        PartialState(cpu=not torch.cuda.is_available())
    return ranks()


def group_ranks() -> Ranks:
    """The processes that can exchange values now: those of the process group, or rank 0 of 1 where there is none."""
    device = ranks().device
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)
    return Ranks(0, 1, device)


def broadcast(value: T) -> T:
    """Rank 0's value (any picklable object) on every rank of the process group; the others' arguments are ignored."""
    if group_ranks().world == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, 0)
    return values[0]


def gather(value: T) -> list[T]:
    """The values (picklable objects) of all ranks of the process group, in the order of their ranks."""
    world = group_ranks().world
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    torch.distributed.all_gather_object(values, value)
    return values


def on_first_rank(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 of the process group; return its value, or raise its ValueError or OSError, on every rank.

    For decisions on which all ranks must agree: if each rank read the file itself, another job could write it between two
    reads, and the ranks that went on would wait for the others forever.
    """
    value, error = None, None
    if group_ranks().first:
        try:
            value = make()
        except (ValueError, OSError) as raised:
            error = raised
    value, error = broadcast((value, error))
    if error is not None:
        raise error
    return value


def _variable(name: str, default: int) -> int:
    return int(os.environ.get(name, default))
