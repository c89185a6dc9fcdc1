"""Fake tensors (shapes without data) and draws of the right shape, for rehearsals."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from distill_bench.draws import Draws


@dataclass(frozen=True)
class FakeDraws(Draws):
    """Draws whose shapes are right and whose values mean nothing; integers are 0."""

    def noise(self, purpose: str, shape: Sequence[int]) -> Tensor:
        return torch.empty(len(self.indices), *shape, dtype=self.dtype)

    def uniform(self, purpose: str) -> Tensor:
        return torch.empty(len(self.indices), dtype=self.dtype)

    def shared_uniform(self, purpose: str) -> Tensor:
        return self.uniform(purpose)

    def integers(self, purpose: str, high: int) -> list[int]:
        return [0] * len(self.indices)

    def shared_integer(self, purpose: str, high: int) -> int:
        return 0


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Make new tensors without data; attention uses the fused kernel, as on real devices."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(functional, "scaled_dot_product_attention", _fused_attention),
    ):
        yield


def _apply(net: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` in place: torch's version cannot swap fake tensors that are referenced."""
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
    """Attention that never holds its matrix; fake tensors would dispatch to the unfused kernel."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
