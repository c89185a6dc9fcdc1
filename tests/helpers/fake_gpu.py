"""A GPU that holds shapes and no values: finds tensors that are left on the processor."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distill_bench.evaluate.device import running_on

NAME = "a fake GPU"


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Run evaluators on a GPU of fake tensors; an operation on two devices raises as on a real one.

    Networks lose their values: use copies of them.
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch("torch.cuda.reset_peak_memory_stats"),
        mock.patch("torch.cuda.get_device_name", return_value=NAME),
        running_on(torch.device("cuda:0")),
    ):
        yield


def _apply(net: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` for fake tensors: parameters and buffers move, other tensors stay."""
    for module in net.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = function(tensor)
    return net
