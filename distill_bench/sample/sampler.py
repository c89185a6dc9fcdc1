"""Draws a student's and its teacher's clips from the same prompts, seeds and starting noise."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distill_bench.config.rows.sampling import Sampling, own_sampling, teacher_sampling
from distill_bench.config.schema import ProtocolConfig, RunConfig
from distill_bench.draws import generator
from distill_bench.networks.denoiser import Denoiser, Guided
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.offload import place
from distill_bench.networks.pipeline import CLIPS_PER_BATCH, clips_per_batch, pipeline_of
from distill_bench.networks.precision import cast
from distill_bench.networks.ranks import ranks, set_threads
from distill_bench.noise import student_sigmas
from distill_bench.rollout import euler, rollout
from distill_bench.sample.write_folder import ClipSource
from distill_bench.teachers.experts import guidance_of
from distill_bench.teachers.kinds import Pipeline
from distill_bench.teachers.prompts import read_seeds

# (noise of each step, (B, C, T, H, W) each; text (B, L, D)) -> latents (B, C, T, H, W)
Latents = Callable[[list[Tensor], Tensor], Tensor]


class Sampler:
    """Draws clips for the prompts and seeds of a protocol.

    `student`, `teacher` and `data` give sources of clips; `student_latents` and `teacher_latents`
    draw latents from given noise.
    """

    def __init__(
        self,
        config: RunConfig,
        store: Path | None = None,
        *,
        pipeline: Pipeline | None = None,
        prompts: Sequence[str] | None = None,
    ) -> None:
        """Load the run's pipeline and choose the protocol's prompts, unless they are given."""
        set_threads(config.threads)
        self.config = config
        self.pipeline = pipeline or pipeline_of(config, ranks().device, store)
        self.device = self.pipeline.device
        self.dtype = getattr(torch, config.protocol.precision)
        self.shape = self.pipeline.latent_shape(config.frames, config.height, config.width)
        if prompts is None:
            self.prompts, self.seeds = protocol_clips(config, self.pipeline.prompts())
        else:
            self.prompts = list(prompts)
            self.seeds = [config.protocol.seed + i for i in range(len(prompts))]
        negative_prompt = config.protocol.negative_prompt
        self.texts = self.pipeline.texts(self.prompts, negative_prompt=negative_prompt)

    def placed(self, net: nn.Module, offload: bool = False) -> nn.Module:
        """Cast a network to the sampling precision and move it to the device.

        Args:
            offload: keep its blocks in host memory.
        """
        if self.dtype != torch.float32:
            cast(net, self.dtype)
        return place(net, self.device, offload)

    def student(self, net: nn.Module, sampling: Sampling | None = None) -> ClipSource:
        """Clips from a student's rollout; `sampling` None: as the run's own."""
        sampling = sampling or own_sampling(self.config)
        latents, facts = self.student_latents(net, sampling), self.facts(net, sampling)
        return self._clips(self.seeds, latents, sampling.nfe, facts)

    def student_latents(self, net: nn.Module, sampling: Sampling | None = None) -> Latents:
        """Rollout of a student from given noise; `sampling` None: as the run's own."""
        sampling = sampling or own_sampling(self.config)
        denoiser = self._guided(net, "student", sampling.guidance_scale)
        sigmas, stepping = levels(sampling).to(self.device), sampling.stepping
        return lambda noises, text: rollout(denoiser, noises, sigmas, text, stepping)

    def facts(
        self, net: nn.Module | None = None, sampling: Sampling | None = None
    ) -> dict[str, np.ndarray]:
        """Exact knowledge of a network's clips, or of a row of none (`Pipeline.facts`)."""
        way = sampling or own_sampling(self.config)
        target = self.config.protocol.teacher_guidance
        return self.pipeline.facts(net, levels(way), way.stepping, target, way.guidance_scale)

    def data(self, seeds: list[int]) -> ClipSource:
        """Real clips of the prompts; a seed selects the clip."""

        def frames(first: int, end: int) -> np.ndarray:
            return self.pipeline.clips(self.prompts[first:end], seeds[first:end])

        return ClipSource(frames, CLIPS_PER_BATCH, facts=self.facts())

    def teacher(self, steps: int, seeds: list[int]) -> ClipSource:
        """Clips of the guided teacher, sampled as the protocol says, in a number of steps."""
        return self.sampled_teacher(teacher_sampling(self.config, steps), seeds)

    def sampled_teacher(self, sampling: Sampling, seeds: list[int] | None = None) -> ClipSource:
        """Clips of the guided teacher, sampled in any way; `seeds` None: those of the protocol."""
        steps = 1 if sampling.stepping == "ode" else sampling.nfe  # that draw noise
        latents, facts = self.teacher_latents(sampling), self.facts(self.teacher_net, sampling)
        return self._clips(seeds or self.seeds, latents, steps, facts)

    def teacher_latents(self, sampling: Sampling) -> Latents:
        """Steps of the guided teacher from given noise; an ODE needs the first noise only."""
        guided = self._guided(self.teacher_net, "teacher", sampling.guidance_scale)
        sigmas, stepping = levels(sampling).to(self.device), sampling.stepping
        if stepping == "ode":  # Euler steps to level 0, as in diffusers
            down = torch.cat([sigmas, sigmas.new_zeros(1)])
            return lambda noises, text: euler(guided, noises[0], down, text)
        return lambda noises, text: rollout(guided, noises, sigmas, text, stepping)

    @cached_property
    def teacher_net(self) -> nn.Module:
        """The teacher's network, placed for sampling."""
        return self.placed(self.pipeline.transformer, self.config.teacher_offload)

    def _denoiser(self, net: nn.Module, role: str) -> Denoiser:
        autocast = None if self.dtype == torch.float32 else self.dtype
        return Denoiser(net, role, Ledger(1), autocast=autocast)

    def _guided(
        self, net: nn.Module, role: str, guidance_scale: float | Mapping[str, float]
    ) -> Guided:
        denoiser, batched = self._denoiser(net, role), self.config.guidance_forwards == "batched"
        scale = guidance_of(guidance_scale, self.config.teacher, net)
        return Guided(denoiser, self.texts.null_text, scale, batched)

    def _clips(
        self, seeds: list[int], latents: Latents, steps: int, facts: Mapping[str, np.ndarray]
    ) -> ClipSource:
        @torch.no_grad()
        def frames(first: int, end: int) -> np.ndarray:
            noises = self._noises(seeds[first:end], steps)
            text = self.texts.rows(range(first, end))
            return self.pipeline.decode(latents(noises, text)).numpy()

        # only released models have a frame rate, and their clips are large enough to watch
        videos = self.pipeline.fps is not None
        return ClipSource(frames, clips_per_batch(self.config), videos=videos, facts=facts)

    def _noises(self, seeds: list[int], steps: int) -> list[Tensor]:
        """Noise (B, C, T, H, W) of each step; every row starts from the first."""
        return [
            torch.stack([self._noise(seed, step) for seed in seeds]).to(self.device)
            for step in range(steps)
        ]

    def _noise(self, seed: int, step: int) -> Tensor:
        return self.pipeline.draw(self.shape, step, generator("sample", seed, step))


