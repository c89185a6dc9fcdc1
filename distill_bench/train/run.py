"""A run in training: its networks, its two phases and its progress."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

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

    def batch(self, phase: str, micro: int = 0, text: Tensor | None = None) -> Batch:
        """Micro-batch of this rank in a phase ("student", "fake_score/0", ...) of this update.

        Args:
            text: as for `Batches.batch`.
        """
        return self.batches.batch(self.student_updates, phase, micro, text)

    def student_losses(self, kept: list[Samples | None]) -> Iterator[Loss]:
        """The student's loss on each micro-batch; appends to `kept` the samples to reuse."""
        for micro in range(self.config.accumulation):
            batch = self.batch("student", micro)
            loss = self.reuse.student_loss(batch)
            kept.append(self.reuse.kept(batch, loss))
            yield loss

    def fake_score_samples(self, kept: list[Samples | None]) -> Iterator[Sequence[Samples | None]]:
        """The samples of each fake-score update, by micro-batch; empty: the update makes them.

        Batched rollouts are made when the first update asks for them: the student does not change
        until its next update.

        Args:
            kept: from `update_student`: samples that the first update may reuse, and that are then
                freed.
        """
        reused = any(kept)
        if reused:
            yield kept
            kept.clear()
        own = range(int(reused), self.fake_score_updates)
        if self.config.fake_score_rollouts == "batched":
            micros = range(self.config.accumulation)
            yield from zip(*(self._joint_samples(own, micro) for micro in micros), strict=True)
        else:
            yield from ([] for _ in own)

    @torch.no_grad()
    def _joint_samples(self, updates: Sequence[int], micro: int) -> list[Samples]:
        """Samples of one micro-batch of several fake-score updates, from rollouts in one batch."""
        batches = [self.batch(f"fake_score/{index}", micro) for index in updates]
        x0 = self.student_input.joint_samples(batches)
        return [Samples(x0, batch.text) for x0, batch in zip(x0, batches, strict=True)]

    def fake_score_losses(
        self, index: int, samples: Sequence[Samples | None] = ()
    ) -> Iterator[Loss]:
        """The fake score's loss on each micro-batch of its update `index`.

        Args:
            samples: by micro-batch; empty: make new rollouts.
        """
        for micro, own in enumerate(samples or [None] * self.config.accumulation):
            text = None if own is None else own.text
            batch = self.batch(f"fake_score/{index}", micro, text)
            yield self.reuse.fake_score_loss(batch, own)

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

    def update_fake_score(self, index: int, samples: Sequence[Samples | None] = ()) -> None:
        """Make one optimiser step of the fake score and the method's modules.

        Args:
            samples: as for `fake_score_losses`.
        """
        self.scalars |= self.fake_score.step(self.fake_score_losses(index, samples))
