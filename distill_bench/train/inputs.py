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
        return self.joint_samples([batch])[0]

    def joint_samples(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Samples of each batch; the batches make every step that they share in one forward."""
        steps = [self.exit_step.step(batch) + 1 for batch in batches]
        order = sorted(range(len(batches)), key=steps.__getitem__, reverse=True)
        noises: list[Tensor] = []
        for step in range(max(steps)):
            going = [batches[i] for i in order if step < steps[i]]
            if noises and self.stepping == "ode":  # reads its first noise alone
                noises.append(noises[0][: sum(len(batch.text) for batch in going)])
            else:
                noises.append(_joined([batch.noise(f"rollout/{step}") for batch in going]))
        x0 = rollout(
            self.student,
            noises,
            self.exit_step.sigmas,
            _joined([batches[i].text for i in order]),
            self.stepping,
            torch.is_grad_enabled(),
        )
        samples = dict(zip(order, _parts(x0, len(batches)), strict=True))
        return [samples[i] for i in range(len(batches))]


@dataclass(frozen=True)
class NoisedData:
    """`student_input: real_data`: one prediction from real latents, noised to the exit level."""

    student: Denoise
    exit_step: ExitStep
    data: Rows

    def text(self, draws: Draws, extras: Extras) -> Tensor:
        return extras["real_latents"](draws)["text"]

    def samples(self, batch: Batch) -> Tensor:
        return self.joint_samples([batch])[0]

    def joint_samples(self, batches: Sequence[Batch]) -> list[Tensor]:
        real = _joined([batch.extra("real_latents")["x0"] for batch in batches])
        noise = _joined([batch.noise("rollout/0") for batch in batches])
        sigma = _joined([self.exit_step.sigma(batch) for batch in batches])
        text = _joined([batch.text for batch in batches])
        return _parts(self.student(add_noise(real, noise, sigma), sigma, text), len(batches))


StudentInput = OwnRollout | NoisedData


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _parts(rows: Tensor, count: int) -> Sequence[Tensor]:
    return [rows] if count == 1 else rows.chunk(count)


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

    def batch(
        self, student_updates: int, phase: str, micro: int, text: Tensor | None = None
    ) -> Batch:
        """Micro-batch `micro` of a phase ("student", "fake_score/0", ...).

        Args:
            text: of samples that exist already, (B, L, D); None: of prompts that the batch draws.
        """
        share = self.config.batch_size // (self.processes.world * self.config.accumulation)
        first = (micro * self.processes.world + self.processes.rank) * share
        return self.drawn(student_updates, phase, range(first, first + share), text)

    def drawn(
        self,
        student_updates: int,
        phase: str,
        indices: Sequence[int],
        text: Tensor | None = None,
    ) -> Batch:
        """The batch of the given global sample indices; `text` as for `batch`."""
        draws = self.draws(
            self.config.seed, student_updates, phase, indices, self.processes.device, self.dtype
        )
        # a batch's text, samples and losses may all ask for its rows
        extras = {need: functools.cache(rows) for need, rows in self.extras.items()}
        return Batch(
            self.text(draws, extras) if text is None else text,
            draws,
            self.latent_shape,
            self.config.score_shift,
            self.config.sigma_min,
            self.config.sigma_max,
            extras,
            self.config.score_levels == "batch",
        )
