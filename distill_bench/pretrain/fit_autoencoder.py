"""Train mini-wan's per-frame autoencoder, and encode the teacher's training clips with it."""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_bench.autoencoder import FrameAutoencoder, frames_to_video, video_to_frames
from distill_bench.domain import shapes
from distill_bench.store.progress import tracked

FIRST_KEY = 10_000_000  # of the rendered training clips; protocols use smaller keys
MIX = {"named": 10, "direction": 3, "free": 7}  # clips of each kind of caption, of every 20
AUTOENCODER_CLIPS = 8640  # at most, of the training clips
CHUNK = 1000  # clips rendered and encoded at once


def training_attributes(count: int, mix: Mapping[str, int] = MIX) -> list[shapes.Attributes]:
    """Attributes of `count` training clips: the kinds of captions in turn, in the shares of `mix`.

    The first clips do not depend on `count`.
    """
    cycle = [kind for kind in shapes.KINDS for _ in range(mix[kind])]
    every = {kind: shapes.all_attributes(kind) for kind in shapes.KINDS}
    seen = dict.fromkeys(shapes.KINDS, 0)
    attributes = []
    for i in range(count):
        kind = cycle[i % len(cycle)]
        attributes.append(every[kind][seen[kind] % len(every[kind])])
        seen[kind] += 1
    return attributes


def render_clips(
    attributes: list[shapes.Attributes], first_key: int, silent: bool = False
) -> np.ndarray:
    """Clips of these attributes with keys from `first_key`, uint8 (N, T, 3, H, W)."""
    rendering = tracked(attributes, "rendering", not silent)
    return np.stack([shapes.render(a, first_key + i) for i, a in enumerate(rendering)])


def train_autoencoder(options: argparse.Namespace, device: torch.device) -> FrameAutoencoder:
    """Load the autoencoder from the work folder, or train it on frames of training clips."""
    folder = options.work / "vae"
    if (folder / "config.json").is_file():
        return FrameAutoencoder.from_pretrained(folder).to(device).eval()
    clips = render_clips(training_attributes(min(options.clips, AUTOENCODER_CLIPS)), FIRST_KEY)
    torch.manual_seed(options.seed)
    vae = FrameAutoencoder().to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=options.autoencoder_steps, pct_start=0.05
    )
    generator, began = torch.Generator().manual_seed(options.seed), time.monotonic()
    for step in range(options.autoencoder_steps):
        index = torch.randint(len(clips), (64,), generator=generator).numpy()
        frame = torch.randint(clips.shape[1], (64,), generator=generator).numpy()
        video = frames_to_video(torch.from_numpy(clips[index, frame][:, None])).to(device)
        latents = vae.encode(video)
        noisy = latents + 0.05 * torch.randn(latents.shape, generator=generator).to(device)
        error = vae.decode(noisy) - video
        # squared error for colours, absolute error for edges; the last term bounds the latents
        loss = error.square().mean() + 0.2 * error.abs().mean() + 1e-3 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            progress = f"autoencoder {step}/{options.autoencoder_steps} loss {loss.item():.5f}"
            print(f"{progress} {time.monotonic() - began:.0f} s", flush=True)
    vae.eval()
    latents = encode(vae, clips, device)
    vae.latents_mean.copy_(latents.mean((0, 2, 3, 4)))
    vae.latents_std.copy_(latents.std((0, 2, 3, 4)))
    vae.save_pretrained(folder)
    return vae


def load_latents(
    vae: FrameAutoencoder, options: argparse.Namespace, device: torch.device
) -> Tensor:
    """Latents (N, 4, T, 8, 8) of the training clips, rendered once and kept in the work folder."""
    path: Path = options.work / "latents.safetensors"
    if path.is_file():
        latents = load_file(path)["latents"]
        if len(latents) == options.clips:
            return latents
    attributes, parts = training_attributes(options.clips), []
    for first in range(0, len(attributes), CHUNK):
        print(f"rendering and encoding clips {first}/{len(attributes)}", flush=True)
        clips = render_clips(attributes[first : first + CHUNK], FIRST_KEY + first, silent=True)
        parts.append(encode(vae, clips, device))
    latents = torch.cat(parts).contiguous()
    save_file({"latents": latents}, path.with_suffix(".writing"))
    path.with_suffix(".writing").replace(path)
    return latents


@torch.no_grad()
def encode(vae: FrameAutoencoder, clips: np.ndarray, device: torch.device) -> Tensor:
    """Latents (N, 4, T, 8, 8) of clips, on the CPU."""
    parts = torch.from_numpy(clips).split(64)
    return torch.cat([vae.encode(frames_to_video(part).to(device)).cpu() for part in parts])


@torch.no_grad()
def decode(vae: FrameAutoencoder, latents: Tensor) -> np.ndarray:
    """Clips, uint8 (N, T, 3, H, W), of latents (N, 4, T, 8, 8)."""
    return torch.cat([video_to_frames(vae.decode(part)) for part in latents.split(64)]).numpy()
