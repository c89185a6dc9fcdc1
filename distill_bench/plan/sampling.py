"""Rehearses the sampling of a run's clips and their references on fake tensors."""

from collections.abc import Callable

import torch

from distill_bench.config.schema import RunConfig
from distill_bench.networks.pipeline import clips_per_batch
from distill_bench.plan.fake import fake_tensors
from distill_bench.plan.live_bytes import LiveBytes, device_bytes, total_bytes
from distill_bench.plan.outline import outline
from distill_bench.sample.sampler import Latents, Sampler

# Latent frames from which decoding is extrapolated: the first frame of a clip is decoded
# differently from the others, and CogVideoX decodes two at a time.
FEW_FRAMES = (3, 5)


def sampling_peak(config: RunConfig) -> int:
    """Peak bytes on one device while clips of the student or the teacher are sampled."""
    with fake_tensors():
        clips = min(clips_per_batch(config), config.protocol.clips)
        config = config.model_copy(update={"threads": None})
        sampler = Sampler(config, pipeline=outline(config), prompts=[""] * clips)
        vae = sampler.pipeline.vae
        held = total_bytes([sampler.texts.null_text])
        held += 0 if vae is None else total_bytes(vae.parameters())
        decoding = _decoding_peak(sampler)
        student = sampler.placed(sampler.pipeline.student())
        rows = {student: sampler.student_latents(student)}
        rows[sampler.teacher_net] = sampler.teacher_latents(1)
        return held + max(
            device_bytes(net) + max(_drawing_peak(sampler, latents), decoding)
            for net, latents in rows.items()
        )


def _drawing_peak(sampler: Sampler, latents: Latents) -> int:
    """Peak live bytes while the latents of one batch of clips are drawn."""
    clips = len(sampler.prompts)

    def draw() -> None:
        noises = [torch.empty(clips, *sampler.shape) for _ in range(sampler.config.nfe)]
        latents(noises, sampler.texts.rows(range(clips)))

    return _peak(draw)


def _decoding_peak(sampler: Sampler) -> int:
    """Peak live bytes while one batch is decoded; extrapolated linearly to many frames."""
    channels, frames, *size = sampler.shape

    def peak(decoded: int) -> int:
        latents = torch.empty(len(sampler.prompts), channels, decoded, *size)
        return _peak(lambda: sampler.pipeline.decode(latents))

    few, more = FEW_FRAMES
    if frames <= more:
        return peak(frames)
    return peak(few) + (peak(more) - peak(few)) * (frames - few) // (more - few)


@torch.no_grad()
def _peak(work: Callable[[], object]) -> int:
    with LiveBytes() as live:
        work()
    return max(live.peaks)
