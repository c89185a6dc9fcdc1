"""Checkpoints: the bytes of safetensors' own writer, and a restored optimiser's next steps."""

import io

import pytest
import torch
from safetensors.torch import save

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


def test_the_two_newest_checkpoints_are_kept(tmp_path):
    """9 is older than 10, although its name sorts after."""
    for update in (8, 9, 10):
        checkpoint.save(tmp_path, update, {}, {"w": torch.tensor([float(update)])}, {}, {})
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["9", "10"]
    average = {"w": torch.zeros(1)}
    checkpoint.load(tmp_path, {}, average, {})
    assert average["w"] == 10
