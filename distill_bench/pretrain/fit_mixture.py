"""Fit the students' network of the mixture teacher, and write the teacher's folder with a card."""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from distill_bench.domain.closed_form import FlatNetwork
from distill_bench.domain.mixture import (
    PROMPTS,
    SHAPE,
    Mixture,
    MixtureBlock,
    in_modes,
    joint_log_density,
    motion,
    motion_mixture,
    total_variation,
)
from distill_bench.domain.mixture_network import MixtureNetwork
from distill_bench.domain.mixture_teacher import write_mixture_teacher
from distill_bench.networks.denoiser import Denoiser
from distill_bench.networks.ledger import Ledger
from distill_bench.noise import add_noise, teacher_sigmas, warp
from distill_bench.rollout import euler
from distill_bench.store.progress import tracked

SHIFT = 2.0  # of the noise levels of the fit
SHIFT_OF_SAMPLES = 1.5  # where the exact teacher's mode weights are nearest the data's
EMA_DECAY = 0.999
WARMUP = 200  # steps
STEPS_OF_SAMPLES = 32
CHUNK = 2000  # samples per forward of the card's measurements


def fit_mixture(out: Path, steps: int, batch: int, lr: float, seed: int, samples: int) -> None:
    """Fit the network by flow matching, measure it, and write the folder of the teacher.

    The regression target is the marginal velocity, which is known here (Lipman et al., 2022, eq.
    5); its noisy estimate from single samples (eq. 9) has the same gradient on average. Runs with
    one thread, so that the same machine gives the same bits.

    Args:
        out: folder of the teacher.
        steps: optimiser steps.
        batch: samples per step.
        lr: highest learning rate; it rises for WARMUP steps and falls to 0 as a cosine.
        seed: of weights and draws.
        samples: per prompt, to measure the quality.
    """
    torch.set_num_threads(1)
    began = time.process_time()
    mixture = motion_mixture()
    teacher = FlatNetwork(MixtureBlock(mixture)).float().requires_grad_(False)
    torch.manual_seed(seed)
    net = FlatNetwork(MixtureNetwork(len(mixture.basis), len(mixture.weights)))
    average = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimiser = torch.optim.AdamW(net.parameters(), lr, (0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimiser,
        [
            torch.optim.lr_scheduler.LinearLR(optimiser, 1 / WARMUP, total_iters=WARMUP),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps - WARMUP),
        ],
        [WARMUP],
    )
    curve: list[tuple[int, float]] = []
    losses: list[float] = []
    for step in tracked(range(1, steps + 1), "fitting"):
        x_t, sigma, text = _noisy_batch(mixture, batch, seed, step)
        velocity = net(x_t, 1000 * sigma, text)[0]
        loss = (velocity - teacher(x_t, 1000 * sigma, text)[0]).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        decay = min(EMA_DECAY, step / (step + 10))
        torch._foreach_lerp_(list(average.values()), list(net.parameters()), 1 - decay)
        losses.append(loss.item())
        if step % max(1, steps // 8) == 0:
            curve.append((step, sum(losses) / len(losses)))
            losses.clear()
            print(f"step {step}/{steps} loss {curve[-1][1]:.6f}", flush=True)
    net.load_state_dict(average)
    minutes = (time.process_time() - began) / 60
    write_mixture_teacher(out, mixture, list(PROMPTS), SHAPE, net)
    options = argparse.Namespace(
        steps=steps, batch=batch, lr=lr, seed=seed, samples=samples, minutes=minutes
    )
    (out / "README.md").write_text(_card(mixture, net, teacher, curve, options), encoding="utf-8")


def _noisy_batch(mixture: Mixture, batch: int, seed: int, step: int) -> tuple[Tensor, ...]:
    """Noisy data (B, C, T, H, W), noise levels (B,) and texts (B, 1, P), keyed by seed and step.

    One text in P + 1 is the null text.
    """
    draws = torch.Generator().manual_seed(seed * 1_000_003 + step)
    count = len(mixture.weights)
    prompt = torch.randint(count + 1, (batch,), generator=draws)
    text = torch.eye(count + 1)[prompt, :count]
    weights = torch.cat([mixture.weights, mixture.weights.mean(0, keepdim=True)])
    mode = torch.multinomial(weights[prompt], 1, generator=draws)[:, 0]
    z = torch.randn(batch, len(mixture.basis), generator=draws)
    x0 = in_modes(mixture, mode, z).reshape(-1, *SHAPE)
    noise = torch.randn(x0.shape, generator=draws)
    sigma = warp(torch.rand(batch, generator=draws), SHIFT)
    return add_noise(x0, noise, sigma), sigma, text[:, None]


@torch.no_grad()
def sampled(
    net: nn.Module, prompt: int, prompts: int, samples: int, steps: int = STEPS_OF_SAMPLES
) -> Tensor:
    """Latents (N, d) of Euler steps from fixed noise, without guidance."""
    text = torch.eye(prompts)[prompt].expand(CHUNK, 1, prompts)
    sigmas = teacher_sigmas(steps, SHIFT_OF_SAMPLES)
    denoise = Denoiser(net, "teacher", Ledger(1))
    draws = torch.Generator().manual_seed(prompt)
    noise = torch.randn(samples, *SHAPE, generator=draws)
    chunks = [euler(denoise, part, sigmas, text[: len(part)]) for part in noise.split(CHUNK)]
    return torch.cat(chunks).flatten(1).double()


def mode_shares(mixture: Mixture, x: Tensor, weights: Tensor) -> Tensor:
    """Share (M,) of the samples x (N, d) that belong to each mode, given its weight (M,)."""
    mode = joint_log_density(mixture, x, weights).argmax(1)
    return torch.bincount(mode, minlength=len(weights)) / len(x)


def _card(
    mixture: Mixture,
    net: nn.Module,
    teacher: nn.Module,
    curve: list[tuple[int, float]],
    options: argparse.Namespace,
) -> str:
    """The folder's README: the data, the fit, and the quality of the network's own samples."""
    count = len(mixture.weights)
    rows = []
    for prompt, name in enumerate(PROMPTS):
        weights = mixture.weights[prompt]
        cells, shares = [name], []
        for role in (net, teacher):
            x = sampled(role, prompt, count, options.samples)
            shares.append(mode_shares(mixture, x, weights))
            distance = float(total_variation(shares[-1], weights))
            cells += [f"{distance:.4f}", f"{float(motion(mixture, x).mean()):.3f}"]
        cells.append(f"{float(total_variation(*shares)):.4f}")
        floor = _sampling_floor(weights, options.samples)
        rows.append("| " + " | ".join([*cells, f"{floor:.4f}"]) + " |")
    arguments = " ".join(
        f"--{name} {value}"
        for name, value in vars(options).items()
        if name in ("steps", "batch", "lr", "seed", "samples")
    )
    parameters = sum(p.numel() for p in net.parameters())
    return CARD.format(
        modes=len(mixture.means),
        latents=len(mixture.basis),
        parameters=parameters,
        arguments=arguments,
        minutes=options.minutes,
        torch=torch.__version__,
        curve="\n".join(f"| {step} | {loss:.6f} |" for step, loss in curve),
        samples=options.samples,
        sampling_steps=STEPS_OF_SAMPLES,
        shift=SHIFT_OF_SAMPLES,
        rows="\n".join(rows),
    )


def _sampling_floor(weights: Tensor, samples: int, repeats: int = 200) -> float:
    """Mean total variation of the mode weights of exact samples."""
    draws = torch.Generator().manual_seed(0)
    modes = torch.multinomial(weights, repeats * samples, True, generator=draws)
    counts = torch.stack([m.bincount(minlength=len(weights)) for m in modes.chunk(repeats)])
    return float((counts / samples - weights).abs().sum(1).mean() / 2)


CARD = """\
# The mixture teacher

A Gaussian mixture of {modes} modes in {latents} dimensions, exact at every noise level
(`distill_bench/domain/mixture.py`). `network.safetensors` holds the weights that students and fake
scores start from: a perceptron with {parameters} parameters
(`distill_bench/domain/mixture_network.py`), fitted to the teacher by flow matching.

    distill-bench pretrain --mixture {arguments}

took {minutes:.1f} minutes of CPU time with one thread (torch {torch}). Mean squared error of the
velocity per element, mean since the row above; the data have variance 1:

| step | error |
|---|---|
{curve}

Quality of {samples} samples per prompt, {sampling_steps} Euler steps, shift {shift:g}, no guidance:
total variation of their mode weights from the data's, and their mean motion. Network and teacher
start from the same noise; "apart" is the total variation between their mode weights. The floor is
the distance of as many exact samples. The teacher is exact: its distance is that of the steps.

| prompt | network | motion | teacher | motion | apart | floor |
|---|---|---|---|---|---|---|
{rows}
"""
