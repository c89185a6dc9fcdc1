"""Train mini-wan, the embedded teacher, from scratch.

First a per-frame autoencoder is trained, then a `WanTransformer3DModel` with its text encoder, by
flow matching on the autoencoder's latents. Both resume from the work folder. The pipeline folder is
rewritten at every evaluation, with a card of its quality.
"""

import argparse
import json
import math
import shutil
import sys
import time

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from distill_bench.autoencoder import FrameAutoencoder
from distill_bench.domain import shapes
from distill_bench.networks.denoiser import Denoiser
from distill_bench.networks.ledger import Ledger
from distill_bench.noise import add_noise, teacher_sigmas, warp
from distill_bench.rollout import euler

FIRST_KEY = 10_000_000  # of the rendered training clips; protocols use smaller keys
SHIFT = 2.0
TEXT_LENGTH = 10  # tokens per caption
NULL_PROBABILITY = 0.1  # of dropping a caption, for guidance


def render_clips(count: int) -> tuple[list[str], np.ndarray]:
    """Render `count` captioned clips; returns captions and clips, uint8 (N, T, 3, H, W)."""
    attributes = shapes.all_attributes()
    chosen = [attributes[i % len(attributes)] for i in range(count)]
    rendering = track(chosen, "rendering", console=_console())
    clips = np.stack([shapes.render(a, FIRST_KEY + i) for i, a in enumerate(rendering)])
    return [shapes.caption(a) for a in chosen], clips


def to_video(clips: np.ndarray) -> Tensor:
    """Convert uint8 clips (N, T, 3, H, W) to video (N, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(clips).float().transpose(1, 2) / 127.5 - 1


def train_autoencoder(
    clips: np.ndarray, options: argparse.Namespace, device: torch.device
) -> FrameAutoencoder:
    """Load the autoencoder from the work folder, or train it."""
    folder = options.work / "vae"
    if (folder / "config.json").is_file():
        return FrameAutoencoder.from_pretrained(folder).to(device).eval()
    torch.manual_seed(options.seed)
    vae = FrameAutoencoder().to(device).train()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.0)
    generator, began = torch.Generator().manual_seed(options.seed), time.time()
    for step in range(options.autoencoder_steps):
        set_lr(optimiser, 2e-3, step, options.autoencoder_steps)
        index = torch.randint(len(clips), (64,), generator=generator).numpy()
        frame = torch.randint(clips.shape[1], (64,), generator=generator).numpy()
        video = to_video(clips[index, frame][:, None]).to(device)
        latents = vae.encode(video)
        noisy = latents + 0.05 * torch.randn(latents.shape, generator=generator).to(device)
        error = vae.decode(noisy) - video
        # squared error for colours, absolute error for edges; the last term bounds the latents
        loss = error.square().mean() + 0.2 * error.abs().mean() + 1e-3 * latents.square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if step % 250 == 0:
            progress = f"autoencoder {step}/{options.autoencoder_steps} loss {loss.item():.5f}"
            print(f"{progress} {time.time() - began:.0f} s", flush=True)
    vae.eval()
    latents = encode(vae, clips, device)
    vae.latents_mean.copy_(latents.mean((0, 2, 3, 4)))
    vae.latents_std.copy_(latents.std((0, 2, 3, 4)))
    heldout = np.stack([shapes.render(a, FIRST_KEY - 1) for a in shapes.all_attributes()])
    accuracy = oracle_accuracy(reconstruct(vae, heldout, device), shapes.all_attributes())
    print("oracle on reconstructions:", accuracy, flush=True)
    vae.save_pretrained(folder)
    return vae


@torch.no_grad()
def encode(vae: FrameAutoencoder, clips: np.ndarray, device: torch.device) -> Tensor:
    """Latents (N, 4, T, 8, 8) of clips, on the CPU."""
    return torch.cat(
        [
            vae.encode(to_video(part).to(device)).cpu()
            for part in np.array_split(clips, max(1, len(clips) // 64))
        ]
    )


@torch.no_grad()
def reconstruct(vae: FrameAutoencoder, clips: np.ndarray, device: torch.device) -> np.ndarray:
    """Encode and decode clips."""
    return to_clips(
        torch.cat(
            [vae.decode(vae.encode(to_video(p).to(device))).cpu() for p in np.array_split(clips, 8)]
        )
    )


def to_clips(video: Tensor) -> np.ndarray:
    """Convert video (N, 3, T, H, W) in [-1, 1] to uint8 clips (N, T, 3, H, W)."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).transpose(1, 2).numpy()


