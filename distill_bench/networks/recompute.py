"""TODO: networks.recompute."""

import contextlib

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill_bench.networks.adapters import activate, active


def checkpointed(block: nn.Module, *inputs: Tensor) -> Tensor:
    """The block's output, of which a backward computes the inside again, as it was: roles may share the block.

    Between the forward and its backward another role's adapter may have become the active one, and another phase begun.
    """
    then = _AsItWas(block)
    return checkpoint(
        block,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (contextlib.nullcontext(), then),
    )


class _AsItWas:
    """A context in which a block has the active adapters and trainable weights that it had when this was made."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.then = block, self._state(block)

    def __enter__(self) -> None:
        self.now = self._state(self.block)
        self._restore(*self.then)

    def __exit__(self, *_: object) -> None:
        self._restore(*self.now)

    @staticmethod
    def _state(block: nn.Module) -> tuple[list[str], list[bool]]:
        return active(block), [p.requires_grad for p in block.parameters()]

    def _restore(self, adapters: list[str], flags: list[bool]) -> None:
        activate(self.block, adapters)
        for parameter, flag in zip(self.block.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
