"""Low-rank adapters by peft: student and fake score as two adapters of one network, whose base alone is the teacher.

A role is a view of that network (`Adapted`) that makes its own adapter the active one before each forward. Names of its
parameters are those of diffusers' LoRA files, without the adapter's name: `blocks.0.attn1.to_q.lora_A.weight`.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distill_bench.config.errors import ConfigError
from distill_bench.config.schema import AdapterConfig
from distill_bench.draws import generator

if TYPE_CHECKING:
    from peft import LoraConfig


class Adapted(nn.Module):
    """A role's view of a network with adapters: its parameters are those of the adapter `name`; None is the base alone."""

    def __init__(self, net: nn.Module, name: str | None) -> None:
        super().__init__()
        self.net, self.name = net, name

    def forward(self, *inputs: Tensor, **options: object) -> object:
        activate(self.net, [] if self.name is None else [self.name])
        return self.net(*inputs, **options)

    def __getattr__(self, name: str) -> Any:
        """What a view has not of its own (`blocks`, `config`) is the network's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.net.named_parameters():
            *parents, adapter, leaf = ["", *name.split(".")]
            of_adapter = parents[-1:] != [] and parents[-1].startswith("lora_")
            if of_adapter and adapter == self.name:
                yield ".".join([*parents[1:], leaf]), parameter
            elif not of_adapter and self.name is None:
                yield name.replace(".base_layer.", "."), parameter

    def state_dict(self, *_: object, **__: object) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], *_: object, **__: object) -> None:
        parameters = dict(self.named_parameters())
        if parameters.keys() != state.keys():
            unlike = sorted(parameters.keys() ^ state.keys())
            raise ValueError(
                f"the adapter {self.name} is of other layers than what is loaded: {unlike[0]}"
            )
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def lora_config(adapter: AdapterConfig) -> "LoraConfig":
    """What peft calls these settings."""
    from peft import LoraConfig  # only here: it takes a second

    return LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets)
    )


def add_adapter(net: nn.Module, name: str, adapter: AdapterConfig, seed: int) -> Adapted:
    """Give `net` one more adapter, B = 0 and A by the seed, with every other weight frozen.

    Raises:
        ConfigError: if no linear layer of the network has one of the targets' names.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(generator(seed, "adapter", name).initial_seed())
        warnings.filterwarnings(
            "ignore", message="Already found a `peft_config` attribute"
        )  # several, as wanted
        try:
            inject_adapter_in_model(lora_config(adapter), net, name)
        except ValueError as error:
            linear = sorted(
                {n.rpartition(".")[2] for n, m in net.named_modules() if isinstance(m, nn.Linear)}
            )
            message = f"adapter.targets {', '.join(adapter.targets)}: no layer is called so; linear layers end in: {', '.join(linear)}"
            raise ConfigError(message) from error
    net.requires_grad_(False)
    view = Adapted(net, name)
    for (
        parameter
    ) in view.parameters():  # the base may be bfloat16: adapters are small, and their own masters
        parameter.data = parameter.data.to(
            torch.float64 if parameter.dtype == torch.float64 else torch.float32
        )
    return view


def activate(net: nn.Module, adapters: list[str]) -> None:
    """Make `adapters` the ones that a forward uses; peft's own `set_adapter` would also decide what is trained."""
    for layer in net.modules():
        if hasattr(layer, "_active_adapter"):
            layer._active_adapter = adapters


def active(net: nn.Module) -> list[str]:
    """The adapters that a forward of `net` uses now."""
    return next(
        (layer._active_adapter for layer in net.modules() if hasattr(layer, "_active_adapter")), []
    )


def merge(net: nn.Module) -> nn.Module:
    """The network with its active adapters added to the weights, of plain layers again: what is exported."""
    for name, layer in list(net.named_modules()):
        if hasattr(layer, "_active_adapter"):
            layer.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent), leaf, layer.get_base_layer())
    if hasattr(net, "peft_config"):
        del net.peft_config
    return net