def oracle_accuracy(clips: np.ndarray, attributes: list[shapes.Attributes]) -> dict[str, float]:
    """Share of clips that the oracle reads as captioned, per attribute and for all attributes."""
    pairs = zip(shapes.read(clips), attributes, strict=True)
    right = np.array([[getattr(r, f) == getattr(a, f) for f in shapes.FIELDS] for r, a in pairs])
    by_field = dict(zip(shapes.FIELDS, right.mean(0).round(4).tolist(), strict=True))
    return by_field | {"all": round(float(right.all(1).mean()), 4)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with one token per word of the domain's captions."""
    words = sorted({word for a in shapes.all_attributes() for word in shapes.caption(a).split()})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
    )


class TeacherNetwork(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=vocabulary,
                d_model=64,
                d_kv=16,
                d_ff=128,
                num_layers=1,
                num_heads=4,
                dropout_rate=0.0,
            )
        )
        self.transformer = WanTransformer3DModel(
            patch_size=(2, 2, 2),
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            text_dim=64,
            freq_dim=64,
            ffn_dim=512,
            num_layers=6,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64,
        )

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings (B, L, 64) with zeros for padding, as in WanPipeline."""
        return self.text_encoder(ids, mask).last_hidden_state * mask.unsqueeze(-1)


def train_teacher(
    vae: FrameAutoencoder,
    captions: list[str],
    latents: Tensor,
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """Train by flow matching (Lipman et al., 2022) with dropped captions; export when evaluated."""
    tokenizer = make_tokenizer()
    torch.manual_seed(options.seed)
    teacher = TeacherNetwork(len(tokenizer)).to(device)
    ema = {k: v.detach().clone() for k, v in teacher.state_dict().items()}
    optimiser = torch.optim.AdamW(
        teacher.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    curve: list[dict] = []
    start, seconds = 0, 0.0
    path = options.work / "teacher.pt"
    if path.is_file():
        state = torch.load(path, map_location=device, weights_only=True)
        teacher.load_state_dict(state["teacher"])
        optimiser.load_state_dict(state["optimiser"])
        ema, curve = state["ema"], state["curve"]
        start, seconds = state["step"], state["seconds"]
        print(f"resuming from step {start}", flush=True)
    tokens = tokenizer(
        [*captions, ""], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
    )
    ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
    null = len(captions)  # index of the empty caption
    running_loss = None
    for step in range(start, options.steps):
        began = time.time()
        set_lr(optimiser, options.lr, step, options.steps)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        index = torch.randint(len(captions), (options.batch,), generator=generator)
        dropped = torch.rand(options.batch, generator=generator) < NULL_PROBABILITY
        sigma = warp(torch.rand(options.batch, generator=generator), SHIFT).to(device)
        noise = torch.randn(options.batch, *latents.shape[1:], generator=generator).to(device)
        x0 = latents[index].to(device)
        caption = torch.where(dropped, null, index).to(device)
        text = teacher.text(ids[caption], mask[caption])
        velocity = teacher.transformer(
            add_noise(x0, noise, sigma), 1000 * sigma, text, return_dict=False
        )[0]
        loss = (velocity - (noise - x0)).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimiser.step()
        decay = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            for k, v in teacher.state_dict().items():
                ema[k].lerp_(v, 1 - decay)
        value = loss.item()
        running_loss = value if running_loss is None else 0.98 * running_loss + 0.02 * value
        seconds += time.time() - began
        if (step + 1) % 50 == 0:
            progress = f"teacher {step + 1}/{options.steps} loss {running_loss:.4f}"
            print(f"{progress} {seconds:.0f} s", flush=True)
        last = step + 1 == options.steps
        if last or (step + 1) % options.every == 0:
            quality = measure_quality(
                teacher, ema, vae, tokenizer, device, count=432 if last else 72
            )
            row = {"step": step + 1, "loss": round(running_loss, 4), "seconds": round(seconds)}
            curve.append(row | quality)
            print(json.dumps(curve[-1]), flush=True)
            write_pipeline(teacher, ema, vae, tokenizer, curve, options)
        if last or (step + 1) % 250 == 0:
            state = {
                "teacher": teacher.state_dict(),
                "optimiser": optimiser.state_dict(),
                "ema": ema,
                "step": step + 1,
                "seconds": seconds,
                "curve": curve,
            }
            torch.save(state, path.with_suffix(".writing"))
            path.with_suffix(".writing").replace(path)


@torch.no_grad()
def measure_quality(
    teacher: TeacherNetwork,
    ema: dict[str, Tensor],
    vae: FrameAutoencoder,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    count: int,
) -> dict[str, float]:
    """Oracle accuracy of `count` samples (32 unguided Euler steps), and motion ratio to data."""
    averaged = TeacherNetwork(len(tokenizer)).to(device).eval()
    averaged.load_state_dict(ema)
    known = shapes.all_attributes()
    order = np.random.default_rng(1).permutation(len(known))
    attributes = [known[order[i % len(known)]] for i in range(count)]
    tokens = tokenizer(
        [shapes.caption(a) for a in attributes],
        padding="max_length",
        max_length=TEXT_LENGTH,
        return_tensors="pt",
    )
    text = averaged.text(tokens.input_ids.to(device), tokens.attention_mask.to(device))
    noise = torch.randn(
        count, 4, shapes.FRAMES, 8, 8, generator=torch.Generator().manual_seed(2)
    ).to(device)
    denoise = Denoiser(averaged.transformer, "teacher", Ledger(1))
    sigmas = teacher_sigmas(32, SHIFT).to(device)
    clips = np.concatenate(
        [
            to_clips(vae.decode(euler(denoise, n, sigmas, t)).cpu())
            for n, t in zip(noise.split(36), text.split(36), strict=True)
        ]
    )
    data = np.stack([shapes.render(a, 5_000_000 + i) for i, a in enumerate(attributes)])
    motion = float(shapes.centroid_speed(clips).mean() / shapes.centroid_speed(data).mean())
    return oracle_accuracy(clips, attributes) | {"motion_over_data": round(motion, 4)}


def write_pipeline(
    teacher: TeacherNetwork,
    ema: dict[str, Tensor],
    vae: FrameAutoencoder,
    tokenizer: PreTrainedTokenizerFast,
    curve: list[dict],
    options: argparse.Namespace,
) -> None:
    """Write the pipeline folder (float16 safetensors), all-or-nothing."""
    averaged = TeacherNetwork(len(tokenizer)).eval()
    averaged.load_state_dict(ema)
    folder = options.out.with_name(f".{options.out.name}.writing")
    shutil.rmtree(folder, ignore_errors=True)
    averaged.transformer.half().save_pretrained(folder / "transformer")
    averaged.text_encoder.half().save_pretrained(folder / "text_encoder")
    half = FrameAutoencoder.from_config(vae.config)
    half.load_state_dict(vae.state_dict())
    half.half().save_pretrained(folder / "vae")
    tokenizer.save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "vae": ["distill_bench.autoencoder", "FrameAutoencoder"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "prompts.txt").write_text(
        "".join(shapes.caption(a) + "\n" for a in shapes.all_attributes())
    )
    (folder / "README.md").write_text(quality_card(curve, options))
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(options.out)


def quality_card(curve: list[dict], options: argparse.Namespace) -> str:
    """Model card: command, seed, training curve and quality."""
    head = list(curve[-1])
    lines = [
        "# mini-wan",
        "",
        "A miniature of Wan (the same classes), trained on the captioned synthetic clips of",
        "`distill_bench/domain/shapes.py`.",
        "",
        (
            f"    distill-bench pretrain --steps {options.steps} --clips {options.clips} "
            f"--batch {options.batch} --lr {options.lr} "
            f"--autoencoder-steps {options.autoencoder_steps} --seed {options.seed}"
        ),
        "",
        "Share of samples whose attribute the oracle reads as captioned: 32 Euler steps, no",
        "guidance, moving average of the weights; 72 samples per row, 432 in the last row.",
        "`motion_over_data`: mean speed over that of rendered clips.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(str(row[k]) for k in head) + " |" for row in curve),
        "",
        (
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.seed=}. "
            "Licence: Apache-2.0."
        ),
    ]
    return "\n".join(lines) + "\n"


def set_lr(optimiser: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    warmup = min(1.0, (step + 1) / 100)
    for group in optimiser.param_groups:
        group["lr"] = peak * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def _console() -> Console:
    return Console(file=sys.stderr, quiet=not sys.stderr.isatty())
