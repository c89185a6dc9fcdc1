"""The student's moving average: none, weights that replace the student's, or a separate network.

Clips are sampled from the average, and methods see it as `nets.target`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill_bench.networks.sharding import lister, local


class NoAverage:
    """`ema: null`: the student itself is used instead of an average."""

    laid_over: Mapping[str, Tensor] | None = None

    def __init__(self, trained: nn.Module, net: nn.Module) -> None:
        self.trained = trained
        self.net = net
        self.weights: dict[str, Tensor] = {}

    def update(self) -> None:
        """Do nothing: there are no averaged weights."""

    def sampled(self) -> Mapping[str, Tensor]:
        """The weights to sample from, by name."""
        return dict(self.trained.named_parameters())


class MovingAverage:
    """average <- decay * average + (1 - decay) * student, after each student update.

    Args:
        trained: the student as its optimiser sees it (its network, or float32 masters).
        net: the network that predicts with the average: the student's, or a separate network.
        decay: in [0, 1).
        own_network: True if `net` holds the average itself (sharded or low-rank students); False if
            the average replaces the student's weights in each forward.
    """

    def __init__(self, trained: nn.Module, net: nn.Module, decay: float, own_network: bool) -> None:
        self.parameters = lister(trained)
        self.net = net
        self.decay = decay
        if own_network:
            self.weights = {name: p.detach() for name, p in net.named_parameters()}
            self.laid_over = None
        else:
            self.weights = {name: p.detach().clone() for name, p in trained.named_parameters()}
            self.laid_over = self.weights

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the student."""
        newest = [local(p) for p in self.parameters()]
        averages = [local(value) for value in self.weights.values()]
        torch._foreach_lerp_(averages, newest, 1 - self.decay)

    def sampled(self) -> Mapping[str, Tensor]:
        return self.weights


Average = NoAverage | MovingAverage
