"""CogVideoX: a variance-preserving network, converted to velocity; padded T5 texts.

The network predicts v or epsilon from z = a x0 + b noise with a^2 + b^2 = 1. At the same ratio
b / a, x_t = (1 - sigma) x0 + sigma noise equals z times sqrt((1 - sigma)^2 + sigma^2). The
conversion is therefore a change of scale, exact at every step of the network's own schedule.
Between two of these steps, the timestep is interpolated in sigma.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from distill_bench.noise import over, vp_scale, vp_sigmas, vp_timestep, vp_velocity
from distill_bench.teachers.architecture import Architecture, Call
from distill_bench.teachers.contents import read_config

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class CogVideoX(Architecture):
    """CogVideoX and CogVideoX 1.5, with the parts of CogVideoXPipeline."""

    PIPELINE: ClassVar[str] = "CogVideoXPipeline"
    AUTOENCODER: ClassVar[str] = "AutoencoderKLCogVideoX"
    TEXT_ENCODER: ClassVar[str] = "T5EncoderModel"
    TEXT_WIDTH: ClassVar[str] = "text_embed_dim"

    def velocity(
        self, net: nn.Module, call: Call, x_t: Tensor, sigma: Tensor, text: Tensor
    ) -> Tensor:
        z = x_t / over(vp_scale(sigma), x_t)
        predicted = call(
            z.transpose(1, 2),
            text,
            vp_timestep(sigma, self.sigmas),
            image_rotary_emb=self._rotary(net.config, x_t),
        )
        return vp_velocity(
            predicted.transpose(1, 2).to(x_t.dtype),
            x_t,
            sigma,
            self.sigmas,
            self.scheduler.get("prediction_type", "epsilon"),
        )

    def blocks(self, net: nn.Module) -> nn.ModuleList:
        return net.transformer_blocks

    def tokens(self, output: Any) -> Tensor:
        return output[0]  # output[1] holds the text's tokens

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """Config of the folder's scheduler: the network's prediction type and noise levels."""
        config = read_config(self.folder / "scheduler", "scheduler_config.json")
        return config.get("trained", config)  # as in an exported student's scheduler

    @cached_property
    def sigmas(self) -> Tensor:
        """Sigma at each timestep of the network, rising, (1000,), float64."""
        from diffusers import CogVideoXDDIMScheduler  # takes seconds

        return vp_sigmas(CogVideoXDDIMScheduler.from_config(self.scheduler).alphas_cumprod)

    @property
    def own_fps(self) -> float:
        return 16.0 if self._patch_t else 8.0

    @property
    def _patch_t(self) -> int | None:
        return self.transformer.get("patch_size_t")

    def own_strides(self) -> tuple[int, int]:
        spatial = 2 ** (len(self.vae["block_out_channels"]) - 1)
        return int(self.vae.get("temporal_compression_ratio", 4)), spatial

    def patch(self) -> tuple[int, int, int]:
        patch = self.transformer.get("patch_size", 2)
        return self._patch_t or 1, patch, patch

    def frames_rule(self) -> tuple[int, int]:
        # after the first latent, the autoencoder decodes two latents at a time
        return 2 * self.strides()[0], 1

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        channels, times, *size = super().latent_shape(frames, height, width)
        return channels, times + -times % (self._patch_t or 1), *size

    def mismatch(self) -> str | None:
        kind = self.scheduler.get("prediction_type", "epsilon")
        if kind not in ("v_prediction", "epsilon"):
            return f"its scheduler's prediction_type is {kind!r}; known: v_prediction, epsilon"
        if kind == "epsilon" and self.scheduler.get("rescale_betas_zero_snr"):
            return (
                "its network predicts epsilon and its schedule ends in pure noise "
                "(rescale_betas_zero_snr), where epsilon does not determine x0"
            )
        return super().mismatch()

    def unfit(self, frames: int, height: int, width: int) -> str | None:
        reason = super().unfit(frames, height, width)
        rotary = self.transformer.get("use_rotary_positional_embeddings")
        if reason is not None or not self._patch_t or not rotary:
            return reason
        # positions are a slice of the training grid
        for key, size in (("height", height), ("width", width)):
            largest = self.transformer.get(f"sample_{key}", size) * self.strides()[1]
            if size > largest:
                name = self.folder.name
                return f"{key} {size} must be at most {largest} for the teacher {name}"
        return None

    def text_length(self, tokenizer: Any) -> int:
        return self.transformer.get("max_text_seq_length", 226)

    def tiles(self) -> dict[str, int]:
        # Tiles overlap by a sixth of their height and a fifth of their width. They fit together
        # only if each overlap is a whole number of latents, as it is for the released sizes.
        stride = self.own_strides()[1]
        sizes = {}
        for axis, share, usual in (("height", 6, 480), ("width", 5, 720)):
            latents = self.vae.get(f"sample_{axis}", usual) // 2 // stride
            sizes[f"tile_sample_min_{axis}"] = max(share, latents // share * share) * stride
        return sizes

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        padded = 1 - latents.shape[2] % 2  # drop a first latent that only fills a patch
        return vae.decode(1 / vae.config.scaling_factor * latents[:, :, padded:]).sample

    def encode(self, vae: nn.Module, video: Tensor) -> Tensor:
        latents = vae.encode(video).latent_dist.mode() * vae.config.scaling_factor
        missing = -latents.shape[2] % (self._patch_t or 1)
        return torch.cat([latents[:, :, :1].expand(-1, -1, missing, -1, -1), latents], 2)

    def draw(self, shape: tuple[int, ...], step: int, draws: torch.Generator) -> Tensor:
        channels, times, *size = shape
        return torch.randn(times, channels, *size, generator=draws).transpose(0, 1)

    def student_scheduler(self, nfe: int, shift: float, stepping: str) -> "SchedulerMixin":
        from distill_bench.schedulers import CogVideoXStudentScheduler  # diffusers takes seconds

        return CogVideoXStudentScheduler(self.scheduler, shift, stepping)

    def _rotary(self, config: Any, x_t: Tensor) -> tuple[Tensor, Tensor] | None:
        if not config.use_rotary_positional_embeddings:
            return None
        patch, patch_t = config.patch_size, config.patch_size_t
        grid = x_t.shape[3] // patch, x_t.shape[4] // patch
        base = config.sample_height // patch, config.sample_width // patch
        times = -(-x_t.shape[2] // (patch_t or 1))
        key = config.attention_head_dim, grid, base, times, patch_t is not None, x_t.device
        if key not in self._rotaries:
            self._rotaries[key] = _rotary(*key)
        return self._rotaries[key]

    @cached_property
    def _rotaries(self) -> dict[tuple, tuple[Tensor, Tensor]]:
        return {}  # per object, because a memory rehearsal caches fake tensors in its own object


def _rotary(
    head: int,
    grid: tuple[int, int],
    base: tuple[int, int],
    times: int,
    slices: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions, as CogVideoXPipeline makes them.

    CogVideoX 1.0 crops a base grid, 1.5 slices it.
    """
    # diffusers takes seconds
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    if slices:
        return get_3d_rotary_pos_embed(
            head, None, grid, times, grid_type="slice", max_size=base, device=device
        )
    crops = get_resize_crop_region_for_grid(grid, base[1], base[0])
    return get_3d_rotary_pos_embed(head, crops, grid, times, device=device)
