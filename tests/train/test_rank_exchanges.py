"""Processes that train one run: what two ranks exchange, and what one process leaves out."""

import multiprocessing
import socket
import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from distill_bench.networks.ranks import Ranks, connect
from distill_bench.train.processes import ManyProcesses, OneProcess, launched

NAN = float("nan")


def exchanges(processes: OneProcess | ManyProcesses, folder: Path) -> dict[str, object]:
    """Everything that rank 0 or 1 of two exchanges; rank 1 reaches the wait late."""
    rank = processes.rank
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    for parameter, value in zip(parameters, (1.0, 10.0), strict=True):
        parameter.grad = torch.tensor([value, value * (1 + 2 * rank)])
    processes.average_gradients(parameters)
    scalars = {"a": torch.tensor(1.0 + rank), "b": torch.tensor(4 - 2 * rank)}
    values = {"equal": 0.1, "other": 1 + 1e-15 * rank, "nan": NAN, "one nan": NAN if rank else 1.0}
    time.sleep(0.3 * rank)
    (folder / str(rank)).touch()
    processes.wait()
    return {
        "arrived": sorted(path.name for path in folder.iterdir()),
        "kind": type(processes).__name__,
        "place": (processes.rank, processes.world, str(processes.device)),
        "mean": processes.mean(torch.tensor([0.0, 4.0 * rank])).tolist(),
        "means": {name: float(value) for name, value in processes.means(scalars).items()},
        "gradients": [parameter.grad.tolist() for parameter in parameters],
        "any": [processes.any(flag) for flag in (False, rank == 1, True)],
        "unequal": processes.unequal(values | {"rank": float(rank)}),
    }


def _rank(rank: int, port: int, folder: Path, results: multiprocessing.Queue) -> None:
    monkeypatch = pytest.MonkeyPatch()
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    AcceleratorState._reset_state()
    PartialState._reset_state()
    try:
        results.put((rank, exchanges(launched(), folder)))
    except Exception as error:  # the parent reports it
        results.put((rank, {"error": repr(error)}))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[int, dict[str, object]]:
    """The exchanges of two forked ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        context.Process(target=_rank, args=(rank, port, folder, results), daemon=True)
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    try:
        return dict(results.get(timeout=20) for _ in ranks)
    finally:
        for process in ranks:  # one that failed leaves the other waiting
            process.kill()
            process.join()


def test_two_ranks_exchange_means_flags_and_differences(two_ranks, tmp_path):
    for rank in (0, 1):
        assert two_ranks[rank] == {
            "kind": "ManyProcesses",
            "arrived": ["0", "1"],
            "place": (rank, 2, "cpu"),
            "mean": [0.0, 2.0],
            "means": {"a": 1.5, "b": 3.0},
            "gradients": [[1.0, 2.0], [10.0, 20.0]],
            "any": [False, True, True],
            "unequal": ["other", "one nan", "rank"],
        }
    assert exchanges(ManyProcesses(connect()), tmp_path) == {
        "kind": "ManyProcesses",
        "arrived": ["0"],
        "place": (0, 1, "cpu"),
        "mean": [0.0, 0.0],
        "means": {"a": 1.0, "b": 4.0},
        "gradients": [[1.0, 1.0], [10.0, 10.0]],
        "any": [False, False, True],
        "unequal": [],
    }, "one rank is its own mean"


def test_one_process_is_its_own_mean(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    processes = launched()
    assert type(processes) is OneProcess
    assert (processes.rank, processes.world, processes.device) == (0, 1, torch.device("cpu"))
    x = torch.tensor([1.0, 3.0])
    assert processes.mean(x) is x
    assert processes.means({"a": x[0]}) == {"a": 1.0}
    assert processes.any(True) is True
    assert processes.any(False) is False
    assert processes.unequal({"a": NAN}) == []
    assert OneProcess(torch.device("meta"), 4).device.type == "meta"


def test_several_ranks_of_a_launch_are_many_processes(monkeypatch):
    ranks = Ranks(1, 4, torch.device("meta"))
    monkeypatch.setattr("distill_bench.train.processes.connect", lambda: ranks)
    processes = launched()
    assert isinstance(processes, ManyProcesses)
    assert (processes.rank, processes.world, processes.device) == (1, 4, ranks.device)


def test_values_are_exchanged_on_the_device_of_the_rank(monkeypatch):
    """A group of GPUs exchanges no tensors of the host."""
    devices = []
    for name in ("reduce", "gather"):
        monkeypatch.setattr(
            f"distill_bench.train.processes.{name}",
            lambda tensor, *_: devices.append(tensor.device.type) or torch.ones(1),
        )
    processes = ManyProcesses(Ranks(0, 2, torch.device("meta")))
    processes.any(True)
    processes.unequal({"a": 1.0})
    assert devices == ["meta", "meta"]


class Doubling(ManyProcesses):
    """A rank whose other ranks would double every mean."""

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


def test_gradients_of_shards_are_left_to_fsdp():
    """It has averaged them in the backward."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain = torch.ones(2)
        sharded = distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)), [Shard(0)])
        plain.grad, sharded.grad = plain.clone(), sharded.clone()
        Doubling(connect()).average_gradients([plain, sharded])
        assert plain.grad.tolist() == [2.0, 2.0]
        assert sharded.grad.full_tensor().tolist() == [1.0, 1.0]
    finally:
        dist.destroy_process_group()
