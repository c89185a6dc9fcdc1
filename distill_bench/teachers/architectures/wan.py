"""Wan2.1 and Wan2.2: flow matching, UMT5 texts padded with zeros.

Wan2.2-T2V-A14B has two experts of Wan2.1-14B's shape, and Wan2.1's autoencoder. Wan2.2-TI2V-5B
(`expand_timesteps`) has one timestep per token, and an autoencoder of stride 16 with 48 channels.
"""

import re
from typing import ClassVar

import torch
from torch import Tensor, nn

from distill_bench.teachers.architecture import Architecture, Call

# Names that only Wan-Video/Wan2.1 has, and only FastVideo; a LoRA may change a few layers
ORIGINAL = re.compile(
    r"\.(self|cross)_attn\.|\.ffn\.\d|^(time|text)_(embedding|projection)\.|^head\."
)
FASTVIDEO = re.compile(
    r"\.fc_(in|out)\.|\.self_attn_residual_norm\.|^blocks\.\d+\.(to_[qkv]|to_out|norm_[qk])\."
)
# Names in FastVideo -> diffusers (hao-ai-lab/FastVideo, fastvideo/configs/models/dits/wanvideo.py)
FROM_FASTVIDEO = (
    (r"^patch_embedding\.proj\.", "patch_embedding."),
    (r"\.text_embedder\.fc_in\.", ".text_embedder.linear_1."),
    (r"\.text_embedder\.fc_out\.", ".text_embedder.linear_2."),
    (r"\.time_embedder\.mlp\.fc_in\.", ".time_embedder.linear_1."),
    (r"\.time_embedder\.mlp\.fc_out\.", ".time_embedder.linear_2."),
    (r"\.time_modulation\.linear\.", ".time_proj."),
    (r"^(blocks\.\d+)\.(to_[qkv]|norm_[qk])\.", r"\1.attn1.\2."),
    (r"^(blocks\.\d+)\.to_out\.", r"\1.attn1.to_out.0."),
    (r"^(blocks\.\d+)\.attn2\.to_out\.", r"\1.attn2.to_out.0."),
    (r"\.ffn\.fc_in\.", ".ffn.net.0.proj."),
    (r"\.ffn\.fc_out\.", ".ffn.net.2."),
    (r"\.self_attn_residual_norm\.norm\.", ".norm2."),
)


class Wan(Architecture):
    """Wan, with the parts of WanPipeline."""

    PIPELINE: ClassVar[str] = "WanPipeline"
    AUTOENCODER: ClassVar[str] = "AutoencoderKLWan"
    TEXT_ENCODER: ClassVar[str] = "UMT5EncoderModel"
    TEXT_LENGTH: ClassVar[int] = 512
    TEXT_WIDTH: ClassVar[str] = "text_dim"
    LATENT_CHANNELS: ClassVar[str] = "z_dim"
    # Wan-Video/Wan2.1, wan/configs/shared_config.py, sample_neg_prompt. It names, among others,
    # vivid colours, overexposure, "static", "still" and "motionless picture".
    NEGATIVE_PROMPT: ClassVar[str] = (
        "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
        "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
        "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
    )

    def velocity(
        self, net: nn.Module, call: Call, x_t: Tensor, sigma: Tensor, text: Tensor
    ) -> Tensor:
        timestep = 1000 * sigma
        if self.index.get("expand_timesteps"):
            frames, height, width = x_t.shape[2:]
            _, vertical, horizontal = self.patch()
            tokens = frames * -(-height // vertical) * -(-width // horizontal)
            timestep = timestep[:, None].expand(-1, tokens)
        return call(x_t, timestep, text)

    def diffusers_names(self, names: list[str]) -> dict[str, str]:
        if any(ORIGINAL.search(name) for name in names):
            from diffusers.loaders.single_file_utils import (  # takes seconds
                convert_wan_transformer_to_diffusers,
            )

            # diffusers renames a mapping of weights; here each weight stands for its own name
            renamed = convert_wan_transformer_to_diffusers({name: name for name in names})
            return {name: new for new, name in renamed.items()}
        if any(FASTVIDEO.search(name) for name in names):
            return {name: _from_fastvideo(name) for name in names}
        return super().diffusers_names(names)

    @property
    def own_fps(self) -> float:
        return 24.0 if self.index.get("expand_timesteps") else 16.0

    def own_strides(self) -> tuple[int, int]:
        return self.vae.get("scale_factor_temporal", 4), self.vae.get("scale_factor_spatial", 8)

    def patch(self) -> tuple[int, int, int]:
        return tuple(self.transformer.get("patch_size", (1, 2, 2)))

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        mean, std = _statistics(vae, latents)
        return vae.decode(latents / (1 / std) + mean).sample  # the same rounding as WanPipeline

    def encode(self, vae: nn.Module, video: Tensor) -> Tensor:
        latents = vae.encode(video).latent_dist.mode()
        mean, std = _statistics(vae, latents)
        return (latents - mean) / std


def _from_fastvideo(name: str) -> str:
    for pattern, new in FROM_FASTVIDEO:
        name, count = re.subn(pattern, new, name)
        if count:
            break
    return name


def _statistics(vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, shaped to broadcast over (B, C, T, H, W)."""
    mean, std = (
        torch.tensor(values, device=like.device, dtype=like.dtype).reshape(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
