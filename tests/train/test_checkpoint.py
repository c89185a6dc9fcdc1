"""Checkpoints: the bytes of safetensors' own writer, restored runs, damage, and kept students."""

import io
import json
import shutil
import zlib
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from distill_bench.config.schema import AdapterConfig
from distill_bench.networks.adapters import activate, add_adapter
from distill_bench.train import checkpoint
from distill_bench.train.checkpoint import write_tensors

# In each group no two dtypes have one size, because safetensors orders equal sizes by dtype.
GROUPS = [
    (torch.float64, torch.float32, torch.float16, torch.int8),
    (torch.int64, torch.bfloat16, torch.uint8),
    (torch.int32, torch.int16, torch.bool),
    (),
]


@pytest.mark.parametrize("dtypes", GROUPS)
def test_tensors_are_written_as_safetensors_writes_them(dtypes):
    torch.manual_seed(0)
    tensors = {}
    for dtype in dtypes:
        whole = (torch.randn(3, 5) * 9).to(dtype)
        tensors |= {
            f"b.{dtype}": whole,
            f"a.{dtype}": whole.T,
            f"scalar.{dtype}": whole[0, 0],
            f"empty.{dtype}": whole[:0],
        }
    file = io.BytesIO()
    write_tensors(file, tensors)
    assert file.getvalue() == save(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    )


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_restored_optimiser_steps_as_if_never_stopped(layout, tmp_path):
    """AdamW's fused kernel ignores strides: parameter and moments must have one memory layout."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.arange(12.0).reshape(3, 4)
            self.weight = torch.nn.Parameter(weight if layout == "rows" else weight.T)

    def optimised(net: Net) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters(), 0.1, betas=(0.5, 0.9), fused=True)

    def step(net: Net, optimiser: torch.optim.Optimizer, power: int) -> None:
        net.weight.grad = (net.weight.detach() - 3) ** power
        optimiser.step()

    net, resumed = Net(), Net()
    optimiser, restored = optimised(net), optimised(resumed)
    average, restored_average = ({"weight": torch.full((2,), value)} for value in (2.0, 0.0))
    step(net, optimiser, 3)
    checkpoint.save(tmp_path, 7, {"net": net}, average, {"net": optimiser}, {"seconds": 1.5})
    state = checkpoint.load(tmp_path, {"net": resumed}, restored_average, {"net": restored})
    assert state == {"seconds": 1.5}
    assert torch.equal(restored_average["weight"], average["weight"])
    for power in (1, 2):
        step(net, optimiser, power)
        step(resumed, restored, power)
        assert torch.equal(net.weight, resumed.weight)


@pytest.fixture
def mesh():
    """A process group of one rank, and its devices."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_weights_moments_and_averages_that_are_sharded_are_restored_as_shards(mesh, tmp_path):
    def sharded() -> tuple[nn.Module, dict, torch.optim.Optimizer]:
        net = nn.Linear(3, 4)
        weight = distribute_tensor(net.weight.detach(), mesh, [Shard(0)])
        net.weight = nn.Parameter(weight)
        average = {"weight": distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)])}
        return net, average, torch.optim.AdamW([net.weight], 0.1, fused=True)

    net, average, optimiser = sharded()
    net.weight.sum().backward()
    optimiser.step()
    checkpoint.save(tmp_path, 1, {"net": net}, average, {"net": optimiser}, {})
    restored, restored_average, restored_optimiser = sharded()
    checkpoint.load(tmp_path, {"net": restored}, restored_average, {"net": restored_optimiser})
    moments, loaded = optimiser.state[net.weight], restored_optimiser.state[restored.weight]
    pairs = [(net.weight, restored.weight), (average["weight"], restored_average["weight"])]
    pairs += [(moments[name], loaded[name]) for name in ("exp_avg", "exp_avg_sq")]
    for tensor, other in pairs:
        assert isinstance(other, DTensor)
        assert torch.equal(tensor.full_tensor(), other.full_tensor())
    assert loaded["step"] == 1


def test_the_two_newest_checkpoints_are_kept(tmp_path):
    """9 is older than 10, although its name sorts after."""
    for update in (8, 9, 10):
        checkpoint.save(tmp_path, update, {}, {"w": torch.tensor([float(update)])}, {}, {})
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["9", "10"]
    average = {"w": torch.zeros(1)}
    checkpoint.load(tmp_path, {}, average, {})
    assert average["w"] == 10


