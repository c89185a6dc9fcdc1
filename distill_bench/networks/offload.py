"""Keeps the blocks of a frozen network in host memory and copies each to the device when it runs.

diffusers' group offloading is not used: it does not support the backward through the teacher that
several methods need.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distill_bench.teachers.architecture import architecture_called
from distill_bench.teachers.experts import networks_in


class Streamed(nn.Module):
    """A block with its weights in host memory.

    Each forward copies them to the device; the copy is freed with the graph of that forward.
    """

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.block = block
        self._device = device
        if device.type == "cuda":  # copies from pinned memory overlap with computation
            for parameter in block.parameters():
                parameter.data = parameter.data.pin_memory()

    def forward(self, *inputs: Tensor, **options: object) -> object:
        weights = [*self.block.named_parameters(), *self.block.named_buffers()]
        copies = {
            name: tensor.to(self._device, non_blocking=True, copy=True) for name, tensor in weights
        }
        return functional_call(self.block, copies, inputs, options)


def place(net: nn.Module, device: torch.device, offload: bool = False) -> nn.Module:
    """Move a network to the device, in place.

    Args:
        net: a transformer of a known architecture, or the experts of one.
        device: where the network runs.
        offload: keep the blocks in host memory (`Streamed`); for frozen networks only.
    """
    if not offload:
        return net.to(device)
    for transformer in networks_in(net):
        blocks = architecture_called(transformer).blocks(transformer)
        in_host_memory = list(blocks)
        for index in range(len(in_host_memory)):
            blocks[index] = nn.Identity()  # so that `to` moves everything else
        transformer.to(device)
        for index, block in enumerate(in_host_memory):
            blocks[index] = Streamed(block, device)
    return net


def to_host_memory(net: nn.Module) -> nn.Module:
    """Undo `place`: restore the network's own blocks and move the network to host memory."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, Streamed):
                setattr(module, name, child.block)
    return net.to("cpu")
