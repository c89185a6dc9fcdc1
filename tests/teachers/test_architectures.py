"""Each architecture against diffusers' own pipeline on tiny random networks of the real classes."""

import json
import math
from dataclasses import dataclass, field
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
from distill_bench.teachers.experts import guidance_of, networks_in

STEPS, GUIDANCE = 4, 3.0
TEXT_LENGTHS = {"wan21": 8, "wan22": 512, "wan22-a14b": 8, "ltx": 128}
# wan22-a14b has the autoencoder of wan21
own_autoencoder = pytest.mark.parametrize(
    "folder", [name for name in SIZES if name != "wan22-a14b"], indirect=True
)


@pytest.fixture(scope="module", params=SIZES)
def folder(request, tmp_path_factory) -> Path:
    """A tiny pipeline folder of each kind in `pipelines.SIZES`."""
    path = tmp_path_factory.mktemp("tiny") / request.param
    pipelines.save(request.param, path)
    return path


@pytest.fixture(scope="module")
def pipeline(folder):
    """The folder as the harness loads it."""
    return load_pipeline(str(folder), torch.device("cpu"))


@pytest.fixture(scope="module")
def reference(folder):
    """The folder as diffusers loads it."""
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def size_of(folder: Path) -> dict[str, int]:
    """Arguments of diffusers' pipelines for the size of a folder's clips."""
    frames, height, width = SIZES[folder.name]
    return {"num_frames": frames, "height": height, "width": width}


def to_reference(folder: Path, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, T, H, W) in the axes of diffusers' pipeline."""
    if folder.name == "ltx":
        return latents.flatten(2).transpose(1, 2)
    return latents.transpose(1, 2) if "cog" in folder.name else latents


def from_reference(folder: Path, latents: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Latents of diffusers' pipeline as (B, C, T, H, W); the inverse of `to_reference`."""
    if folder.name == "ltx":
        return latents.transpose(1, 2).unflatten(2, shape[2:])
    return latents.transpose(1, 2) if "cog" in folder.name else latents


def reference_latents(reference, folder: Path, noise: torch.Tensor, guidance: float, **options):
    """Final latents (B, C, T, H, W) of diffusers' pipeline."""
    (latents,) = reference(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=to_reference(folder, noise),
        max_sequence_length=TEXT_LENGTHS.get(folder.name, 12),
        output_type="latent",
        return_dict=False,
        **size_of(folder),
        **options,
    )
    return from_reference(folder, latents, noise.shape)


def reference_levels(reference, architecture) -> torch.Tensor:
    """Noise levels of diffusers' scheduler, with a final 0."""
    if isinstance(reference, diffusers.CogVideoXPipeline):
        reference.scheduler.set_timesteps(STEPS)
        levels = architecture.sigmas[reference.scheduler.timesteps].float()
        return torch.cat([levels, torch.zeros(1)])
    return reference.scheduler.sigmas


def seeded_noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_sampling_equals_diffusers_own_pipeline(folder, pipeline, reference, guidance):
    """Text, velocity, guidance and every Euler step, to 1e-5 in float32."""
    noise = seeded_noise(2, *pipeline.latent_shape(*SIZES[folder.name]), seed=1)
    expected = reference_latents(reference, folder, noise, guidance)
    text = pipeline.encode_text([*PROMPTS, ""])
    teacher = Denoiser(pipeline.transformer, "teacher", Ledger(1))
    guided = Guided(teacher, text[2:], guidance)
    levels = reference_levels(reference, pipeline.architecture)
    latents = euler(guided, noise, levels, text[:2])
    assert (expected - noise).abs().max() > 0.1
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("folder", ["wan22-a14b"], indirect=True)
def test_each_expert_is_guided_by_its_own_scale_as_in_diffusers(folder, pipeline, reference):
    noise = seeded_noise(2, *pipeline.latent_shape(*SIZES[folder.name]), seed=1)
    expected = reference_latents(reference, folder, noise, 4.0, guidance_scale_2=1.5)
    levels = reference_levels(reference, pipeline.architecture)
    assert levels[-2] < pipeline.architecture.boundary < levels[0]
    text = pipeline.encode_text([*PROMPTS, ""])
    teacher = Denoiser(pipeline.transformer, "teacher", Ledger(1))
    scale = guidance_of({"high_noise": 4.0, "low_noise": 1.5}, str(folder))
    latents = euler(Guided(teacher, text[2:], scale), noise, levels, text[:2])
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    swapped = guidance_of({"high_noise": 1.5, "low_noise": 4.0}, str(folder))
    other = euler(Guided(teacher, text[2:], swapped), noise, levels, text[:2])
    assert (other - expected).abs().max() > 1e-3


@own_autoencoder
def test_decoding_equals_diffusers_own_pipeline(folder, pipeline, reference):
    frames, height, width = SIZES[folder.name]
    latents = seeded_noise(1, *pipeline.latent_shape(frames, height, width), seed=2)
    last_latents = to_reference(folder, latents)
    # the scheduler's only step returns the latents of this test
    with mock.patch.object(reference.scheduler, "step", lambda *_, **__: (last_latents,)):
        expected = reference(
            PROMPTS[0],
            num_inference_steps=1,
            guidance_scale=1.0,
            max_sequence_length=12,
            output_type="pt",
            **size_of(folder),
        ).frames
    video = (pipeline.decode_video(latents).transpose(1, 2) / 2 + 0.5).clamp(0, 1)
    assert video.shape == (1, frames, 3, height, width)
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)


