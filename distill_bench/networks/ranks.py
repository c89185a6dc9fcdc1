"""This process among the ranks of a run."""

import os
from collections.abc import Callable
from typing import Any

import torch


def place_of_launch() -> tuple[int, int, torch.device]:
    """This process among those that torchrun or accelerate started for one task, how many they are, and its device."""
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device


def rank_and_world() -> tuple[int, int]:
    """Rank and number of ranks under torch.distributed, else 0 and 1."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def of_first_rank(make: Callable[[], Any]) -> Any:
    """What `make` gives, or raises, on the first rank, on every rank.

    What all must agree on is looked at by one: a file that another job writes between two looks would leave some ranks waiting,
    and so would an error of one rank alone.
    """
    rank, ranks = rank_and_world()
    if ranks == 1:
        return make()
    box: list[Any] = [None, None]
    if not rank:
        try:
            box[0] = make()
        except (ValueError, OSError) as error:
            box[1] = error
    torch.distributed.broadcast_object_list(box, 0)
    if box[1] is not None:
        raise box[1]
    return box[0]
