"""The student's moving average: none, laid over the student's network, or a network of its own.

The average is what is sampled and what methods see as `nets.target`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill_bench.networks.sharding import local


class NoAverage:
    """`ema: null`: the student stands for its average."""

    laid_over: Mapping[str, Tensor] | None = None

    def __init__(self, trained: nn.Module, net: nn.Module) -> None:
        self.trained = trained
        self.net = net
        self.weights: dict[str, Tensor] = {}

    def update(self) -> None:
        """Move the average towards the student."""

    def sampled(self) -> Mapping[str, Tensor]:
        """The weights to sample from, by name."""
        return dict(self.trained.named_parameters())


class MovingAverage:
    """average <- decay * average + (1 - decay) * student, after each student update.

    Args:
        trained: the student as its optimiser sees it (its network, or float32 masters).
        net: the network that predicts with the average: the student's, or one of its own.
        decay: in [0, 1).
        own_network: True if `net` holds the average itself (sharded or low-rank students); False if
            the average is laid over the student's network in each forward.
    """

    def __init__(self, trained: nn.Module, net: nn.Module, decay: float, own_network: bool) -> None:
        self.trained = trained
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
        newest = [local(p) for p in self.trained.parameters()]
        averages = [local(value) for value in self.weights.values()]
        torch._foreach_lerp_(averages, newest, 1 - self.decay)

    def sampled(self) -> Mapping[str, Tensor]:
        return self.weights


Average = NoAverage | MovingAverage
