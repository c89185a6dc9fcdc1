"""One phase of an update: the optimiser step of some roles while the others are frozen."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from distill_bench.config.schema import RunConfig
from distill_bench.method import Loss
from distill_bench.networks.precision import publish
from distill_bench.networks.sharding import clip_gradients, lister
from distill_bench.train.processes import Processes
from distill_bench.train.reuse import Backward

# bounds of the standard deviation of the student's latents; data have unit variance
COLLAPSED_STD, EXPLODED_STD = 0.02, 50.0

Scalars = dict[str, Tensor | float]


class Collapsed(RuntimeError):
    """The run diverged. This is recorded as a result, not as a crash."""


@dataclass(frozen=True)
class Phase:
    """Accumulates gradients over micro-batches, averages them over ranks, clips and steps.

    Attributes:
        name: "student" or "fake_score"; prefix of its loss in the log.
        trains: the roles that the phase steps.
        networks: every role of the run that some phase trains.
        trained: the roles as optimisers see them: the networks or their float32 masters.
        optimisers: of this phase.
        differentiate: the backward of one micro-batch's loss.
    """

    name: str
    trains: tuple[str, ...]
    networks: Mapping[str, nn.Module]
    trained: Mapping[str, nn.Module]
    optimisers: Mapping[str, torch.optim.Optimizer]
    differentiate: Backward
    processes: Processes
    config: RunConfig

    def only_trainable(self) -> None:
        """Freeze all roles but those of this phase; they pass gradients only to their inputs."""
        for role, parameters in self._listers.items():
            for parameter in parameters():
                parameter.requires_grad_(role in self.trains)

    @cached_property
    def _listers(self) -> dict[str, Callable[[], Iterable[nn.Parameter]]]:
        return {role: lister(net) for role, net in self.networks.items()}

    def backward(self, losses: Iterable[Loss]) -> dict[str, Tensor]:
        """Accumulate the gradients of the micro-batches; returns the means of the logged values.

        Args:
            losses: one per micro-batch, made lazily: each graph is freed before the next is built.
        """
        self.only_trainable()
        accumulation = self.config.accumulation
        scalars: dict[str, Tensor] = {}
        for loss in losses:
            total = loss.total
            if not loss.terms or not total.requires_grad:
                raise ValueError(
                    f"{self.config.method['name']}: the {self.name} loss "
                    f"({', '.join(loss.terms)}) has no gradient; it must depend on "
                    "a trained network"
                )
            self.differentiate(total / accumulation)
            logs = {f"{self.name}_loss": total, **loss.terms, **loss.logs}
            if loss.x0 is not None:
                x0 = loss.x0.detach().double()
                logs |= {"x0_mean": x0.mean(), "x0_std": x0.square().mean()}
            for name, value in logs.items():
                scalars[name] = scalars.get(name, 0.0) + value.detach() / accumulation
        return scalars

    def step(self, losses: Iterable[Loss]) -> Scalars:
        """Make one optimiser step on the losses of the micro-batches; returns the values to log.

        Raises:
            Collapsed: on every rank, if the samples degenerate or a gradient is not finite; the
                weights stay unchanged.
        """
        scalars: Scalars = self.processes.means(self.backward(losses))
        if "x0_std" in scalars:
            mean_square, mean = scalars["x0_std"], scalars.pop("x0_mean")
            std = scalars["x0_std"] = (mean_square - mean**2).abs().sqrt()
            if not COLLAPSED_STD < float(std) < EXPLODED_STD:
                raise Collapsed(f"the student's samples have standard deviation {float(std):.3g}")
        for name, optimiser in self.optimisers.items():
            scalars[f"{name}_grad_norm"] = self._clipped(name, optimiser, scalars)
        for optimiser in self.optimisers.values():
            optimiser.step()
        self.zero_grad()
        publish(self.trained[role] for role in self.trains)
        return scalars

    def zero_grad(self) -> None:
        """Free the gradients of the phase."""
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)

    def _clipped(self, name: str, optimiser: torch.optim.Optimizer, scalars: Scalars) -> float:
        """Average and clip the gradients of one optimiser; returns their norm before clipping."""
        groups = (group["params"] for group in optimiser.param_groups)
        parameters = [p for group in groups for p in group if p.grad is not None]
        self.processes.average_gradients(parameters)
        norm = clip_gradients(parameters, self.config.grad_clip)
        if not math.isfinite(norm):
            not_finite = [term for term, value in scalars.items() if not math.isfinite(value)]
            terms = f" (not finite: {', '.join(not_finite)})" if not_finite else ""
            raise Collapsed(f"the gradient of the {name} is {norm}{terms}")
        return norm
