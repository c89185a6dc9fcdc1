"""Networks in float64 or bfloat16, and float32 master weights for training in bfloat16.

An update of 1e-6 is lost in the 8 bits of a bfloat16 mantissa, so the optimiser steps float32
masters.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from distill_bench.teachers.experts import networks_in


def in_precision(net: nn.Module, precision: str) -> nn.Module:
    """Convert a float32 network to float64 in place if `precision` is float64."""
    return net.double() if precision == "float64" else net


def cast(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a network to a dtype in place, except the weights its class keeps in float32."""
    kept = kept_in_float32(net)
    for parameter in net.parameters():
        if parameter not in kept:
            parameter.data = parameter.data.to(dtype)
    return net


def kept_in_float32(net: nn.Module) -> set[nn.Parameter]:
    """Parameters that the network's class keeps in float32, e.g. norms and the time embedding.

    They are those of the modules in diffusers' `_keep_in_fp32_modules`.
    """
    modules = set(getattr(networks_in(net)[0], "_keep_in_fp32_modules", None) or ())
    return {
        parameter for name, parameter in net.named_parameters() if modules & set(name.split("."))
    }


class Masters(nn.Module):
    """Float32 master weights of a bfloat16 network, by the network's parameter names.

    Optimiser, moving average and checkpoints see the masters. During a backward, each bfloat16
    gradient is added to its master's float32 gradient and freed. `publish` copies the masters into
    the network. Parameters that stay in float32 are their own masters.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        float32 = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        cast(net, torch.bfloat16)
        self._net = (net,)  # in a tuple, so that it is not registered as a submodule
        self._masters: dict[str, Tensor] = {}
        for name, parameter in net.named_parameters():
            if parameter.dtype == torch.bfloat16:
                self._masters[name] = float32[name]
                parameter.register_post_accumulate_grad_hook(
                    lambda p, master=float32[name]: _take_gradient(p, master)
                )
            else:
                self._masters[name] = parameter

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, Tensor]]:
        yield from self._masters.items()

    def state_dict(self, *_: object, **__: object) -> dict[str, Tensor]:
        masters = {name: master.detach() for name, master in self._masters.items()}
        return self._net[0].state_dict() | masters

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], *_: object, **__: object) -> None:
        self._net[0].load_state_dict(state)  # rounds to bfloat16
        for name, master in self._masters.items():
            master.copy_(state[name])

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the updated masters into the bfloat16 network."""
        for name, parameter in self._net[0].named_parameters():
            if parameter is not self._masters[name]:
                parameter.copy_(self._masters[name])


def publish(trained: Iterable[nn.Module]) -> None:
    """Copy updated float32 master weights into their bfloat16 networks; skip other networks."""
    for net in trained:
        if isinstance(net, Masters):
            net.publish()


def _take_gradient(parameter: Tensor, master: Tensor) -> None:
    gradient = parameter.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None
