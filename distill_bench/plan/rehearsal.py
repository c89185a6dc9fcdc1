"""What a run will need, before anything of it exists: peak memory by role and the step's FLOPs, from the teacher's configs alone.

The trainer's own phases are rehearsed on fake tensors (shapes without data), and what is alive at their worst moment is counted:
the method's code, the run's settings and the architecture decide, no formula of ours. `distill-bench cost SWEEP --memory`
shows it; a training on a GPU that has less ends before its first step.

Not counted: what `compile` saves, what a kernel holds inside, the allocator's rounding and fragments, the text encoder (gone by
the first step), and the teacher's samples, where a method needs such data. Drawing a run's clips is rehearsed likewise:
`sampling_peak`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distill_bench.config.schema import RunConfig
from distill_bench.draws import Draws
from distill_bench.method import Batch, Loss
from distill_bench.networks.pipeline import clips_per_batch
from distill_bench.networks.precision import Masters
from distill_bench.plan.fake import FakeDraws, LiveBytes, device_bytes, held_back_bytes, total_bytes
from distill_bench.plan.outline import outline
from distill_bench.plan.prediction import MOMENTS, Prediction
from distill_bench.sample.sampler import Latents, Sampler
from distill_bench.teachers.architectures import architecture_called
from distill_bench.teachers.kinds import Pipeline
from distill_bench.train.extras import needs_of
from distill_bench.train.trainer import Trainer, trained_in

FEW_FRAMES = (
    3,
    5,
)  # latent ones; the first of a clip is one of its own kind, and CogVideoX decodes two at a time


class Rehearsal(Trainer):
    """A trainer on fake tensors: its phases run forwards and backwards, and no optimiser steps."""

    def __init__(self, config: RunConfig, layers: tuple[int, int], processes: int) -> None:
        self.layers, self.processes, self.live = layers, processes, LiveBytes()
        self.stages: dict[str, tuple[int, ...]] = {}
        super().__init__(Path("rehearsal"), config)

    def _place(self) -> tuple[int, int, torch.device]:
        return self.processes, 0, torch.device("cpu")

    def _pipeline(self) -> Pipeline:
        self.outline = outline(self.config, self.layers)
        return self.outline

    def _extras(self, pipeline: Pipeline) -> dict[str, Callable[[Draws], dict[str, Tensor]]]:
        text = pipeline.encode_text([""])

        def rows(draws: Draws) -> dict[str, Tensor]:
            n = len(draws.indices)
            x0, noise = (torch.empty(n, *self.latent_shape, dtype=self.dtype) for _ in range(2))
            return {"x0": x0, "noise": noise, "text": text.expand(n, -1, -1).to(self.dtype)}

        return dict.fromkeys(needs_of(self.config), rows)

    def _batch_of(self, draws: Draws) -> Batch:
        return super()._batch_of(
            FakeDraws(**{f.name: getattr(draws, f.name) for f in dataclasses.fields(draws)})
        )

    def _exit_step(self, batch: Batch) -> int:
        return 0  # the steps before the exit keep nothing

    def _update(self, role: str, phase: str, loss_of: Callable[[Batch, int], Loss]) -> None:
        count, self.live.peaks = self.ledger.add, [self.live.now]

        def add(*passed: object) -> None:
            self.live.mark()
            count(*passed)

        self.ledger.add = add
        self._backward(role, phase, loss_of)
        self.ledger.add, self.stages[role] = count, tuple(self.live.peaks)
        for name, optimiser in self.optimisers.items():
            if trained_in(role, name):
                optimiser.zero_grad(set_to_none=True)

    def prediction(self) -> Prediction:
        """Run both phases and add up."""
        config = self.config
        with self.live:
            samples = self.update_student()
            if self.fake_score is not None:
                self.update_fake_score(0, samples if config.reuse_rollout else None)
            del samples
        base = {"teacher": self.nets.unguided_teacher.net}
        nets = {"student": self.student, "fake_score": self.fake_score} | base
        weights = {role: device_bytes(net) for role, net in nets.items() if net is not None}
        roles = {role: net for role, net in self.trained.items() if role != "modules"}
        trained = {role: total_bytes(net.parameters()) for role, net in roles.items()}
        masters = {
            role: trained[role]
            - total_bytes(
                p for p in net.parameters() if any(p is q for q in nets[role].parameters())
            )
            if isinstance(net, Masters)
            else 0
            for role, net in roles.items()
        }
        heads = total_bytes(self.modules.parameters())
        vae = self.outline.vae
        other = (
            total_bytes([self.texts.null_text])
            + (0 if vae is None else total_bytes(vae.parameters()))
            + (1 + MOMENTS) * heads
        )
        gradients = {
            "student": trained["student"],
            "fake_score": trained.get("fake_score", 0) + heads,
        }
        flops = {
            role: self.ledger.flops.get(role, self.ledger.flops["student"])
            for role in ("student", "fake_score", "teacher")
        }
        flops["target"] = flops["student"]
        return Prediction(
            weights=weights,
            masters=masters,
            gradients={role: gradients[role] for role in self.stages},
            moments={role: MOMENTS * size for role, size in trained.items()},
            ema=total_bytes(self.ema.values()),
            other=other,
            stages=self.stages,
            flops=flops,
            held_back=held_back_bytes(base["teacher"]),
        )

    def in_flight(self) -> int:
        """Bytes of what FSDP has whole at once: of a role two blocks, one at work and the next, and of one that is trained the
        gradients of one, and these again in float32 where they are reduced.
        """
        most = 0
        for role, net in (("teacher", self.nets.unguided_teacher.net), *self.roles.items()):
            if role == "modules":
                continue
            blocks = [list(block.parameters()) for block in architecture_called(net).blocks(net)]
            inside = {parameter for block in blocks for parameter in block}
            parts = [
                *blocks,
                [parameter for parameter in net.parameters() if parameter not in inside],
            ]
            size, wide = (
                max(map(of, parts))
                for of in (total_bytes, lambda part: sum(4 * p.numel() for p in part))
            )
            most = max(most, 2 * size if role == "teacher" else 3 * size + max(size, wide))
        return most


class RehearsedSampler(Sampler):
    """A sampler on fake tensors: what it would draw together is drawn once, and what is alive meanwhile counted."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.device, self.dtype = (
            config,
            torch.device("cpu"),
            getattr(torch, config.protocol.precision),
        )
        self.pipeline = outline(config)
        self.shape = self.pipeline.latent_shape(config.frames, config.height, config.width)
        self.seeds = list(range(min(clips_per_batch(config), config.protocol.clips)))
        self.texts = self.pipeline.texts([""] * len(self.seeds))

    def peak(self) -> int:
        """The most bytes at once on the device: of the student's rows or of the teacher's."""
        vae, decoding = self.pipeline.vae, self._decoding()
        beside = total_bytes([self.texts.null_text]) + (
            0 if vae is None else total_bytes(vae.parameters())
        )
        student = self.placed(self.pipeline.student())
        drawing = {student: self.student(student), self._teacher.net: self.teacher(1, self.seeds)}
        return beside + max(
            device_bytes(net) + max(passes, decoding) for net, passes in drawing.items()
        )

    def _clips(self, seeds: list[int], latents: Latents) -> int:
        return self._most(lambda: latents(self._noises(seeds), self.texts.rows(range(len(seeds)))))

    def _decoding(self) -> int:
        """Of many latent frames by few: beyond these each needs as much more."""
        channels, frames, *size = self.shape

        def at(some: int) -> int:
            latents = torch.empty(len(self.seeds), channels, some, *size)
            return self._most(lambda: self.pipeline.decode(latents))

        few, more = FEW_FRAMES
        return (
            at(frames)
            if frames <= more
            else at(few) + (at(more) - at(few)) * (frames - few) // (more - few)
        )

    @torch.no_grad()
    def _most(self, do: Callable[[], object]) -> int:
        with LiveBytes() as live:
            do()
        return max(live.peaks)

    def _noise(self, seed: int, step: int) -> Tensor:
        return torch.empty(*self.shape)