def test_a_checkpoint_restores_each_role_average_and_optimiser_to_its_own(tmp_path):
    """Names that begin alike, many parameters, and two groups; rates are those of today."""

    def parts(fill: float, lr: float):
        nets = {name: nn.Sequential(*(nn.Linear(1, 1) for _ in range(6))) for name in ("a", "a2")}
        for shift, net in enumerate(nets.values()):
            for i, p in enumerate(net.parameters()):
                p.data.fill_(fill + i + 100 * shift)
        average = {"w": torch.tensor([fill]), "v": torch.tensor([fill + 1])}
        optimisers = {}
        for name, net in nets.items():
            parameters = list(net.parameters())
            groups = [{"params": parameters[:5]}, {"params": parameters[5:]}]
            optimisers[name] = torch.optim.AdamW(groups, lr)
        return nets, average, optimisers

    nets, average, optimisers = parts(1.0, 0.1)
    for name, optimiser in optimisers.items():
        for i, p in enumerate(nets[name].parameters()):
            p.grad = torch.full_like(p, 1.0 + i + 50 * (name == "a2"))
        optimiser.step()
    assert checkpoint.load(tmp_path, nets, average, optimisers) is None
    checkpoint.save(tmp_path, 3, nets, average, optimisers, {"student_updates": 3})
    restored, restored_average, restored_optimisers = parts(0.0, 0.7)
    del restored_average["v"]  # a run without it, e.g. after a change of settings
    held = restored_average["w"]  # by the network that predicts with it
    state = checkpoint.load(tmp_path, restored, restored_average, restored_optimisers)
    assert state == {"student_updates": 3}
    assert restored_average["w"] is held and held == average["w"]
    assert len(restored_average) == 1
    for name, net in nets.items():
        pairs = zip(net.parameters(), restored[name].parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
        saved, loaded = (o[name].state_dict() for o in (optimisers, restored_optimisers))
        assert loaded["state"].keys() == saved["state"].keys() == set(range(12))
        for index, moments in saved["state"].items():
            assert moments.keys() == loaded["state"][index].keys()
            for moment, value in moments.items():
                assert torch.equal(value, loaded["state"][index][moment])
        assert [group["lr"] for group in loaded["param_groups"]] == [0.7, 0.7]


def saved_updates(folder, *updates: int) -> None:
    net = nn.Linear(2, 2)
    for update in updates:
        net.weight.data.fill_(update)
        optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        net.weight.grad = torch.full((2, 2), float(update))
        optimiser.step()
        checkpoint.save(folder, update, {"net": net}, {}, {"net": optimiser}, {"at": update})


@pytest.mark.parametrize("name", ["weights", "optimisers"])
@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing"])
def test_a_damaged_file_sets_its_checkpoint_aside(name, damage, tmp_path, capsys):
    saved_updates(tmp_path, 4, 5)
    path = tmp_path / "checkpoints" / "5" / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:50] if damage == "truncated" else data)
    assert checkpoint.load(tmp_path, {}, {}, {}) == {"at": 4}
    error = capsys.readouterr().err
    assert f"{path.parent} cannot be read" in error
    assert f"{path.name}" in error
    assert error.endswith("set aside as 5.corrupt\n")
    assert path.parent.with_name("5.corrupt").is_dir()
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["4"]


@pytest.mark.parametrize("state", [None, "{", '{"at": 5}'])
def test_a_damaged_state_sets_its_checkpoint_aside(state, tmp_path, capsys):
    """Also where an older folder stands in the way."""
    saved_updates(tmp_path, 4, 5)
    path = tmp_path / "checkpoints" / "5" / "state.json"
    aside = path.parent.with_name("5.corrupt") / "older"
    aside.mkdir(parents=True)
    path.unlink()
    if state is not None:
        path.write_text(state)
    assert checkpoint.load(tmp_path, {}, {}, {}) == {"at": 4}
    assert "set aside as 5.corrupt" in capsys.readouterr().err
    saved_updates(tmp_path, 5)
    assert checkpoint.load(tmp_path, {}, {}, {}) == {"at": 5}


def test_a_failed_save_leaves_the_checkpoints_before_it(tmp_path):
    saved_updates(tmp_path, 4)
    torn = tmp_path / "checkpoints" / ".writing-1"
    torn.mkdir()
    (torn / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 5, {}, {}, {}, {"at": {5}})  # a set is not JSON
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert checkpoint.load(tmp_path, {}, {}, {}) == {"at": 4}


