"""TODO: plan.fake."""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_bench.draws import Draws
from distill_bench.networks.offload import Streamed


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make and that are alive; `peaks` are the most at once in each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peaks = 0, [0]
        self._alive: dict[int, int] = {}

    def mark(self) -> None:
        """Begin a stage."""
        self.peaks.append(self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
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
            size = self._alive[key] = (
                storage.nbytes() if made else 0
            )  # what was there before is none of ours
            self.now += size
            self.peaks[-1] = max(self.peaks[-1], self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


@dataclass(frozen=True)
class FakeDraws(Draws):
    """Draws of the right shapes."""

    generator: None = field(default=None)

    def noise(self, purpose: str, shape: Iterable[int]) -> Tensor:
        return torch.empty(len(self.indices), *shape, dtype=self.dtype)

    def uniform(self, purpose: str) -> Tensor:
        return torch.empty(len(self.indices), dtype=self.dtype)

    def integers(self, purpose: str, high: int) -> list[int]:
        return [0] * len(self.indices)

    def shared_integer(self, purpose: str, high: int) -> int:
        return 0


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(functional, "scaled_dot_product_attention", _fused_attention),
    ):
        yield


def _apply(net: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module.to` and its like on fake tensors, which torch's own cannot swap where something refers to them."""
    for tensor in [*net.parameters(recurse), *net.buffers(recurse)]:
        tensor.data = function(tensor.data)
    return net


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention that never holds its matrix, as real devices run it; fake tensors would be given the plain one."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def held_back_bytes(net: nn.Module) -> int:
    """Bytes of the blocks that a network has in host memory."""
    streamed = [block for block in net.modules() if isinstance(block, Streamed)]
    return sum(total_bytes(block.parameters()) + total_bytes(block.buffers()) for block in streamed)


def device_bytes(net: nn.Module) -> int:
    return total_bytes(net.parameters()) + total_bytes(net.buffers()) - held_back_bytes(net)
