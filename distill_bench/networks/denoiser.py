"""Wraps a role's network as a denoiser, (x_t, sigma, text) -> x0_hat; guides it; counts FLOPs."""

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from distill_bench.networks.adapters import Adapted
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.sharding import Reached
from distill_bench.noise import GuidanceScale, guidance_at, velocity_to_x0, x0_to_velocity
from distill_bench.teachers.architecture import architecture_called
from distill_bench.teachers.experts import PerNetwork, networks_in, routed


class Denoiser:
    """Clean prediction of a role's network: (x_t, sigma, text) -> x0_hat (`method.Role`).

    Args:
        net: a transformer of a known architecture, or the experts of one.
        role: name under which the ledger counts passes.
        ledger: counts every forward, and every backward when it runs.
        autocast: dtype of the network's arithmetic; None: the dtype of its weights.
        weights: parameters by name that replace the network's own. They evaluate a moving average
            without a second copy of the network.
    """

    def __init__(
        self,
        net: nn.Module,
        role: str,
        ledger: Ledger,
        autocast: torch.dtype | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.net = net
        self.role = role
        self.ledger = ledger
        self.autocast = autocast
        self.weights = weights
        self.architecture = architecture_called(net)

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """x0_hat (B, C, T, H, W) of x_t (B, C, T, H, W) at sigma (B,) in (0, 1], text (B, L, D)."""
        return velocity_to_x0(self.velocity(x_t, sigma, text), x_t, sigma)

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Prediction of noise - x0, (B, C, T, H, W); arguments as for the call."""

        def predict(net: nn.Module, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
            call = functools.partial(self._call, net)
            return self.architecture.velocity(net, call, x_t, sigma, text)

        return self._count(self._forward(predict, x_t, sigma, text), len(x_t)).to(x_t.dtype)

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        """Tokens (B, N, width) after the first blocks; later blocks are neither run nor counted.

        Args:
            x_t: (B, C, T, H, W).
            sigma: (B,), in (0, 1].
            text: (B, L, D).
            depth: share of the blocks that run, in [0, 1]; at least one block runs.
        """
        count = len(self.architecture.blocks(networks_in(self.net)[0]))
        last = max(1, round(depth * count))
        tokens = self._forward(functools.partial(self._tokens_after, last), x_t, sigma, text)
        return self._count(tokens, len(x_t) * last / count).to(x_t.dtype)

    def _tokens_after(
        self, last: int, net: nn.Module, x_t: Tensor, sigma: Tensor, text: Tensor
    ) -> Tensor:
        """Tokens after block number `last` of a network, counted from 1."""
        tokens: list[Tensor] = []

        def abort(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tokens.append(self.architecture.tokens(output))
            raise Reached(tokens[0])

        def call(*inputs: Any, **options: Any) -> Tensor:
            self._call(net, *inputs, **options)
            # A sharded network returns the tokens as its output (`shard`): stop before the
            # architecture converts them to a velocity.
            raise Reached(tokens[0])

        handle = self.architecture.blocks(net)[last - 1].register_forward_hook(abort)
        # the graph of a network that is compiled as a whole has no blocks to stop at
        whole = net._compiled_call_impl is not None
        uncompiled = torch.compiler.set_stance("force_eager") if whole else nullcontext()
        try:
            with uncompiled:
                self.architecture.velocity(net, call, x_t, sigma, text)
        except Reached:
            pass
        finally:
            handle.remove()
        return tokens[0]

    def _forward(self, run: PerNetwork, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        if self.autocast is None:
            return routed(self.net, run, x_t, sigma, text)
        with torch.autocast(x_t.device.type, self.autocast):
            return routed(self.net, run, x_t, sigma, text)

    def _call(self, net: nn.Module, *inputs: Any, **options: Any) -> Tensor:
        options["return_dict"] = False
        if self.weights is None:
            output: tuple[Tensor, ...] = net(*inputs, **options)
        else:
            output = functional_call(net, dict(self.weights), inputs, options)
        return output[0]

    def _count(self, output: Tensor, samples: float) -> Tensor:
        self.ledger.add(self.role, "forward", samples)
        if output.requires_grad:
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda _: self.ledger.add(self.role, self._kind_of_backward(), samples)
            )
        return output

    def _kind_of_backward(self) -> str:
        """Kind of the backward that runs now.

        It is not known at the forward: two phases may share a graph and train different roles. With
        adapters a backward computes no gradients of the base's weights, so it costs about as much
        as a backward to the input alone.
        """
        trained = next(self.net.parameters()).requires_grad  # a phase trains whole roles
        return (
            "full_backward" if trained and not isinstance(self.net, Adapted) else "input_backward"
        )


class Guided:
    """Classifier-free guidance of a denoiser: uncond + guidance_scale * (cond - uncond).

    Args:
        denoiser: conditioned on a text.
        null_text: text of the unconditional prediction, (1, L, D).
        guidance_scale: 1 means no guidance, and needs one forward instead of two; may differ
            between noise levels.
        batched: True runs both predictions in one forward; False runs one after the other, with
            half the memory.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        null_text: Tensor,
        guidance_scale: GuidanceScale,
        batched: bool = True,
    ) -> None:
        self.denoiser = denoiser
        self.null_text = null_text
        self.guidance_scale = guidance_scale
        self.batched = batched

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Guided x0_hat (B, C, T, H, W); arguments as for a `Denoiser`."""
        if self.guidance_scale == 1:
            return self.denoiser(x_t, sigma, text)
        null_text = self.null_text.expand_as(text)
        if self.batched:
            both = self.denoiser(
                torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), torch.cat([text, null_text])
            )
            cond, uncond = both.chunk(2)
        else:
            cond = self.denoiser(x_t, sigma, text)
            uncond = self.denoiser(x_t, sigma, null_text)
        return uncond + guidance_at(self.guidance_scale, sigma, x_t) * (cond - uncond)

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Guided prediction of noise - x0, (B, C, T, H, W); arguments as for the call."""
        if self.guidance_scale == 1:
            return self.denoiser.velocity(x_t, sigma, text)
        return x0_to_velocity(self(x_t, sigma, text), x_t, sigma)


def forward_flops(net: nn.Module, latent_shape: tuple[int, ...], text: Tensor) -> float:
    """FLOPs of a forward for one sample, counted by running the forward.

    Args:
        net: a transformer of a known architecture, or the experts of one.
        latent_shape: (C, T, H, W).
        text: (B, L, D); only the first row is used, with its device and dtype.
    """
    net = networks_in(net)[0]  # a sample runs through one expert
    x = torch.zeros(1, *latent_shape, device=text.device, dtype=text.dtype)
    sigma = torch.full((1,), 0.5, device=text.device, dtype=text.dtype)

    def call(*inputs: Any, **options: Any) -> Tensor:
        output: tuple[Tensor, ...] = net(*inputs, **options, return_dict=False)
        return output[0]

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        architecture_called(net).velocity(net, call, x, sigma, text[:1])
    return float(counter.get_total_flops())
