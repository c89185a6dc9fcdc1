"""Rehearses the sampling of a run's clips and references on fake tensors: memory, and FLOPs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distill_bench.config.rows.sampling import teacher_sampling
from distill_bench.config.schema import RunConfig
from distill_bench.networks.pipeline import clips_per_batch
from distill_bench.plan.cost import block_counts
from distill_bench.plan.fake import fake_tensors
from distill_bench.plan.live_bytes import LiveBytes, device_bytes, total_bytes
from distill_bench.plan.outline import outline
from distill_bench.sample.sampler import Latents, Sampler

# Latent frames from which decoding is extrapolated: the first frame of a clip is decoded
# differently from the others, and CogVideoX decodes two at a time.
FEW_FRAMES = (3, 5)
FEW_BLOCKS = (1, 2)  # from which FLOPs are extrapolated: all blocks of a network are alike
SHAPING = ("teacher", "student", "frames", "height", "width")  # what the FLOPs for a clip depend on
_counted: dict[tuple, "ClipFlops"] = {}


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
        rows[sampler.teacher_net] = sampler.teacher_latents(teacher_sampling(config, 1))
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


@dataclass(frozen=True)
class ClipFlops:
    """FLOPs for one clip."""

    student: float  # of one forward
    teacher: float  # of one forward, unguided
    decoding: float  # 0 without an autoencoder


def clip_flops(config: RunConfig) -> ClipFlops:
    """FLOPs of the networks and the autoencoder for one clip, counted once per shape."""
    key = (*(getattr(config, name) for name in SHAPING), FEW_BLOCKS)
    if key not in _counted:
        _counted[key] = _clip_flops(config.model_copy(update={"threads": None}))
    return _counted[key]


def _clip_flops(config: RunConfig) -> ClipFlops:
    """Count FLOPs on fake tensors, those of the networks with few blocks."""
    teacher_blocks, student_blocks = block_counts(config)
    with fake_tensors():
        few, more = (
            Sampler(config, pipeline=outline(config, (blocks, blocks)), prompts=[""])
            for blocks in FEW_BLOCKS
        )

        def forward(student: bool, blocks: int) -> float:
            low, high = (
                sampler.pipeline.flops(
                    sampler.pipeline.student() if student else sampler.pipeline.transformer,
                    sampler.shape,
                    sampler.texts.null_text,
                )
                for sampler in (few, more)
            )
            return low + (high - low) * (blocks - FEW_BLOCKS[0]) / (FEW_BLOCKS[1] - FEW_BLOCKS[0])

        def decoding(latents: Tensor) -> float:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                few.pipeline.decode(latents)
            return float(counter.get_total_flops())

        return ClipFlops(
            forward(True, student_blocks),
            forward(False, teacher_blocks),
            _of_all_frames(decoding, few),
        )


def _decoding_peak(sampler: Sampler) -> int:
    """Peak live bytes while one batch is decoded."""

    def peak(latents: Tensor) -> float:
        return _peak(lambda: sampler.pipeline.decode(latents))

    return int(_of_all_frames(peak, sampler))


def _of_all_frames(measure: Callable[[Tensor], float], sampler: Sampler) -> float:
    """A measure of one batch of latents, (B, C, T, H, W); extrapolated linearly to many frames."""
    channels, frames, *size = sampler.shape

    def measured(decoded: int) -> float:
        return measure(torch.empty(len(sampler.prompts), channels, decoded, *size))

    few, more = FEW_FRAMES
    if frames <= more:
        return measured(frames)
    return measured(few) + (measured(more) - measured(few)) * (frames - few) // (more - few)


@torch.no_grad()
def _peak(work: Callable[[], object]) -> int:
    with LiveBytes() as live:
        work()
    return max(live.peaks)
