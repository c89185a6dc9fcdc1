"""Samples of the fake score (`reuse_rollout`): fresh rollouts, the student's samples or its graph.

Each class gives the losses and the backward of both phases. Only the first fake-score update after
a student update receives samples to reuse.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distill_bench.config.schema import RunConfig
from distill_bench.method import Batch, Loss, Method, Nets
from distill_bench.networks.precision import publish

Backward = Callable[[Tensor], None]


@dataclass(frozen=True)
class Samples:
    """One micro-batch of the student's samples, detached, with their text.

    `fake_score_terms` are the fake score's loss on these samples, attached to the student's graph.
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
        """The samples that the first fake-score update reuses; None for fresh rollouts."""
        return None

    def fake_score_loss(self, batch: Batch, samples: Samples | None) -> Loss:
        """The loss of one micro-batch of the fake score's phase.

        Args:
            batch: with the text of the samples.
            samples: None: the batch's own rollout.
        """
        if samples is not None:
            return self.method.fake_score_loss(self.nets, batch, samples.x0)
        with torch.no_grad():
            x0 = self.nets.rollout(batch)
        return self.method.fake_score_loss(self.nets, batch, x0)

    def backward(self, parameters: Iterable[nn.Parameter], keeps_graph: bool) -> Backward:
        """The backward of a phase that trains `parameters`."""
        return Tensor.backward

    def publish(self, trained: Mapping[str, nn.Module]) -> None:
        """Copy master weights into their networks after the method's hook may have changed them."""
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
        return self.fresh.fake_score_loss(batch, samples)

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
        self.fake_score.requires_grad_(True)  # so that the graph includes its weights
        try:
            return self.fresh.student_loss(batch)
        finally:
            self.fake_score.requires_grad_(False)

    def kept(self, batch: Batch, loss: Loss) -> Samples:
        return Samples(_samples_of(loss, self.fresh.name), batch.text, loss.fake_score_terms)

    def fake_score_loss(self, batch: Batch, samples: Samples | None) -> Loss:
        if samples is None or not samples.fake_score_terms:
            return self.fresh.fake_score_loss(batch, samples)
        return Loss(samples.fake_score_terms)

    def backward(self, parameters: Iterable[nn.Parameter], keeps_graph: bool) -> Backward:
        # each phase computes only the gradients of its own weights
        inputs = list(parameters)
        return functools.partial(Tensor.backward, inputs=inputs, retain_graph=keeps_graph)

    def publish(self, trained: Mapping[str, nn.Module]) -> None:
        # the kept graph needs the fake score's weights unchanged since its forward
        publish([trained["student"]])


Reuse = FreshRollouts | ReusedSamples | SharedGraph


def reuse_of(config: RunConfig, method: Method, nets: Nets, fake_score: nn.Module | None) -> Reuse:
    """Reuse as configured by `reuse_rollout`; fresh rollouts if no fake score is trained."""
    fresh = FreshRollouts(config.method["name"], method, nets)
    if fake_score is None or not config.reuse_rollout:
        return fresh
    if config.reuse_rollout == "graph":
        return SharedGraph(fresh, fake_score)
    return ReusedSamples(fresh)


def _samples_of(loss: Loss, name: str) -> Tensor:
    if loss.x0 is None:
        raise ValueError(
            f"{name}: the student's phase makes no samples to reuse; set `reuse_rollout: false`"
        )
    return loss.x0.detach()