def levels(sampling: Sampling) -> Tensor:
    """The noise levels of a way of sampling, high to low, (nfe,)."""
    if sampling.sigmas is not None:
        return torch.tensor(sampling.sigmas)
    return student_sigmas(sampling.nfe, sampling.shift)


def protocol_clips(config: RunConfig, known: Sequence[str]) -> tuple[list[str], list[int]]:
    """Prompt and seed of each of a protocol's clips.

    Args:
        config: a resolved run.
        known: its prompts.
    """
    order, repeats = protocol_order(len(known), config.protocol)
    return [known[i] for i in order], protocol_seeds(config, order, repeats)


def protocol_order(count: int, protocol: ProtocolConfig) -> tuple[list[int], list[int]]:
    """Prompt of each of a protocol's clips, in an order drawn from its seed.

    Args:
        count: number of prompts.
        protocol: its `clips` are spread evenly over as many prompts as `clips_per_prompt` needs.

    Returns:
        Per clip: the index of its prompt, and the number of earlier clips of that prompt.
    """
    order = torch.randperm(count, generator=generator("protocol", protocol.seed)).tolist()
    distinct = min(count, math.ceil(protocol.clips / protocol.clips_per_prompt))
    clips = range(protocol.clips)
    return [order[i % distinct] for i in clips], [i // distinct for i in clips]


def protocol_seeds(config: RunConfig, order: Sequence[int], repeats: Sequence[int]) -> list[int]:
    """Seed of each of a protocol's clips: that of its prompt's file, or else the protocol's.

    Clip number k of a prompt with the seed s has seed s + k. Clip number i of a protocol with the
    seed p has seed p + i.

    Args:
        config: a resolved run.
        order: per clip, the index of its prompt in the run's file.
        repeats: per clip, the number of earlier clips of its prompt.
    """
    stated = {} if config.prompts is None else dict(enumerate(read_seeds(Path(config.prompts))))
    seeds = []
    for i, (prompt, repeat) in enumerate(zip(order, repeats, strict=True)):
        first = stated.get(prompt)
        seeds.append(config.protocol.seed + i if first is None else first + repeat)
    return seeds
