"""Networks in bfloat16, and the float32 masters of what is trained: updates are too small for eight bits of mantissa."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


def cast(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in a dtype, in place, but for what stays in float32."""
    kept = kept_in_float32(net)
    for parameter in net.parameters():
        if parameter not in kept:
            parameter.data = parameter.data.to(dtype)
    return net


def kept_in_float32(net: nn.Module) -> set[nn.Parameter]:
    """What a network's class keeps in float32 (norms, time embedding), as diffusers reads it."""
    modules = set(getattr(net, "_keep_in_fp32_modules", None) or ())
    return {
        parameter for name, parameter in net.named_parameters() if modules & set(name.split("."))
    }


class Masters(nn.Module):
    """The float32 masters of a network, under its names: for the optimiser, the average and the checkpoints.

    Gradients of the network's own bfloat16 weights are added to their masters' in float32, and freed, as a backward makes them;
    `publish` rounds the masters into the network. Weights that stay float32 are their own masters.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        own = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        cast(net, torch.bfloat16)
        self._net = (net,)  # no submodule: its parameters are not these
        self._masters: dict[str, Tensor] = {}
        for name, parameter in net.named_parameters():
            if parameter.dtype == torch.bfloat16:
                self._masters[name] = own[name]
                parameter.register_post_accumulate_grad_hook(
                    lambda p, master=own[name]: _take_gradient(p, master)
                )
            else:
                self._masters[name] = parameter

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, Tensor]]:
        yield from self._masters.items()

    def state_dict(self, *_: object, **__: object) -> dict[str, Tensor]:
        return self._net[0].state_dict() | {
            name: master.detach() for name, master in self._masters.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], *_: object, **__: object) -> None:
        self._net[0].load_state_dict(state)  # rounds
        for name, master in self._masters.items():
            master.copy_(state[name])

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the network."""
        for name, parameter in self._net[0].named_parameters():
            if parameter is not self._masters[name]:
                parameter.copy_(self._masters[name])


def _take_gradient(parameter: Tensor, master: Tensor) -> None:
    gradient = parameter.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None
