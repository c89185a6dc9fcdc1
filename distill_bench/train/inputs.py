"""Inputs of an update: prompts and draws of a micro-batch, and the student's samples.

The student predicts either from its own rollout or from noised real data (`student_input`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distill_bench.config.resolve import method_of
from distill_bench.config.schema import RunConfig
from distill_bench.draws import Draws
from distill_bench.method import Batch, Denoise
from distill_bench.noise import Stepping, add_noise
from distill_bench.rollout import rollout
from distill_bench.teachers.embeddings import Texts
from distill_bench.train.processes import Processes


def needs_of(config: RunConfig) -> frozenset[str]:
    """Extra data by name: the method's needs, and real latents if the student starts from them."""
    needs = method_of(config).needs
    return needs | {"real_latents"} if config.student_input == "real_data" else needs


def exits(config: RunConfig) -> list[int]:
    """Steps at which a rollout may end in training."""
    return list(range(config.nfe)) if config.exit_step == "random" else [config.nfe - 1]


@dataclass(frozen=True)
class Rows:
    """Extra data: rows of tensors (N, ...), each with its text, `texts[text_of_row[i]]`."""

    purpose: str  # key of the draws
    tensors: Mapping[str, Tensor]
    texts: Texts
    text_of_row: Sequence[int]

    def __call__(self, draws: Draws) -> dict[str, Tensor]:
        """The rows that a batch draws, each equally likely: tensors (B, ...) and `text`."""
        drawn = draws.integers(self.purpose, len(self.text_of_row))
        rows = {name: tensor[drawn] for name, tensor in self.tensors.items()}
        rows["text"] = self.texts.rows(self.text_of_row[i] for i in drawn)
        return {name: row.to(draws.device, draws.dtype) for name, row in rows.items()}

    def every(self) -> dict[str, Tensor]:
        """All rows: tensors (N, ...) and `text` (N, L, D)."""
        return {**self.tensors, "text": self.texts.rows(self.text_of_row)}


Extras = Mapping[str, Callable[[Draws], dict[str, Tensor]]]


@dataclass(frozen=True)
class ExitStep:
    """The step at which a batch's rollout ends, the same on every rank and in every micro-batch."""

    sigmas: Tensor  # noise levels of the student's steps, high to low
    steps: Sequence[int]
    first: int = 0  # earliest exit step in the student's phase

    def step(self, batch: Batch) -> int:
        """Index of the exit step."""
        steps = self.steps
        if batch.draws.phase == "student":
            steps = [step for step in steps if step >= self.first]
        return steps[batch.draws.shared_integer("exit", len(steps))]

    def sigma(self, batch: Batch) -> Tensor:
        """Noise level (B,) of the exit step."""
        return self.sigmas[self.step(batch)].expand(len(batch.text))


@dataclass(frozen=True)
class OwnRollout:
    """`student_input: rollout`: the student's steps from noise to the exit step."""

    student: Denoise
    exit_step: ExitStep
    stepping: Stepping
    texts: Texts
    data: ClassVar[None] = None

    def text(self, draws: Draws, _extras: Extras) -> Tensor:
        """Text embeddings (B, L, D) of the prompts that a batch draws."""
        return self.texts.rows(draws.integers("prompt", len(self.texts)))

    def samples(self, batch: Batch) -> Tensor:
        """The student's samples (B, C, T, H, W), differentiable at the exit step."""
        steps = self.exit_step.step(batch) + 1
        fresh = 1 if self.stepping == "ode" else steps  # an ODE rollout reads its first noise alone
        noises = [batch.noise(f"rollout/{step}") for step in range(fresh)]
        noises += noises[:1] * (steps - fresh)
        return rollout(
            self.student,
            noises,
            self.exit_step.sigmas,
            batch.text,
            self.stepping,
            torch.is_grad_enabled(),
        )


@dataclass(frozen=True)
class NoisedData:
    """`student_input: real_data`: one prediction from real latents, noised to the exit level."""

    student: Denoise
    exit_step: ExitStep
    data: Rows

    def text(self, draws: Draws, extras: Extras) -> Tensor:
        return extras["real_latents"](draws)["text"]

    def samples(self, batch: Batch) -> Tensor:
        real = batch.extra("real_latents")["x0"]
        sigma = self.exit_step.sigma(batch)
        return self.student(add_noise(real, batch.noise("rollout/0"), sigma), sigma, batch.text)


StudentInput = OwnRollout | NoisedData


@dataclass(frozen=True)
class Batches:
    """Makes the micro-batches of this rank; draws are keyed by the global sample index."""

    config: RunConfig
    processes: Processes
    text: Callable[[Draws, Extras], Tensor]
    latent_shape: tuple[int, ...]  # (C, T, H, W)
    dtype: torch.dtype
    extras: Mapping[str, Rows]
    draws: type[Draws] = Draws

    def batch(self, student_updates: int, phase: str, micro: int) -> Batch:
        """Micro-batch `micro` of a phase ("student", "fake_score/0", ...)."""
        share = self.config.batch_size // (self.processes.world * self.config.accumulation)
        first = (micro * self.processes.world + self.processes.rank) * share
        return self.drawn(student_updates, phase, range(first, first + share))

    def drawn(self, student_updates: int, phase: str, indices: Sequence[int]) -> Batch:
        """The batch of the given global sample indices."""
        draws = self.draws(
            self.config.seed, student_updates, phase, indices, self.processes.device, self.dtype
        )
        # a batch's text, samples and losses may all ask for its rows
        extras = {need: functools.cache(rows) for need, rows in self.extras.items()}
        return Batch(
            self.text(draws, extras),
            draws,
            self.latent_shape,
            self.config.score_shift,
            self.config.sigma_min,
            self.config.sigma_max,
            extras,
            self.config.score_levels == "batch",
        )