def test_no_checkpoint_is_pruned_before_the_new_one_is_in_place(tmp_path, monkeypatch):
    saved_updates(tmp_path, 3, 4)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target.name == "5":
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="the disk is gone"):
        saved_updates(tmp_path, 5)
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["3", "4"]


def test_files_that_can_not_be_removed_neither_stop_a_save_nor_hide_its_error(
    tmp_path, monkeypatch
):
    """Files in place of an old checkpoint and of a torn one; then a folder that is lost."""
    root = tmp_path / "checkpoints"
    root.mkdir()
    for name in ("1", ".writing-1"):
        (root / name).touch()
    saved_updates(tmp_path, 4, 5)
    assert checkpoint.load(tmp_path, {}, {}, {}) == {"at": 5}

    def lose(path, _value):
        shutil.rmtree(path.parent)
        raise OSError("the disk is gone")

    monkeypatch.setattr(checkpoint, "write_json", lose)
    with pytest.raises(OSError, match="the disk is gone"):
        saved_updates(tmp_path, 6)


def test_a_rank_without_files_writes_none_but_takes_part_in_every_gather(tmp_path, monkeypatch):
    """A gather of shards is collective: all ranks make the same ones in one order."""
    net = nn.Linear(2, 2)
    optimiser = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    by_rank = []
    for writes in (False, True):
        gathered: list[int] = []
        monkeypatch.setattr(
            checkpoint, "whole", lambda t, seen=gathered: seen.append(t.data_ptr()) or t
        )
        checkpoint.save(tmp_path, 1, {"net": net}, {}, {"net": optimiser}, {}, writes)
        checkpoint.save_student(tmp_path, 1, net.state_dict(), writes)
        assert bool(list(tmp_path.iterdir())) == writes
        by_rank.append(gathered)
    assert by_rank[0] == by_rank[1]


def test_checksums_are_the_crc_32_of_whole_files(tmp_path):
    """Of a file beyond the 16 MiB that are read at once."""
    weights = {"w": torch.arange(5_000_000, dtype=torch.float32)}
    checkpoint.save(tmp_path, 1, {}, weights, {}, {})
    folder = tmp_path / "checkpoints" / "1"
    checksums = json.loads((folder / "state.json").read_text())["checksums"]
    assert checksums == {
        name: zlib.crc32((folder / name).read_bytes())
        for name in ("weights.safetensors", "optimisers.safetensors")
    }


def test_kept_students_are_listed_by_their_update(tmp_path):
    assert checkpoint.students(tmp_path) == {}
    (tmp_path / "students").mkdir()
    for update in (10, 9, 2):
        checkpoint.save_student(tmp_path, update, {"w": torch.tensor([float(update)])})
    (tmp_path / "students" / "notes.safetensors").touch()
    students = checkpoint.students(tmp_path)
    assert list(students) == [2, 9, 10]
    assert [load_file(path)["w"].item() for path in students.values()] == [2, 9, 10]


class Block(nn.Module):
    """A network with two linear layers and a buffer that students do not keep."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_v = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.to_v(self.to_q(x))


def test_a_kept_student_predicts_as_it_did(tmp_path):
    student, other, x = Block(), Block(), torch.randn(4, 3)
    checkpoint.save_student(tmp_path, 1, dict(student.named_parameters()))
    checkpoint.load_student(checkpoint.students(tmp_path)[1], other)
    torch.testing.assert_close(other(x), student(x))


@pytest.mark.parametrize("others", [(), ("fake_score",), ("student", "fake_score")])
def test_a_kept_adapter_becomes_the_active_one_of_a_network(others, tmp_path):
    base, x = Block(), torch.randn(4, 3)
    fresh, adapter = deepcopy(base), AdapterConfig(rank=2, targets=("to_q",))
    view = add_adapter(base, "student", adapter, seed=1)
    for p in view.parameters():
        p.data.normal_()
    checkpoint.save_student(tmp_path, 1, dict(view.named_parameters()))
    for role in others:
        add_adapter(fresh, role, adapter, seed=2)
        activate(fresh, [role])
    checkpoint.load_student(checkpoint.students(tmp_path)[1], fresh, adapter)
    activate(base, ["student"])
    torch.testing.assert_close(fresh(x), base(x))
    activate(base, [])
    assert not torch.allclose(fresh(x), base(x))
