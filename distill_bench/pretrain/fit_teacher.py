"""Train mini-wan, the embedded teacher, by flow matching on the autoencoder's latents.

The learning rate is constant and falls linearly to 0 over the last `--decay-steps`. A checkpoint of
the constant phase is kept, from which a run with more `--steps` goes on.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distill_bench.autoencoder import FrameAutoencoder
from distill_bench.noise import add_noise, x0_to_velocity
from distill_bench.pretrain.network import TeacherNetwork, make_tokenizer, tokens
from distill_bench.pretrain.quality import measure_quality
from distill_bench.pretrain.write_teacher import RECIPE, write_pipeline

NULL_PROBABILITY = 0.1  # of dropping a caption, for guidance
EMA_DECAY = 0.9995
# Noise levels are logit-normal (Esser et al., 2024, section 3.1). Headings and speeds are decided
# at sigma 0.5 to 0.9, and 72 % of the draws lie between 0.4 and 0.9.
SIGMA_LOGIT_MEAN, SIGMA_LOGIT_SD = 1.2, 1.2
# Losses are divided by the running mean of their noise level (Karras et al., 2024, section 3.2, in
# bins), once the means have settled: otherwise the highest and lowest levels, whose losses are five
# times those at sigma 0.4 to 0.7 and mostly irreducible, dominate the gradient's noise.
LEVELS = 20
WEIGHTED_FROM = 300  # step
ALIKE = 128  # clips of a caption over which a target is averaged
AVERAGED_FROM = 0.8  # noise level below which only the noised clip itself fits
WARMUP_STEPS = 200
PROGRESS = ("step", "seconds", "loss", "level_loss", "curve")  # of a checkpoint
CHECKPOINT_STEPS = 500


class CheckpointError(ValueError):
    """The work folder holds a run of another recipe."""


@dataclass
class Progress:
    """State of a training run, as in its checkpoint."""

    teacher: TeacherNetwork
    average: AveragedModel
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0
    loss: float | None = None  # running mean
    level_loss: Tensor = field(default_factory=lambda: torch.ones(LEVELS))  # the same per level
    curve: list[dict[str, float]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Contents of a checkpoint."""
        modules = [self.teacher, self.average, *self.optimizers]
        values = {k: getattr(self, k) for k in PROGRESS}
        return {"modules": [module.state_dict() for module in modules]} | values

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the contents of a checkpoint."""
        modules = [self.teacher, self.average, *self.optimizers]
        for module, weights in zip(modules, state["modules"], strict=True):
            module.load_state_dict(weights)
        for name in PROGRESS:
            setattr(self, name, state[name])


def train_teacher(
    vae: FrameAutoencoder,
    captions: list[str],
    latents: Tensor,
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """Train on latents (N, 4, T, 8, 8) and their captions; write a pipeline at each evaluation."""
    tokenizer = make_tokenizer()
    progress = new_progress(options, len(tokenizer), device)
    resume(progress, options)
    update = make_update(progress, tokens(tokenizer, [*captions, ""]), latents, options, device)
    while progress.step < options.steps:
        began = time.monotonic()
        value = update()
        progress.seconds += time.monotonic() - began
        progress.loss = value if progress.loss is None else 0.99 * progress.loss + 0.01 * value
        step, last = progress.step, progress.step == options.steps
        if step % 50 == 0:
            print(
                f"teacher {step}/{options.steps} loss {progress.loss:.4f} {progress.seconds:.0f} s",
                flush=True,
            )
        if last or step % options.every == 0:
            quality = measure_quality(progress.average.module, vae, tokenizer, latents, last)
            row = {
                "step": step,
                "loss": round(progress.loss, 4),
                "seconds": round(progress.seconds),
            }
            progress.curve.append(row | quality)
            print(json.dumps(progress.curve[-1]), flush=True)
            write_pipeline(progress.average.module, vae, tokenizer, progress.curve, options)
        if last or step % CHECKPOINT_STEPS == 0:
            save_checkpoint(progress, options, "teacher.pt")
        if step == options.steps - options.decay_steps:
            save_checkpoint(progress, options, "teacher_constant.pt")


def new_progress(options: argparse.Namespace, vocabulary: int, device: torch.device) -> Progress:
    """Initial state: seeded weights, and a moving average that starts as their mean."""
    torch.manual_seed(options.seed)
    teacher = TeacherNetwork(vocabulary).to(device)
    average = AveragedModel(teacher, multi_avg_fn=_average)
    matrices = [p for p in teacher.transformer.blocks.parameters() if p.ndim == 2]
    others = [p for p in teacher.parameters() if all(p is not matrix for matrix in matrices)]
    # At 500 updates Muon (Jordan et al., 2024) is where AdamW alone is after 1.4 times as many.
    optimizers = [
        torch.optim.Muon(
            matrices, options.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, options.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    ]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return Progress(teacher, average, optimizers)


def resume(progress: Progress, options: argparse.Namespace) -> None:
    """Continue from the newest checkpoint in the work folder whose learning rates agree so far.

    Raises:
        CheckpointError: if the checkpoint is of another recipe.
    """
    planned = (options.steps, options.decay_steps)
    for name in ("teacher.pt", "teacher_constant.pt"):
        path = options.work / name
        if not path.is_file():
            continue
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for key, value in saved["recipe"].items():
            if getattr(options, key) != value:
                flag = "--" + key.replace("_", "-")
                raise CheckpointError(
                    f"{flag} {getattr(options, key)}: {path} is of a run with {flag} {value}; "
                    "continue that run, or name another folder by --work"
                )
        constant_until = min(steps - decay for steps, decay in (planned, saved["schedule"]))
        if saved["schedule"] == planned or saved["step"] <= constant_until:
            progress.restore(saved)
            print(f"resuming from step {progress.step} of {path}", flush=True)
            return


def save_checkpoint(progress: Progress, options: argparse.Namespace, name: str) -> None:
    """Write a checkpoint to the work folder, all-or-nothing."""
    path: Path = options.work / name
    state = progress.state() | {
        "schedule": (options.steps, options.decay_steps),
        "recipe": {key: getattr(options, key) for key in RECIPE},
    }
    torch.save(state, path.with_suffix(".writing"))
    path.with_suffix(".writing").replace(path)


def make_update(
    progress: Progress,
    captions: tuple[Tensor, Tensor],
    latents: Tensor,
    options: argparse.Namespace,
    device: torch.device,
) -> Callable[[], float]:
    """A function that makes one update of the network and its average, and returns the loss.

    Draws depend on the seed and the step alone, so that a resumed run has the same bits.

    Args:
        progress: the run.
        captions: token ids and mask of the captions of the latents, and of the empty caption last.
        latents: (N, 4, T, 8, 8).
        options: `batch`, `seed`, `steps`, `decay_steps` and `compile`.
        device: of the network.
    """
    teacher, optimizers = progress.teacher, progress.optimizers
    ids, mask = (x.to(device) for x in captions)
    null = len(latents)  # index of the empty caption
    same_caption = clips_by_caption(captions[0][:null])
    forward = torch.compile(teacher.transformer) if options.compile else teacher.transformer

    def update() -> float:
        draw = torch.Generator().manual_seed(options.seed * 1_000_003 + progress.step)
        index = torch.randint(len(latents), (options.batch,), generator=draw)
        dropped = torch.rand(options.batch, generator=draw) < NULL_PROBABILITY
        logit = SIGMA_LOGIT_MEAN + SIGMA_LOGIT_SD * torch.randn(options.batch, generator=draw)
        sigma = logit.sigmoid().to(device)
        noise = torch.randn(options.batch, *latents.shape[1:], generator=draw).to(device)
        x0 = latents[index].to(device)
        caption = torch.where(dropped, null, index).to(device)
        alike = clips_alike(index, dropped, same_caption, draw)
        text = teacher.text(ids[caption], mask[caption])
        x_t = add_noise(x0, noise, sigma)
        velocity = forward(x_t, 1000 * sigma, text, return_dict=False)[0]
        # flow matching (Lipman et al., 2022), one loss per clip
        averaged = (sigma > AVERAGED_FROM).nonzero()[:, 0]
        clips = latents[alike[averaged.cpu()]].to(device)
        x0 = x0.index_copy(0, averaged, posterior_mean(x_t[averaged], sigma[averaged], clips))
        target = x0_to_velocity(x0, x_t, sigma)
        losses = (velocity - target).square().mean((1, 2, 3, 4))
        weights = level_weights(progress, sigma, losses.detach())
        teacher.zero_grad()
        (weights * losses).mean().backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        factor = schedule(progress.step, options)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak_lr"]
            optimizer.step()
        progress.average.update_parameters(teacher)
        progress.step += 1
        return losses.mean().item()

    return update


def clips_by_caption(ids: Tensor) -> list[Tensor]:
    """For each caption (N, L), the indices of all equal ones; equal captions share one tensor."""
    _, own = ids.unique(dim=0, return_inverse=True)
    members = own.argsort(stable=True).split(own.bincount().tolist())
    return [members[i] for i in own.tolist()]


def clips_alike(
    index: Tensor, dropped: Tensor, same_caption: list[Tensor], draw: torch.Generator
) -> Tensor:
    """Clips (B, ALIKE) that may have been the clips (B,): themselves, then random ones.

    The random ones have the same caption, or any if the caption is dropped.
    """
    ranks = torch.rand(len(index), ALIKE - 1, generator=draw)
    rows = []
    for i, without, rank in zip(index.tolist(), dropped.tolist(), ranks, strict=True):
        others = torch.arange(len(same_caption)) if without else same_caption[i]
        if len(others) > 1:
            others = others[others != i]
        rows.append(others[(rank * len(others)).long()])
    return torch.cat([index[:, None], torch.stack(rows)], 1)


def posterior_mean(x_t: Tensor, sigma: Tensor, clips: Tensor) -> Tensor:
    """Expected clean latents (B, C, T, H, W) of x_t, if it came from one of its clips.

    As target of the regression it has the same expectation as the clip that was noised, and less
    variance at high noise (stable target field: Xu et al., 2023, eq. 6).

    Args:
        x_t: noisy latents, (B, C, T, H, W).
        sigma: their noise levels, (B,).
        clips: latents (B, N, C, T, H, W), equally probable.
    """
    flat, clean = clips.flatten(2), (1 - sigma)[:, None]
    # of -|x_t - (1 - sigma) x0|^2 / (2 sigma^2), the terms that depend on x0
    product = torch.bmm(flat, x_t.flatten(1)[:, :, None])[:, :, 0]
    squares = torch.linalg.vector_norm(flat, dim=2).square()
    weights = ((clean * product - clean**2 * squares / 2) / sigma[:, None] ** 2).softmax(1)
    return torch.bmm(weights[:, None], flat).reshape(x_t.shape)


def level_weights(progress: Progress, sigma: Tensor, losses: Tensor) -> Tensor:
    """Weights (B,) of the losses (B,) at noise levels (B,); updates the levels' running means."""
    means = progress.level_loss
    level = (sigma.cpu() * LEVELS).long().clamp(max=LEVELS - 1)
    weights = (means.mean() / means[level]).to(losses)
    for i, loss in zip(level.tolist(), losses.tolist(), strict=True):
        means[i] += 0.01 * (loss - means[i])
    return weights if progress.step >= WEIGHTED_FROM else torch.ones_like(losses)


def schedule(step: int, options: argparse.Namespace) -> float:
    """Learning rate over its peak: warm-up, constant, and a linear fall to 0 at the last step."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    left = (options.steps - step) / max(options.decay_steps, 1)
    return warmup * min(1.0, left)


def _average(means: list[Tensor], values: list[Tensor], count: Tensor) -> None:
    """Update the moving average; its window grows with the `count` of updates."""
    get_ema_multi_avg_fn(min(EMA_DECAY, (int(count) + 1) / (int(count) + 20)))(means, values, count)
