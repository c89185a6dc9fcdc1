"""Rank, world size and device of a launch."""

import pytest
import torch

from distill_bench.networks.ranks import Ranks, broadcast, gather, group_ranks, on_first_rank, ranks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def launch_without_variables(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_single_process_is_rank_0_of_1():
    assert ranks() == group_ranks() == Ranks(0, 1, CPU)
    assert ranks().first


def test_a_launch_of_several_processes_is_read_from_its_variables(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert ranks() == Ranks(5, 8, CPU)
    assert not ranks().first


@pytest.mark.parametrize(("visible_gpus", "index"), [(8, 3), (2, 1), (1, 0)])
def test_local_ranks_wrap_around_the_visible_gpus(visible_gpus, index, monkeypatch):
    """SLURM may show each rank only its own GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible_gpus)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert ranks().device == torch.device("cuda", index)


def test_without_a_process_group_a_rank_keeps_its_own_values(monkeypatch):
    """Training ends its process group; the rank that goes on samples alone."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert group_ranks() == Ranks(0, 1, CPU)
    assert broadcast("a") == "a"
    assert gather("a") == ["a"]
    assert on_first_rank(lambda: "a") == "a"
