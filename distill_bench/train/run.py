"""A run in training: its networks, its two phases and its progress."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from distill_bench.config.schema import RunConfig
from distill_bench.method import Batch, Denoise, Loss, Method, Nets
from distill_bench.networks.ledger import Ledger
from distill_bench.teachers.kinds import Pipeline
from distill_bench.train.average import Average
from distill_bench.train.inputs import Batches, StudentInput
from distill_bench.train.phase import Phase, Scalars
from distill_bench.train.processes import Processes
from distill_bench.train.reuse import Reuse, Samples


@dataclass
class Run:
    """State of a run in training; `student_updates` and `seconds` measure its progress.

    Attributes:
        pipeline: the teacher's pipeline.
        nets: the roles as denoisers, as a method sees them.
        networks: the networks that some phase trains, by role; "modules" are the method's own.
        trained: the same roles as optimisers, average and checkpoints see them: the networks or
            their float32 masters.
        fake_score: the fake score's phase; None if the run trains none.
        exact_fake_score: the fake score in closed form; None if the teacher offers none.
        scalars: the newest values for the log.
    """

    config: RunConfig
    method: Method
    pipeline: Pipeline
    processes: Processes
    ledger: Ledger
    nets: Nets
    networks: Mapping[str, nn.Module]
    trained: Mapping[str, nn.Module]
    optimisers: Mapping[str, torch.optim.Optimizer]
    batches: Batches
    student_input: StudentInput
    reuse: Reuse
    average: Average
    student: Phase
    fake_score: Phase | None
    exact_fake_score: Denoise | None
    student_updates: int = 0
    seconds: float = 0.0
    scalars: Scalars = field(default_factory=dict)

    @property
    def fake_score_updates(self) -> int:
        """Fake-score updates per student update; 0 if no fake score is trained."""
        return self.config.fake_score_updates or 0

    def batch(self, phase: str, micro: int = 0) -> Batch:
        """Micro-batch of this rank in a phase ("student", "fake_score/0", ...) of this update."""
        return self.batches.batch(self.student_updates, phase, micro)

    def student_losses(self, kept: list[Samples | None]) -> Iterator[Loss]:
        """The student's loss on each micro-batch; appends to `kept` the samples to reuse."""
        for micro in range(self.config.accumulation):
            batch = self.batch("student", micro)
            loss = self.reuse.student_loss(batch)
            kept.append(self.reuse.kept(batch, loss))
            yield loss

    def fake_score_losses(self, index: int, kept: Sequence[Samples | None] = ()) -> Iterator[Loss]:
        """The fake score's loss on each micro-batch of its update `index`.

        Args:
            kept: samples to reuse; empty: make new rollouts.
        """
        for micro, samples in enumerate(kept or [None] * self.config.accumulation):
            yield self.reuse.fake_score_loss(self.batch(f"fake_score/{index}", micro), samples)

    def update_student(self) -> list[Samples | None]:
        """Make one optimiser step of the student; returns samples that the fake score may reuse."""
        kept: list[Samples | None] = []
        self.scalars |= self.student.step(self.student_losses(kept))
        return kept

    @torch.no_grad()
    def after_student_update(self) -> None:
        """Call the method's hook, then update the student's moving average."""
        self.method.after_student_update(self.trained)
        self.reuse.publish(self.trained)
        self.average.update()

    def update_fake_score(self, index: int, kept: Sequence[Samples | None] = ()) -> None:
        """Make one optimiser step of the fake score and the method's modules.

        Args:
            kept: samples to reuse; empty: make new rollouts.
        """
        self.scalars |= self.fake_score.step(self.fake_score_losses(index, kept))