@own_autoencoder
def test_encoding_inverts_the_scaling_of_decoding(folder, pipeline):
    """`decode_video` gives the autoencoder the mean of its posterior back."""
    frames, height, width = SIZES[folder.name]
    clip = np.random.default_rng(0).integers(0, 256, (1, frames, 3, height, width), dtype=np.uint8)
    latents = pipeline.encode(clip)
    assert latents.shape[1:] == pipeline.latent_shape(frames, height, width)
    decoded = []

    def record(_, z, *__):
        decoded.append(z)
        return mock.Mock(sample=z)

    with mock.patch.object(type(pipeline.vae), "decode", record):
        pipeline.decode_video(latents)
    video = torch.from_numpy(clip).float().transpose(1, 2) / 127.5 - 1
    mean = pipeline.vae.encode(video).latent_dist.mode()
    torch.testing.assert_close(decoded[0], mean, rtol=1e-4, atol=1e-5)


def test_features_are_the_videos_tokens_after_a_share_of_the_blocks(pipeline):
    """At half depth of two blocks, only the first block runs; the text's tokens are dropped."""
    shape = pipeline.latent_shape(*SIZES[pipeline.folder.name])
    ledger = Ledger(1)
    teacher = Denoiser(pipeline.transformer, "teacher", ledger)
    x_t, text = torch.randn(1, *shape), pipeline.encode_text(PROMPTS[:1])
    net = networks_in(pipeline.transformer)[-1]  # for low noise
    second_block = teacher.architecture.blocks(net)[1]
    with mock.patch.object(second_block, "forward", side_effect=AssertionError("it ran")):
        tokens = teacher.features(x_t, torch.full((1,), 0.5), text, 0.5)
    config, patch = net.config, pipeline.architecture.patch()
    count = math.prod(size // stride for size, stride in zip(shape[1:], patch, strict=True))
    assert tokens.shape == (1, count, config.num_attention_heads * config.attention_head_dim)
    assert ledger.counts["teacher"]["forward"] == 0.5


@own_autoencoder
def test_large_frames_are_decoded_in_tiles_and_differentiably(folder, pipeline):
    """A frame of two by two tiles has the right shape, and gradients reach every latent."""
    frames, height, width = SIZES[folder.name]
    channels, times, *size = pipeline.latent_shape(frames, height, width)
    doubled = [2 * length for length in size]
    latents = seeded_noise(1, channels, times, *doubled, seed=5).requires_grad_()
    vae, stride = pipeline.vae, pipeline.architecture.strides()[1]
    tiles = {
        "tile_sample_min": (height, width),
        "tile_sample_stride": (height - stride, width - stride),
    }
    if "cog" in folder.name:
        tiles = {"tile_sample_min": (6 * stride, 5 * stride), "tile_latent_min": (6, 5)}
    attributes = {
        f"{key}_{axis}": length
        for key, lengths in tiles.items()
        for axis, length in zip(("height", "width"), lengths, strict=True)
    }
    with (
        mock.patch.multiple(vae, **attributes),
        mock.patch.object(vae, "tiled_decode", wraps=vae.tiled_decode) as tiled_decode,
    ):
        video = pipeline.decode_video(latents)
    assert tiled_decode.called
    assert video.shape == (1, 3, frames, 2 * height, 2 * width)
    (gradient,) = torch.autograd.grad(video.square().mean(), latents)
    assert gradient.isfinite().all()
    assert (gradient.abs().amax((0, 1, 2)) > 0).all()


@pytest.mark.parametrize(
    ("size", "kept"), [((480, 720), True), ((768, 1360), True), ((128, 128), False)]
)
def test_the_tiles_of_cogvideox_fit_together(size, kept):
    """Released autoencoders keep their tile sizes; other autoencoders get sizes that fit."""
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        sample_height=size[0],
        sample_width=size[1],
    )
    released = vae.tile_latent_min_height, vae.tile_latent_min_width
    cogvideox.CogVideoX(None, {}, vae.config, {}).limit_memory(vae)
    height, width = vae.tile_latent_min_height, vae.tile_latent_min_width
    assert (height, width) == (released if kept else (6, 5))
    assert (height % 6, width % 5) == (0, 0)


