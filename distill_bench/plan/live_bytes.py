"""Count the bytes of a network, and the peak of live bytes while code runs."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_bench.networks.offload import Streamed


class LiveBytes(TorchDispatchMode):
    """Counts bytes of live storages created by operations; `peaks` has the maximum per stage."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peaks = [0]
        self._alive: dict[int, int] = {}

    def mark(self) -> None:
        """Begin a stage."""
        self.peaks.append(self.now)

    def restart(self) -> None:
        """Forget the stages so far and begin the first of a new list."""
        self.peaks = [self.now]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage(), made=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage(), made=True)
        return result

    def _see(self, storage: torch.UntypedStorage, made: bool) -> None:
        key = storage._cdata
        if key not in self._alive:
            # storages created before this mode was entered count as 0
            size = self._alive[key] = storage.nbytes() if made else 0
            self.now += size
            self.peaks[-1] = max(self.peaks[-1], self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors; a shared storage counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def offloaded_bytes(net: nn.Module) -> int:
    """Bytes of the blocks that a network keeps in host memory."""
    streamed = [block for block in net.modules() if isinstance(block, Streamed)]
    return sum(total_bytes(block.parameters()) + total_bytes(block.buffers()) for block in streamed)


def device_bytes(net: nn.Module) -> int:
    """Bytes of a network's weights and buffers on the device."""
    return total_bytes(net.parameters()) + total_bytes(net.buffers()) - offloaded_bytes(net)
