"""Activation checkpointing for blocks that several roles share."""

import contextlib

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill_bench.networks.adapters import activate, active_adapters


def checkpointed(block: nn.Module, *inputs: Tensor) -> Tensor:
    """Run a block; its backward recomputes the activations, in the state of the original forward.

    Between a forward and its backward, another role may have activated its adapter, and another
    phase may have changed which weights are trained. The recomputation restores both.
    """
    state = _BlockState(block)
    output: Tensor = checkpoint(
        block,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (contextlib.nullcontext(), state),
    )
    return output


class _BlockState:
    """Context that restores the active adapters and trainable weights of a block's forward."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.original = self._read()

    def __enter__(self) -> None:
        self.current = self._read()
        self._write(*self.original)

    def __exit__(self, *_: object) -> None:
        self._write(*self.current)

    def _read(self) -> tuple[list[str], list[bool]]:
        return active_adapters(self.block), [p.requires_grad for p in self.block.parameters()]

    def _write(self, adapters: list[str], requires_grad: list[bool]) -> None:
        activate(self.block, adapters)
        for parameter, flag in zip(self.block.parameters(), requires_grad, strict=True):
            parameter.requires_grad_(flag)
