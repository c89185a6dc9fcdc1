"""Clips of a run and of the rows that every table has beside it, from the same prompts and seeds.

`sample(run_dir)` draws the student's clips; `references(config, store)` the rows to hold them
against. A folder of clips is `clips.npy` (uint8, (N, T, 3, H, W)) with `manifest.jsonl` (index,
prompt, seed) and `row.json` (kind, fps), and for a teacher with an autoencoder of its own
`videos/*.mp4`; a folder that is there is done.

    torchrun --nproc_per_node 8 -m distill_bench.sample RUN    ranks share the clips

Clips are kept as they are made, in `.parts-<name>` beside the folder, so that a row goes on where
it was stopped. What is drawn together is the same however often it is stopped and however many
ranks there are, so that no bit depends on either.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill_bench.config.schema import ProtocolConfig, RunConfig
from distill_bench.draws import generator
from distill_bench.networks.denoiser import Denoiser, Guided
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.offload import place
from distill_bench.networks.pipeline import clips_per_batch, pipeline_of
from distill_bench.networks.precision import cast
from distill_bench.networks.ranks import ranks
from distill_bench.noise import student_sigmas, teacher_sigmas
from distill_bench.rollout import euler, rollout
from distill_bench.sample.write_folder import ClipSource
from distill_bench.teachers.kinds import Pipeline

Latents = Callable[
    [list[Tensor], Tensor], Tensor
]  # of noises, one (B, C, T, H, W) a step, and text (B, L, D): (B, C, T, H, W)


class Sampler:
    """The prompts, seeds and starting noises of a protocol; every row begins from the same noise."""

    def __init__(
        self,
        config: RunConfig,
        store: Path | None = None,
        *,
        pipeline: Pipeline | None = None,
        prompts: Sequence[str] | None = None,
    ) -> None:
        """Load the run's pipeline and choose the protocol's prompts, unless they are given."""
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.pipeline = pipeline or pipeline_of(config, ranks().device, store)
        self.device = self.pipeline.device
        self.dtype = getattr(torch, config.protocol.precision)
        self.shape = self.pipeline.latent_shape(config.frames, config.height, config.width)
        self.prompts = list(prompts or protocol_prompts(self.pipeline.prompts(), config.protocol))
        self.seeds = [config.protocol.seed + i for i in range(len(self.prompts))]
        self.texts = self.pipeline.texts(self.prompts)

    def placed(self, net: torch.nn.Module, offload: bool = False) -> torch.nn.Module:
        """The network where and in which precision it samples; with `offload` its blocks in host memory."""
        if self.dtype != torch.float32:
            cast(net, self.dtype)
        return place(net, self.device, offload)

    def student(self, net: torch.nn.Module) -> ClipSource:
        """Clips in the student's own steps, without guidance."""
        return self._clips(self.seeds, self.student_latents(net))

    def student_latents(self, net: torch.nn.Module) -> Latents:
        """The student's rollout from given noises."""
        denoiser = self._denoiser(net, "student")
        sigmas = student_sigmas(self.config.nfe, self.config.shift).to(self.device)
        return lambda noises, text: rollout(denoiser, noises, sigmas, text, self.config.stepping)

    def facts(self, net: torch.nn.Module) -> dict[str, np.ndarray]:
        """What the teacher's kind knows exactly of the student's distribution; for a network of unknown density nothing."""
        sigmas = student_sigmas(self.config.nfe, self.config.shift)
        return self.pipeline.facts(
            net, sigmas, self.config.stepping, self.config.protocol.teacher_guidance
        )

    def teacher(self, steps: int, seeds: list[int]) -> ClipSource:
        """Clips by `steps` Euler steps of the guided teacher."""
        return self._clips(seeds, self.teacher_latents(steps))

    def teacher_latents(self, steps: int) -> Latents:
        """`steps` Euler steps of the guided teacher from the first of the given noises."""
        guided = Guided(
            self._denoiser(self.teacher_net, "teacher"),
            self.texts.null_text,
            self.config.protocol.teacher_guidance,
            self.config.guidance_forwards == "batched",
        )
        sigmas = teacher_sigmas(steps, self.config.shift).to(self.device)
        return lambda noises, text: euler(guided, noises[0], sigmas, text)

    @cached_property
    def teacher_net(self) -> torch.nn.Module:
        """The teacher's network, placed to sample."""
        return self.placed(self.pipeline.transformer, self.config.teacher_offload)

    def _denoiser(self, net: torch.nn.Module, role: str) -> Denoiser:
        return Denoiser(
            net, role, Ledger(1), autocast=None if self.dtype == torch.float32 else self.dtype
        )

    def noise(self) -> np.ndarray:
        """Uniform noise frames (N, T, 3, H, W): the known-bad row."""
        config, n = self.config, len(self.seeds)
        rng = np.random.default_rng(config.protocol.seed)
        return rng.integers(
            0, 256, (n, config.frames, 3, config.height, config.width), dtype=np.uint8
        )

    def _clips(self, seeds: list[int], latents: Latents) -> ClipSource:
        def frames(first: int, end: int) -> np.ndarray:
            return self._drawn(seeds[first:end], range(first, end), latents).numpy()

        return ClipSource(
            frames, clips_per_batch(self.config), videos=self.pipeline.fps is not None
        )

    @torch.no_grad()
    def _drawn(self, seeds: list[int], which: Iterable[int], latents: Latents) -> Tensor:
        """Frames uint8 (B, T, 3, H, W) of these prompts."""
        return self.pipeline.decode(latents(self._noises(seeds), self.texts.rows(which)))

    def _noises(self, seeds: list[int]) -> list[Tensor]:
        """Noise (B, C, T, H, W) for each of the student's steps; the first is where a row begins."""
        return [
            torch.stack([self._noise(seed, step) for seed in seeds]).to(self.device)
            for step in range(self.config.nfe)
        ]

    def _noise(self, seed: int, step: int) -> Tensor:
        return self.pipeline.draw(self.shape, step, generator("sample", seed, step))


def protocol_prompts(known: Sequence[str], protocol: ProtocolConfig) -> list[str]:
    """The prompts that a protocol samples, in a random order of its seed: two clips per prompt.

    Clips of one prompt must differ, and that is scored.
    """
    order = torch.randperm(len(known), generator=generator("protocol", protocol.seed)).tolist()
    distinct = min(len(known), math.ceil(protocol.clips / 2))
    return [known[order[i % distinct]] for i in range(protocol.clips)]