@dataclass(frozen=True)
class Released:
    """Configs of a released folder, as far as they decide shapes, and the shapes of its card."""

    transformer: dict
    vae: dict
    size: tuple[int, int, int]  # frames, height, width
    latents: tuple[int, int, int, int]
    fps: float
    index: dict = field(default_factory=dict)  # model_index.json


RELEASED = {
    "Wan2.1-T2V-1.3B": Released(
        transformer={
            "_class_name": "WanTransformer3DModel",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": [1, 2, 2],
        },
        vae={
            "_class_name": "AutoencoderKLWan",
            "z_dim": 16,
            "temperal_downsample": [False, True, True],
        },
        index={"boundary_ratio": None},
        size=(81, 480, 832),
        latents=(16, 21, 60, 104),
        fps=16.0,
    ),
    "Wan2.2-TI2V-5B": Released(
        transformer={
            "_class_name": "WanTransformer3DModel",
            "in_channels": 48,
            "out_channels": 48,
            "patch_size": [1, 2, 2],
        },
        vae={
            "_class_name": "AutoencoderKLWan",
            "z_dim": 48,
            "patch_size": 2,
            "scale_factor_temporal": 4,
            "scale_factor_spatial": 16,
        },
        index={"expand_timesteps": True, "boundary_ratio": None},
        size=(121, 704, 1280),
        latents=(48, 31, 44, 80),
        fps=24.0,
    ),
    "CogVideoX-5b": Released(
        transformer={
            "_class_name": "CogVideoXTransformer3DModel",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
        },
        vae={
            "_class_name": "AutoencoderKLCogVideoX",
            "latent_channels": 16,
            "block_out_channels": [128, 256, 256, 512],
            "temporal_compression_ratio": 4,
        },
        size=(49, 480, 720),
        latents=(16, 13, 60, 90),
        fps=8.0,
    ),
    "CogVideoX1.5-5B": Released(
        transformer={
            "_class_name": "CogVideoXTransformer3DModel",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "patch_size_t": 2,
        },
        vae={
            "_class_name": "AutoencoderKLCogVideoX",
            "latent_channels": 16,
            "block_out_channels": [128, 256, 256, 512],
            "temporal_compression_ratio": 4,
        },
        size=(81, 768, 1360),
        latents=(16, 22, 96, 170),
        fps=16.0,
    ),
    "LTX-Video": Released(
        transformer={
            "_class_name": "LTXVideoTransformer3DModel",
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
        },
        vae={
            "_class_name": "AutoencoderKLLTXVideo",
            "latent_channels": 128,
            "patch_size": 4,
            "patch_size_t": 1,
            "spatio_temporal_scaling": [True, True, True, False],
        },
        size=(161, 512, 704),
        latents=(128, 21, 16, 22),
        fps=25.0,
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_latents_of_released_models_have_the_shapes_of_their_cards(name, tmp_path):
    """A clip with one more frame than the card's size is refused."""
    released = RELEASED[name]
    scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    for file, config in (
        ("transformer/config.json", released.transformer),
        ("vae/config.json", released.vae),
        ("model_index.json", released.index),
        ("scheduler/scheduler_config.json", scheduler),
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps(config))
    architecture = architecture_of(tmp_path)
    frames, height, width = released.size
    assert architecture.unfit(frames, height, width) is None
    assert architecture.unfit(frames + 1, height, width) is not None
    assert architecture.latent_shape(frames, height, width) == released.latents
    assert architecture.fps == released.fps
