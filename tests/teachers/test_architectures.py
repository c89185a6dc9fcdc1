"""Each architecture against diffusers' own pipeline on tiny random networks of the real classes."""

import json
import math
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from pipelines import PROMPTS, SIZES

from distill_bench.networks.denoiser import Denoiser, Guided
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.pipeline import load_pipeline
from distill_bench.rollout import euler
from distill_bench.teachers.architecture import architecture_of
from distill_bench.teachers.architectures import cogvideox

STEPS, GUIDANCE = 4, 3.0


@pytest.fixture(scope="module", params=SIZES)
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / request.param
    pipelines.save(request.param, path)
    return path


@pytest.fixture(scope="module")
def mine(folder):
    return load_pipeline(str(folder), torch.device("cpu"))


@pytest.fixture(scope="module")
def theirs(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def called(pipe, folder, latents, guidance, **options):
    """Final latents (B, C, T, H, W) of diffusers' pipeline, in the harness's axes."""
    frames, height, width = SIZES[folder.name]
    length = {"wan21": 8, "wan22": 512, "ltx": 128}.get(folder.name, 12)
    given = {"ltx": latents.flatten(2).transpose(1, 2)}.get(folder.name, latents)
    given = latents.transpose(1, 2) if "cog" in folder.name else given
    out = pipe(
        PROMPTS,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=given,
        max_sequence_length=length,
        output_type="latent",
        return_dict=False,
        **options,
    )[0]
    if folder.name == "ltx":
        return out.transpose(1, 2).unflatten(2, latents.shape[2:])
    return out.transpose(1, 2) if "cog" in folder.name else out


def levels(pipe, architecture, shape):
    """Noise levels of diffusers' scheduler, with a final 0."""
    if isinstance(pipe, diffusers.CogVideoXPipeline):
        pipe.scheduler.set_timesteps(STEPS)
        return torch.cat([architecture.sigmas[pipe.scheduler.timesteps].float(), torch.zeros(1)])
    return pipe.scheduler.sigmas


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_sampling_equals_diffusers_own_pipeline(folder, mine, theirs, guidance):
    """Text, velocity, guidance and every Euler step, to 1e-5 in float32."""
    shape = mine.latent_shape(*SIZES[folder.name])
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    expected = called(theirs, folder, noise, guidance)
    text = mine.encode_text([*PROMPTS, ""])
    guided = Guided(Denoiser(mine.transformer, "teacher", Ledger(1)), text[2:], guidance)
    latents = euler(guided, noise, levels(theirs, mine.architecture, shape), text[:2])
    assert (expected - noise).abs().max() > 0.1
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


def test_decoding_equals_diffusers_own_pipeline(folder, mine, theirs):
    """Decoded latents equal the pipeline's, and encoding them restores their scale."""
    frames, height, width = SIZES[folder.name]
    shape = mine.latent_shape(frames, height, width)
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))
    with mock.patch.object(
        theirs.scheduler, "step", lambda *_, **__: (packed,)
    ):  # the last latents are these
        packed = latents.flatten(2).transpose(1, 2) if folder.name == "ltx" else latents
        packed = latents.transpose(1, 2) if "cog" in folder.name else packed
        expected = theirs(
            PROMPTS[0],
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=1,
            guidance_scale=1.0,
            max_sequence_length=12,
            output_type="pt",
        ).frames
    video = (mine.decode_video(latents).transpose(1, 2) / 2 + 0.5).clamp(0, 1)
    assert video.shape == (1, frames, 3, height, width)
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)


def test_encoding_inverts_the_scaling_of_decoding(folder, mine):
    """The mean of the autoencoder's posterior follows from the latents of `encode`."""
    frames, height, width = SIZES[folder.name]
    clip = np.random.default_rng(0).integers(0, 256, (1, frames, 3, height, width), dtype=np.uint8)
    latents, seen = mine.encode(clip), []
    assert latents.shape[1:] == mine.latent_shape(frames, height, width)
    with mock.patch.object(
        type(mine.vae), "decode", lambda _, z, *__: seen.append(z) or mock.Mock(sample=z)
    ):
        mine.decode_video(latents)
        video = torch.from_numpy(clip).float().transpose(1, 2) / 127.5 - 1
        torch.testing.assert_close(
            seen[0], mine.vae.encode(video).latent_dist.mode(), rtol=1e-4, atol=1e-5
        )


