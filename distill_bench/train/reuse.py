"""The fake score's samples (`reuse_rollout`): fresh rollouts, the student's, or its whole graph.

Each kind gives the loss of both phases and the backward that goes with it. Only the first
fake-score update after a student update is given samples to reuse.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from distill_bench.config.schema import RunConfig
from distill_bench.method import Batch, Loss, Method, Nets
from distill_bench.networks.precision import publish

Backward = Callable[[Tensor], None]


@dataclass(frozen=True)
class Samples:
    """One micro-batch of the student's samples, detached, with their text.

    `fake_score_terms` are the fake score's loss on them, still attached to the student's graph.
    """

    x0: Tensor
    text: Tensor
    fake_score_terms: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class FreshRollouts:
    """`reuse_rollout: false`: each fake-score update makes a rollout of its own."""

    name: str  # of the method, as a sweep writes it
    method: Method
    nets: Nets

    def student_loss(self, batch: Batch) -> Loss:
        """The method's loss of one micro-batch of the student's phase."""
        return self.method.student_loss(self.nets, batch)

    def kept(self, batch: Batch, loss: Loss) -> Samples | None:
        """The samples of a student loss that the first fake-score update reuses."""
        return None

    def fake_score_loss(self, batch: Batch, samples: Samples | None) -> Loss:
        """The loss of one micro-batch of the fake score's phase; samples=None makes a rollout."""
        with torch.no_grad():
            x0 = self.nets.rollout(batch)
        return self.method.fake_score_loss(self.nets, batch, x0)

    def backward(self, parameters: Iterable[nn.Parameter], keeps_graph: bool) -> Backward:
        """The backward of a phase that trains `parameters`."""
        return Tensor.backward

    def publish(self, trained: Mapping[str, nn.Module]) -> None:
        """Copy the master weights that the method's hook may have changed into their networks."""
        publish(trained.values())


@dataclass(frozen=True)
class ReusedSamples:
    """`reuse_rollout: true`: the first fake-score update learns from the student's samples."""

    fresh: FreshRollouts

    def student_loss(self, batch: Batch) -> Loss:
        return self.fresh.student_loss(batch)

    def kept(self, batch: Batch, loss: Loss) -> Samples:
        return Samples(_samples_of(loss, self.fresh.name), batch.text)

    def fake_score_loss(self, batch: Batch, samples: Samples | None) -> Loss:
        if samples is None:
            return self.fresh.fake_score_loss(batch, None)
        batch = replace(batch, text=samples.text)
        return self.fresh.method.fake_score_loss(self.fresh.nets, batch, samples.x0)

    def backward(self, parameters: Iterable[nn.Parameter], keeps_graph: bool) -> Backward:
        return self.fresh.backward(parameters, keeps_graph)

    def publish(self, trained: Mapping[str, nn.Module]) -> None:
        self.fresh.publish(trained)


@dataclass(frozen=True)
class SharedGraph:
    """`reuse_rollout: graph`: the first fake-score update differentiates the student's graph."""

    fresh: FreshRollouts
    fake_score: nn.Module

    def student_loss(self, batch: Batch) -> Loss:
        self.fake_score.requires_grad_(True)  # the graph must reach its weights as well
        try:
            return self.fresh.student_loss(batch)
        finally:
            self.fake_score.requires_grad_(False)

    def kept(self, batch: Batch, loss: Loss) -> Samples:
        return Samples(_samples_of(loss, self.fresh.name), batch.text, loss.fake_score_terms)

    def fake_score_loss(self, batch: Batch, samples: Samples | None) -> Loss:
        if samples is None:
            return self.fresh.fake_score_loss(batch, None)
        return Loss(samples.fake_score_terms)

    def backward(self, parameters: Iterable[nn.Parameter], keeps_graph: bool) -> Backward:
        # each phase takes its own part of the graph: gradients of its own weights alone
        inputs = list(parameters)
        return functools.partial(Tensor.backward, inputs=inputs, retain_graph=keeps_graph)

    def publish(self, trained: Mapping[str, nn.Module]) -> None:
        # the kept graph must find the fake score's weights as its forward saw them
        publish([trained["student"]])


Reuse = FreshRollouts | ReusedSamples | SharedGraph


def reuse_of(config: RunConfig, method: Method, nets: Nets, fake_score: nn.Module | None) -> Reuse:
    """The kind of reuse that a run asks for; fresh rollouts if no fake score is trained."""
    fresh = FreshRollouts(config.method["name"], method, nets)
    if fake_score is None or not config.reuse_rollout:
        return fresh
    return (
        SharedGraph(fresh, fake_score) if config.reuse_rollout == "graph" else ReusedSamples(fresh)
    )


def _samples_of(loss: Loss, name: str) -> Tensor:
    if loss.x0 is None:
        raise ValueError(
            f"{name}: the student's phase makes no samples to reuse; set `reuse_rollout: false`"
        )
    return loss.x0.detach()
