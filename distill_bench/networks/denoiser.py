"""TODO: networks.denoiser."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from distill_bench.networks.adapters import Adapted
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.sharding import Reached
from distill_bench.noise import velocity_to_x0
from distill_bench.teachers.architectures import Call, architecture_called


class Denoiser:
    """A role's network as clean prediction, (x_t, sigma, text) -> x0_hat; counts its passes in the ledger.

    With `weights` the network runs with those instead of its own (a moving average, without a second copy).
    """

    def __init__(
        self,
        net: nn.Module,
        role: str,
        ledger: Ledger,
        autocast: torch.dtype | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.net, self.role, self.ledger, self.autocast, self.weights = (
            net,
            role,
            ledger,
            autocast,
            weights,
        )
        self.architecture = architecture_called(net)

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """x0_hat (B, C, T, H, W) of x_t (B, C, T, H, W) at sigma (B,) in (0, 1] with text (B, L, D)."""
        return velocity_to_x0(self.velocity(x_t, sigma, text), x_t, sigma)

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """noise - x0 (B, C, T, H, W), of which `__call__` makes x0_hat."""
        return self._count(self._forward(x_t, sigma, text), len(x_t)).to(x_t.dtype)

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        """Tokens (B, N, width) after the share `depth` of the blocks; what lies behind is neither run nor counted."""
        blocks = self.architecture.blocks(self.net)
        last, found = max(1, round(depth * len(blocks))), []

        def reached(_module: nn.Module, _inputs: tuple, output: Any) -> None:
            found.append(self.architecture.tokens(output))
            raise Reached(found[0])

        def call(*inputs: Any, **named: Any) -> Tensor:
            self._call(*inputs, **named)
            raise Reached(
                found[0]
            )  # a sharded network ends as if they were its output (`shard`), which is not to be converted

        handle = blocks[last - 1].register_forward_hook(reached)
        try:
            self._forward(x_t, sigma, text, call)
        except Reached:
            pass
        finally:
            handle.remove()
        return self._count(found[0], len(x_t) * last / len(blocks)).to(x_t.dtype)

    def _forward(
        self, x_t: Tensor, sigma: Tensor, text: Tensor, call: Call | None = None
    ) -> Tensor:
        with torch.autocast(x_t.device.type, self.autocast, enabled=self.autocast is not None):
            return self.architecture.velocity(self.net, call or self._call, x_t, sigma, text)

    def _call(self, *inputs: Any, **named: Any) -> Tensor:
        if self.weights is not None:
            return functional_call(
                self.net, dict(self.weights), inputs, {**named, "return_dict": False}
            )[0]
        return self.net(*inputs, **named, return_dict=False)[0]

    def _count(self, output: Tensor, samples: float) -> Tensor:
        self.ledger.add(self.role, "forward", samples)
        if output.requires_grad:
            output.register_hook(
                lambda _: self.ledger.add(self.role, self._kind_of_backward(), samples)
            )
        return output

    def _kind_of_backward(self) -> str:
        """Asked when a backward runs: of a graph that two phases share each takes its own part.

        One that trains adapters alone computes no gradient of the base's weights, and costs what one to the input does.
        """
        trained = any(p.requires_grad for p in self.net.parameters()) and not isinstance(
            self.net, Adapted
        )
        return "full_backward" if trained else "input_backward"


class Guided:
    """Classifier-free guidance of a denoiser, uncond + guidance_scale * (cond - uncond); 1 is none.

    In one forward of both, or in two one after the other, which need half the memory.
    """

    def __init__(
        self, denoiser: Denoiser, null_text: Tensor, guidance_scale: float, batched: bool = True
    ) -> None:
        self.denoiser, self.null_text, self.guidance_scale, self.batched = (
            denoiser,
            null_text,
            guidance_scale,
            batched,
        )

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        if self.guidance_scale == 1:
            return self.denoiser(x_t, sigma, text)
        null_text = self.null_text.expand_as(text)
        if self.batched:
            both = torch.cat([text, null_text])
            cond, uncond = self.denoiser(
                torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both
            ).chunk(2)
        else:
            cond, uncond = self.denoiser(x_t, sigma, text), self.denoiser(x_t, sigma, null_text)
        return uncond + self.guidance_scale * (cond - uncond)


def forward_flops(net: nn.Module, latent_shape: tuple[int, ...], text: Tensor) -> float:
    """FLOPs of one forward of one sample."""
    x = torch.zeros(1, *latent_shape, device=text.device, dtype=text.dtype)
    sigma = torch.full((1,), 0.5, device=text.device, dtype=text.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        architecture_called(net).velocity(
            net, lambda *xs, **named: net(*xs, **named, return_dict=False)[0], x, sigma, text[:1]
        )
    return float(counter.get_total_flops())
