"""TODO: networks.offload."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distill_bench.teachers.architectures import architecture_called


class Streamed(nn.Module):
    """A block whose weights lie in host memory: each forward has a copy on the device, for as long as it or its graph lives."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.block, self._device = block, device
        if device.type == "cuda":
            for parameter in block.parameters():
                parameter.data = parameter.data.pin_memory()

    def forward(self, *inputs: Tensor, **named: object) -> object:
        held = [*self.block.named_parameters(), *self.block.named_buffers()]
        there = {
            name: tensor.to(self._device, non_blocking=True, copy=True) for name, tensor in held
        }
        return functional_call(self.block, there, inputs, named)


def offloaded(net: nn.Module, device: torch.device) -> nn.Module:
    """The frozen network with its blocks in host memory, where a forward fetches them one by one; the rest is on the device."""
    blocks = architecture_called(net).blocks(net)
    held = list(blocks)
    for index in range(len(held)):
        blocks[index] = nn.Identity()
    net.to(device)
    for index, block in enumerate(held):
        blocks[index] = Streamed(block, device)
    return net


def in_host_memory(net: nn.Module) -> nn.Module:
    """The network as it was loaded, whether it was on a device or `offloaded`."""
    for part in list(net.modules()):
        for name, child in part.named_children():
            if isinstance(child, Streamed):
                setattr(part, name, child.block)
    return net.to("cpu")
