"""LTX-Video: flow matching on latents packed to tokens, T5 texts with a mask, positions in seconds.

Masked rows of a text are set to zero, so that the mask can be recovered from the embedding. The
attention ignores masked rows, whatever their values.
"""

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from distill_bench.teachers.architecture import Architecture, Call

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


class LTXVideo(Architecture):
    """LTX-Video, with the parts of LTXPipeline."""

    PIPELINE: ClassVar[str] = "LTXPipeline"
    AUTOENCODER: ClassVar[str] = "AutoencoderKLLTXVideo"
    TEXT_ENCODER: ClassVar[str] = "T5EncoderModel"
    TEXT_LENGTH: ClassVar[int] = 128
    TEXT_WIDTH: ClassVar[str] = "caption_channels"
    FRAMEWISE: ClassVar[bool] = True

    def velocity(
        self, net: nn.Module, call: Call, x_t: Tensor, sigma: Tensor, text: Tensor
    ) -> Tensor:
        frames, height, width = x_t.shape[2:]
        temporal, spatial = self.strides()
        velocity = call(
            x_t.flatten(2).transpose(1, 2),
            text,
            1000 * sigma,
            (text != 0).any(-1),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(temporal / self.own_fps, spatial, spatial),
        )
        return velocity.transpose(1, 2).unflatten(2, (frames, height, width))

    def blocks(self, net: nn.Module) -> nn.ModuleList:
        return net.transformer_blocks

    @property
    def own_fps(self) -> float:
        return 25.0

    def own_strides(self) -> tuple[int, int]:
        scaling = 2 ** sum(self.vae.get("spatio_temporal_scaling", (True, True, True, False)))
        temporal = self.vae.get("temporal_compression_ratio")
        spatial = self.vae.get("spatial_compression_ratio")
        return (
            temporal or self.vae.get("patch_size_t", 1) * scaling,
            spatial or self.vae.get("patch_size", 4) * scaling,
        )

    def patch(self) -> tuple[int, int, int]:
        return 1, 1, 1

    def mismatch(self) -> str | None:
        if any(self.transformer.get(key, 1) != 1 for key in ("patch_size", "patch_size_t")):
            return "its transformer has a patch size above 1, which no released LTX-Video has"
        return super().mismatch()

    def encode_text(self, pipeline: "DiffusionPipeline", prompts: list[str], length: int) -> Tensor:
        embeddings, mask, *_ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return embeddings * mask.unsqueeze(-1)

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        std, mean = _broadcast(vae.latents_std, latents), _broadcast(vae.latents_mean, latents)
        latents = latents * std / vae.config.scaling_factor + mean
        timestep = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        with torch.random.fork_rng(enabled=any(vae.config.decoder_inject_noise)):
            torch.manual_seed(0)  # some decoders add noise; make it reproducible
            return vae.decode(latents, timestep).sample

    def encode(self, vae: nn.Module, video: Tensor) -> Tensor:
        latents = vae.encode(video).latent_dist.mode()
        std, mean = _broadcast(vae.latents_std, latents), _broadcast(vae.latents_mean, latents)
        return (latents - mean) * vae.config.scaling_factor / std

    def draw(self, shape: tuple[int, ...], step: int, draws: torch.Generator) -> Tensor:
        if (
            step == 0
        ):  # the pipeline packs the first noise after drawing; it draws later noise packed
            return super().draw(shape, step, draws)
        channels, *size = shape
        return torch.randn(math.prod(size), channels, generator=draws).T.unflatten(1, size)

    def student_scheduler(self, nfe: int, shift: float, stepping: str) -> "SchedulerMixin":
        from distill_bench.schedulers import flow_matching  # diffusers takes seconds

        return flow_matching(nfe, shift, stepping, spaced=True)


def _broadcast(statistic: Any, like: Tensor) -> Tensor:
    """A statistic per channel, shaped to broadcast over (B, C, T, H, W)."""
    return statistic.to(like.device, like.dtype).reshape(1, -1, 1, 1, 1)
