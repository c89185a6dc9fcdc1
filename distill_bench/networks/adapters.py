"""Low-rank adapters (LoRA, peft): student and fake score as two adapters of the teacher.

Each role is a view of the shared network (`Adapted`), which activates the role's adapter before
each forward. Parameter names are those of diffusers' LoRA files, without the adapter's name:
`blocks.0.attn1.to_q.lora_A.weight`.
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
    """A role's view of a network with adapters; its parameters are those of the role's adapter.

    Args:
        net: the network that all roles share.
        name: name of the role's adapter; None for the base without adapters.
    """

    def __init__(self, net: nn.Module, name: str | None) -> None:
        super().__init__()
        self.net = net
        self.name = name

    def forward(self, *inputs: Tensor, **options: object) -> object:
        activate(self.net, [] if self.name is None else [self.name])
        return self.net(*inputs, **options)

    def __getattr__(self, name: str) -> Any:
        """Look up attributes that a view lacks (`blocks`, `config`) in the network."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.net.named_parameters():
            # a parameter of an adapter is called PATH.lora_A.ADAPTER.weight
            path, _, leaf = name.rpartition(".")
            module, _, adapter = path.rpartition(".")
            of_adapter = module.rpartition(".")[2].startswith("lora_")
            if of_adapter and adapter == self.name:
                yield f"{module}.{leaf}", parameter
            elif not of_adapter and self.name is None:
                yield name.replace(".base_layer.", "."), parameter

    def state_dict(self, *_: object, **__: object) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], *_: object, **__: object) -> None:
        """Copy the weights of `state` into the adapter.

        Raises:
            ValueError: if `state` has other names than the adapter.
        """
        parameters = dict(self.named_parameters())
        if parameters.keys() != state.keys():
            unmatched = sorted(parameters.keys() ^ state.keys())
            raise ValueError(
                f"cannot load weights into adapter {self.name!r}: {len(unmatched)} names do not "
                f"match, e.g. {unmatched[0]}; the weights belong to an adapter of other layers"
            )
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def lora_config(adapter: AdapterConfig) -> "LoraConfig":
    """An adapter's settings as peft's configuration."""
    from peft import LoraConfig  # takes a second, and few runs have adapters

    return LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets)
    )


def add_adapter(net: nn.Module, name: str, adapter: AdapterConfig, seed: int) -> Adapted:
    """Add an adapter to `net`, in place, and freeze every other weight.

    B is zero, so the network's output does not change; A is drawn from `seed` and `name`. The
    adapter is float32 even if the network is bfloat16, so it needs no master weights.

    Args:
        net: a transformer, possibly with other adapters.
        name: name of the role, and of the new adapter.
        seed: seed of the run.

    Returns:
        The role's view of `net`.

    Raises:
        ConfigError: if no linear layer of the network matches a target.
    """
    from peft import inject_adapter_in_model  # takes a second, and few runs have adapters

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(generator(seed, "adapter", name).initial_seed())
        # peft warns of a second adapter on one network, which is intended here
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        try:
            inject_adapter_in_model(lora_config(adapter), net, name)
        except ValueError as error:
            linear = {
                path.rpartition(".")[2]
                for path, module in net.named_modules()
                if isinstance(module, nn.Linear)
            }
            targets = ", ".join(map(repr, adapter.targets))
            raise ConfigError(
                f"adapter.targets: no linear layer matches {targets}; "
                f"available suffixes: {', '.join(sorted(linear))}"
            ) from error
    net.requires_grad_(False)
    view = Adapted(net, name)
    for parameter in view.parameters():
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        parameter.data = parameter.data.to(dtype)
    return view


def activate(net: nn.Module, adapters: list[str]) -> None:
    """Make forwards of `net` use these adapters.

    peft's own `set_adapter` is not used: it also changes which weights are trained.
    """
    for layer in net.modules():
        if hasattr(layer, "_active_adapter"):
            layer._active_adapter = adapters


def active_adapters(net: nn.Module) -> list[str]:
    """Names of the adapters that a forward of `net` uses now."""
    for layer in net.modules():
        if hasattr(layer, "_active_adapter"):
            return layer._active_adapter
    return []


def merge_adapter(net: nn.Module) -> nn.Module:
    """Add the active adapters to the network's weights and restore its plain layers, in place."""
    for name, layer in list(net.named_modules()):
        if hasattr(layer, "_active_adapter"):
            layer.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent), leaf, layer.get_base_layer())
    if hasattr(net, "peft_config"):
        del net.peft_config
    return net