def test_features_are_the_videos_tokens_after_a_share_of_the_blocks(mine):
    """At half depth of two blocks, only the first block runs; the text's tokens are dropped."""
    frames, height, width = SIZES[mine.folder.name]
    shape = mine.latent_shape(frames, height, width)
    ledger = Ledger(1)
    teacher = Denoiser(mine.transformer, "teacher", ledger)
    x_t, text = torch.randn(1, *shape), mine.encode_text(PROMPTS[:1])
    with mock.patch.object(
        teacher.architecture.blocks(mine.transformer)[1],
        "forward",
        side_effect=AssertionError("it ran"),
    ):
        tokens = teacher.features(x_t, torch.full((1,), 0.5), text, 0.5)
    config, patch = mine.transformer.config, mine.architecture.patch()
    count = math.prod(size // each for size, each in zip(shape[1:], patch, strict=True))
    assert tokens.shape == (1, count, config.num_attention_heads * config.attention_head_dim)
    assert ledger.counts["teacher"]["forward"] == 0.5


@pytest.mark.slow
def test_large_frames_are_decoded_in_tiles_and_differentiably(folder, mine):
    """A frame of two by two tiles has the right shape, and gradients reach every latent."""
    frames, height, width = SIZES[folder.name]
    channels, times, *size = mine.latent_shape(frames, height, width)
    noise = torch.randn(
        1, channels, times, *(2 * each for each in size), generator=torch.Generator().manual_seed(5)
    )
    latents, (vae, ratio) = noise.requires_grad_(), (mine.vae, mine.architecture.strides()[1])
    tiles = {
        "tile_sample_min": (height, width),
        "tile_sample_stride": (height - ratio, width - ratio),
    }
    if "cog" in folder.name:
        tiles = {"tile_sample_min": (6 * ratio, 5 * ratio), "tile_latent_min": (6, 5)}
    named = {
        f"{key}_{axis}": each
        for key, pair in tiles.items()
        for axis, each in zip(("height", "width"), pair, strict=True)
    }
    with (
        mock.patch.multiple(vae, **named),
        mock.patch.object(vae, "tiled_decode", wraps=vae.tiled_decode) as tiled,
    ):
        video = mine.decode_video(latents)
    assert tiled.called and video.shape == (1, 3, frames, 2 * height, 2 * width)
    (gradient,) = torch.autograd.grad(video.square().mean(), latents)
    reached = gradient.abs().amax((0, 1, 2)) > 0
    assert gradient.isfinite().all() and reached.all()


@pytest.mark.parametrize("size", [(480, 720), (768, 1360), (128, 128)])
def test_the_tiles_of_cogvideox_fit_together(size):
    """Released autoencoders keep their tile sizes; others get sizes that fit."""
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        sample_height=size[0],
        sample_width=size[1],
    )
    before = vae.tile_latent_min_height, vae.tile_latent_min_width
    architecture_of_vae = cogvideox.CogVideoX(None, {}, vae.config, {})
    architecture_of_vae.limit_memory(vae)
    after = vae.tile_latent_min_height, vae.tile_latent_min_width
    assert after == (before if size[0] > 128 else (6, 5)) and (after[0] % 6, after[1] % 5) == (0, 0)


CONFIGS = {  # keys that decide shapes, as the released folders have them
    "Wan2.1-T2V-1.3B": (
        {
            "_class_name": "WanTransformer3DModel",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": [1, 2, 2],
        },
        {
            "_class_name": "AutoencoderKLWan",
            "z_dim": 16,
            "temperal_downsample": [False, True, True],
        },
        {"boundary_ratio": None},
        (81, 480, 832),
        (16, 21, 60, 104),
        16.0,
    ),
    "Wan2.2-TI2V-5B": (
        {
            "_class_name": "WanTransformer3DModel",
            "in_channels": 48,
            "out_channels": 48,
            "patch_size": [1, 2, 2],
        },
        {
            "_class_name": "AutoencoderKLWan",
            "z_dim": 48,
            "patch_size": 2,
            "scale_factor_temporal": 4,
            "scale_factor_spatial": 16,
        },
        {"expand_timesteps": True, "boundary_ratio": None},
        (121, 704, 1280),
        (48, 31, 44, 80),
        24.0,
    ),
    "CogVideoX-5b": (
        {
            "_class_name": "CogVideoXTransformer3DModel",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
        },
        {
            "_class_name": "AutoencoderKLCogVideoX",
            "latent_channels": 16,
            "block_out_channels": [128, 256, 256, 512],
            "temporal_compression_ratio": 4,
        },
        {},
        (49, 480, 720),
        (16, 13, 60, 90),
        8.0,
    ),
    "CogVideoX1.5-5B": (
        {
            "_class_name": "CogVideoXTransformer3DModel",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "patch_size_t": 2,
        },
        {
            "_class_name": "AutoencoderKLCogVideoX",
            "latent_channels": 16,
            "block_out_channels": [128, 256, 256, 512],
            "temporal_compression_ratio": 4,
        },
        {},
        (81, 768, 1360),
        (16, 22, 96, 170),
        16.0,
    ),
    "LTX-Video": (
        {
            "_class_name": "LTXVideoTransformer3DModel",
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
        },
        {
            "_class_name": "AutoencoderKLLTXVideo",
            "latent_channels": 128,
            "patch_size": 4,
            "patch_size_t": 1,
            "spatio_temporal_scaling": [True, True, True, False],
        },
        {},
        (161, 512, 704),
        (128, 21, 16, 22),
        25.0,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_latents_of_released_models_have_the_shapes_of_their_cards(name, tmp_path):
    """One frame more than the card's size is refused."""
    transformer, vae, index, size, latents, fps = CONFIGS[name]
    for part, config in (
        ("transformer/config.json", transformer),
        ("vae/config.json", vae),
        ("model_index.json", index),
    ):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_text(json.dumps(config))
    (tmp_path / "scheduler").mkdir()
    scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    architecture = architecture_of(tmp_path)
    assert architecture.unfit(*size) is None and architecture.unfit(size[0] + 1, *size[1:])
    assert architecture.latent_shape(*size) == latents and architecture.fps == fps
