"""Tensor files: written tensor by tensor, with the same bytes as safetensors' own writer."""

import io

import pytest
import torch
from safetensors.torch import save

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
