"""Each architecture against diffusers' own pipeline on tiny random networks of the real classes."""

import math
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from pipelines import PROMPTS

from distill_bench.architectures import cogvideox
from distill_bench.cost import Ledger
from distill_bench.models import Denoiser, Guided, load_pipeline
from distill_bench.noise import add_noise
from distill_bench.rollout import euler
from distill_bench.testing import tiny_pipeline

SIZES = {"wan21": (5, 16, 16)} | {name: size for name, (_, *size) in pipelines.TINY.items()}
STEPS, GUIDANCE = 4, 3.0


@pytest.fixture(scope="module", params=SIZES)
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / request.param
    tiny_pipeline(path) if request.param == "wan21" else pipelines.save(request.param, path)
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
    """The latents (B, C, T, H, W) that diffusers' pipeline ends with, from latents in the harness's axes."""
    frames, height, width = SIZES[folder.name]
    length = {"wan21": 8, "wan22": 512, "ltx": 128}.get(folder.name, 12)
    given = {"ltx": latents.flatten(2).transpose(1, 2)}.get(folder.name, latents)
    given = latents.transpose(1, 2) if "cog" in folder.name else given
    out = pipe(
        PROMPTS, height=height, width=width, num_frames=frames, num_inference_steps=STEPS, guidance_scale=guidance,
        latents=given, max_sequence_length=length, output_type="latent", return_dict=False, **options,
    )[0]  # fmt: skip
    if folder.name == "ltx":
        return out.transpose(1, 2).unflatten(2, latents.shape[2:])
    return out.transpose(1, 2) if "cog" in folder.name else out


def levels(pipe, architecture, shape):
    """The noise levels of diffusers' own scheduler, with a last 0."""
    if isinstance(pipe, diffusers.CogVideoXPipeline):
        pipe.scheduler.set_timesteps(STEPS)
        return torch.cat([architecture.sigmas[pipe.scheduler.timesteps].float(), torch.zeros(1)])
    return pipe.scheduler.sigmas


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_many_steps_are_those_of_diffusers_own_pipeline(folder, mine, theirs, guidance):
    """To 1e-5 in float32: text, velocity, guidance and every Euler step, against the pipeline's own call."""
    shape = mine.latent_shape(*SIZES[folder.name])
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    expected = called(theirs, folder, noise, guidance)
    text = mine.encode_text([*PROMPTS, ""])
    guided = Guided(Denoiser(mine.transformer, "teacher", Ledger(1)), text[2:], guidance)
    found = euler(guided, noise, levels(theirs, mine.architecture, shape), text[:2])
    assert (expected - noise).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_decoded_clips_are_those_of_diffusers_own_pipeline(folder, mine, theirs):
    """Latents through the autoencoder, scaled as the pipeline does, and back to about themselves' scale."""
    frames, height, width = SIZES[folder.name]
    shape = mine.latent_shape(frames, height, width)
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))
    with mock.patch.object(theirs.scheduler, "step", lambda *_, **__: (packed,)):  # the last latents are these
        packed = latents.flatten(2).transpose(1, 2) if folder.name == "ltx" else latents
        packed = latents.transpose(1, 2) if "cog" in folder.name else packed
        expected = theirs(
            PROMPTS[0], height=height, width=width, num_frames=frames, num_inference_steps=1, guidance_scale=1.0,
            max_sequence_length=12, output_type="pt",
        ).frames  # fmt: skip
    found = (mine.decode_video(latents).transpose(1, 2) / 2 + 0.5).clamp(0, 1)
    assert found.shape == (1, frames, 3, height, width)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_encoding_is_scaled_as_decoding_is(folder, mine):
    """The mean of the autoencoder's posterior comes back from the latents that `encode` gives."""
    frames, height, width = SIZES[folder.name]
    clip = np.random.default_rng(0).integers(0, 256, (1, frames, 3, height, width), dtype=np.uint8)
    latents, seen = mine.encode(clip), []
    assert latents.shape[1:] == mine.latent_shape(frames, height, width)
    with mock.patch.object(type(mine.vae), "decode", lambda _, z, *__: seen.append(z) or mock.Mock(sample=z)):
        mine.decode_video(latents)
        video = torch.from_numpy(clip).float().transpose(1, 2) / 127.5 - 1
        torch.testing.assert_close(seen[0], mine.vae.encode(video).latent_dist.mode(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_a_variance_preserving_prediction_is_the_velocity_of_flow_matching(kind):
    """From x0 and noise that are known, at the network's own levels and between them."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    sigmas = cogvideox.sigmas_of(torch.cumprod(1 - betas, 0))
    assert (sigmas.diff() > 0).all()
    for at in (0, 1, 500, 998, 999):
        assert float(cogvideox.timestep_of(sigmas[at : at + 1].float(), sigmas)) == pytest.approx(at, abs=0.01)
    between = cogvideox.timestep_of((sigmas[300:301] + sigmas[301:302]) / 2, sigmas)
    assert float(between) == pytest.approx(300.5)
    x0, noise = torch.randn(2, 3, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, float(sigmas[-1])], dtype=torch.float64)
    a, b = ((part / cogvideox.scale(sigma)).reshape(3, 1, 1, 1, 1) for part in (1 - sigma, sigma))
    predicted = a * noise - b * x0 if kind == "v_prediction" else noise
    found = cogvideox.velocity_of(predicted, add_noise(x0, noise, sigma), sigma, sigmas, kind)
    torch.testing.assert_close(found, noise - x0, rtol=0, atol=1e-9)


def test_features_are_the_tokens_of_the_video_after_a_share_of_the_blocks(mine):
    """Of the first of two blocks at half depth; the text's tokens are left out, and the second block does not run."""
    frames, height, width = SIZES[mine.folder.name]
    shape = mine.latent_shape(frames, height, width)
    ledger = Ledger(1)
    teacher = Denoiser(mine.transformer, "teacher", ledger)
    x_t, text = torch.randn(1, *shape), mine.encode_text(PROMPTS[:1])
    with mock.patch.object(teacher.architecture.blocks(mine.transformer)[1], "forward", side_effect=AssertionError("it ran")):
        tokens = teacher.features(x_t, torch.full((1,), 0.5), text, 0.5)
    config, patch = mine.transformer.config, mine.architecture.patch()
    count = math.prod(size // each for size, each in zip(shape[1:], patch, strict=True))
    assert tokens.shape == (1, count, config.num_attention_heads * config.attention_head_dim)
    assert ledger.counts["teacher"]["forward"] == 0.5
