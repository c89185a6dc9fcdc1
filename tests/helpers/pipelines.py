"""Tiny pipelines of diffusers' own classes: random weights, the keys of released configs."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from distill_bench.testing.tiny import tiny_pipeline

SPECIAL = ["<pad>", "</s>", "<unk>"]
WORDS = [*SPECIAL, "a", "red", "blue", "circle", "square", "moving", "left", "right"]
PROMPTS = ["a red circle moving left", "a blue square moving right"]
TEXT = {
    "vocab_size": len(WORDS),
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
}


def tokenizer(length: int) -> PreTrainedTokenizerFast:
    """One token per word and an end token, like T5's tokenizer; texts end at `length` tokens."""
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def wan22() -> diffusers.DiffusionPipeline:
    """Wan2.2-TI2V-5B: 48 channels, stride 16, one timestep per token."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.01 * i for i in range(48)],
        latents_std=[0.5 + 0.02 * i for i in range(48)],
        scale_factor_temporal=4,
        scale_factor_spatial=16,
    )
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=48,
        out_channels=48,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return diffusers.WanPipeline(
        tokenizer=tokenizer(512),
        text_encoder=UMT5EncoderModel(UMT5Config(**TEXT)),
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        expand_timesteps=True,
    )


def cogvideox(rotary: bool = True, patch_t: int | None = None) -> diffusers.DiffusionPipeline:
    """CogVideoX-5b; without `rotary` CogVideoX-2b, with `patch_t` CogVideoX1.5."""
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=128,
        sample_width=128,
        scaling_factor=0.7,
    )
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        patch_size_t=patch_t,
        temporal_compression_ratio=4,
        max_text_seq_length=12,
        use_rotary_positional_embeddings=rotary,
        patch_bias=patch_t is None,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        snr_shift_scale=1.0 if rotary else 3.0,
        timestep_spacing="trailing",
    )
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer(226),
        text_encoder=T5EncoderModel(T5Config(**TEXT)),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )


def ltx() -> diffusers.DiffusionPipeline:
    """LTX-Video: packed latents, statistics in the autoencoder's buffers."""
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        patch_size=4,
        patch_size_t=1,
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        scaling_factor=1.0,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        qk_norm="rms_norm_across_heads",
        caption_channels=16,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    return diffusers.LTXPipeline(
        tokenizer=tokenizer(128),
        text_encoder=T5EncoderModel(T5Config(**TEXT)),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )


# Frames, height and width of a small clip of each pipeline.
SIZES: dict[str, tuple[int, int, int]] = {
    "wan21": (5, 16, 16),
    "wan22": (5, 64, 64),
    "wan22-a14b": (5, 16, 16),
    "cogvideox": (9, 32, 32),
    "cogvideox-2b": (9, 32, 32),
    "cogvideox-1.5": (9, 32, 32),
    "ltx": (9, 64, 64),
}
MAKERS: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "wan22": wan22,
    "cogvideox": cogvideox,
    "cogvideox-2b": lambda: cogvideox(rotary=False),
    "cogvideox-1.5": lambda: cogvideox(patch_t=2),
    "ltx": ltx,
}


def add_expert(folder: Path) -> None:
    """Give a Wan pipeline a second expert; the boundary is the second of four of its timesteps."""
    pipe = diffusers.WanPipeline.from_pretrained(folder)
    pipe.scheduler.set_timesteps(4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        low_noise = diffusers.WanTransformer3DModel.from_config(pipe.transformer.config)
    boundary = float(pipe.scheduler.timesteps[1]) / 1000
    parts = pipe.components | {"transformer_2": low_noise}
    diffusers.WanPipeline(**parts, boundary_ratio=boundary).save_pretrained(folder)


def save(name: str, folder: Path) -> None:
    """Write the pipeline `name` with two prompts; "wan21" is the package's own tiny pipeline."""
    if name in ("wan21", "wan22-a14b"):
        tiny_pipeline(folder)
        if name == "wan22-a14b":
            add_expert(folder)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MAKERS[name]().save_pretrained(folder)
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
