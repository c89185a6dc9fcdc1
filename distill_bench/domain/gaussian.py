"""The gaussian teacher: data, scores and, for linear students, the exact fake score and divergences, all in closed form.

Given a prompt, data are N(m, C) with m = mean + text @ shifts. The noisy density is N((1 - s) m, K), K = (1 - s)^2 C + s^2 I,
so the clean prediction is m + (1 - s) C K^-1 (x_t - (1 - s) m). Guidance moves the mean alone: the guided teacher is the exact
denoiser of N(m_null + g (m - m_null), C). A linear student maps Gaussians to Gaussians, whatever its steps, and its fake score
is as exact.

    distill-bench gaussian --out FOLDER --frames 4 --size 2    another one: `teacher: FOLDER`
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_bench.draws import generator
from distill_bench.teachers.folder import GAUSSIAN_FILE
from distill_bench.teachers.texts import Texts

KNOTS = 9  # of the student's map in sigma
SPREAD = 0.5  # of the student's first samples: the teacher's own prediction at sigma 1 is its mean, without any


def noisy_covariance(covariance: Tensor, sigma: Tensor) -> Tensor:
    """K (B, d, d) of x_t for clean samples of covariance (d, d)."""
    s = sigma[:, None, None]
    return (1 - s) ** 2 * covariance + s**2 * torch.eye(
        covariance.shape[-1], dtype=covariance.dtype, device=covariance.device
    )


def velocity_of(x_t: Tensor, sigma: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """E[noise - x0 | x_t] = (s I - (1 - s) C) K^-1 (x_t - (1 - s) m) - m, for x_t (B, d), means (B, d); good down to sigma 0."""
    s = sigma[:, None]
    whitened = torch.linalg.solve(
        noisy_covariance(covariance, sigma), (x_t - (1 - s) * mean)[..., None]
    )[..., 0]
    return s * whitened - (1 - s) * whitened @ covariance - mean


def log_density(x_t: Tensor, sigma: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """log p(x_t) (B,), up to a constant of the dimension."""
    noisy, centred = noisy_covariance(covariance, sigma), x_t - (1 - sigma[:, None]) * mean
    return -0.5 * (
        (centred * torch.linalg.solve(noisy, centred[..., None])[..., 0]).sum(1)
        + torch.linalg.slogdet(noisy)[1]
    )


class GaussianBlock(nn.Module):
    """The denoiser of N(mean + text @ shifts, factor factor^T): the teacher, and a fake score that can be exact."""

    def __init__(self, mean: Tensor, shifts: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.mean, self.shifts = nn.Parameter(mean.clone()), nn.Parameter(shifts.clone())
        self.factor = nn.Parameter(torch.linalg.cholesky(covariance))

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Velocity as tokens (B, 1, d) of x_t (B, d)."""
        return velocity_of(x_t, sigma, self.mean + text @ self.shifts, self.factor @ self.factor.T)[
            :, None
        ]


class LinearBlock(nn.Module):
    """A velocity that is linear in x_t and in the text: the student. Its map is interpolated between KNOTS noise levels."""

    def __init__(self, mean: Tensor, shifts: Tensor, covariance: Tensor) -> None:
        super().__init__()
        s = torch.linspace(0, 1, KNOTS, dtype=mean.dtype)
        eye, column = torch.eye(len(mean), dtype=mean.dtype), s[:, None, None]
        inverse = torch.linalg.inv(noisy_covariance(covariance, s))
        # the teacher's own velocity, with some spread where it has none
        weight = (column * eye - (1 - column) * covariance) @ inverse - SPREAD * column**2 * eye
        away = -((1 - column) * weight + eye)  # what the velocity makes of the mean
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(away @ mean)
        self.shifts = nn.Parameter(shifts @ away.transpose(1, 2))

    def at(self, sigma: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The map (B, d, d) and offset (B, d) of the velocity at sigma (B,)."""
        place = sigma.clamp(0, 1) * (KNOTS - 1)
        below = place.floor().clamp(max=KNOTS - 2).long()
        share = (place - below).to(self.weight.dtype)
        weight = torch.lerp(self.weight[below], self.weight[below + 1], share[:, None, None])
        offset = self.bias + torch.einsum("be,ked->bkd", text, self.shifts)
        rows = torch.arange(len(sigma), device=sigma.device)
        return weight, torch.lerp(offset[rows, below], offset[rows, below + 1], share[:, None])

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Velocity as tokens (B, 1, d) of x_t (B, d)."""
        weight, offset = self.at(sigma, text)
        return (torch.einsum("bij,bj->bi", weight, x_t) + offset)[:, None]


class GaussianNet(nn.Module):
    """A block behind the call that diffusers' transformers have: (x_t, timestep, text) -> (velocity,)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def forward(
        self, x_t: Tensor, timestep: Tensor, text: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        velocity = self.blocks[0](x_t.flatten(1), timestep.to(x_t.dtype) / 1000, text[:, 0])
        return (velocity[:, 0].reshape(x_t.shape),)


@dataclass(frozen=True)
class GaussianPipeline:
    """The parts of a pipeline (`distill_bench.networks.pipeline.Pipeline`) whose data are Gaussian."""

    FILE: ClassVar[str] = GAUSSIAN_FILE
    fps: ClassVar[float | None] = None  # as of clips that say nothing of it

    folder: Path
    shape: tuple[int, int, int, int]  # (C, T, H, W)
    mean: Tensor  # (d,)
    shifts: Tensor  # (E, d)
    covariance: Tensor  # (d, d)
    transformer: nn.Module
    device: torch.device

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "GaussianPipeline":
        """The gaussian teacher of a folder."""
        shape = tuple(json.loads((folder / cls.FILE).read_text())["latent_shape"])
        tensors = {
            key: value.double() for key, value in load_file(folder / "gaussian.safetensors").items()
        }
        net = GaussianNet(GaussianBlock(**tensors)).float().to(device).requires_grad_(False)
        return cls(folder, shape, **tensors, transformer=net, device=device)

    def prompts(self) -> list[str]:
        """The training prompts, one a component of the text."""
        return [
            line for line in (self.folder / "prompts.txt").read_text().splitlines() if line.strip()
        ]

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Text embeddings (B, 1, E): one of E for each prompt of the teacher, zero for the empty one."""
        known = self.prompts()
        unknown = [prompt for prompt in prompts if prompt and prompt not in known]
        if unknown:
            raise ValueError(
                f"the gaussian teacher has no prompt {unknown[0]!r}; it has: {', '.join(known)}"
            )
        rows = [[float(prompt == each) for each in known] for prompt in prompts]
        return torch.tensor(rows, device=self.device)[:, None]

    def texts(self, prompts: list[str], dtype: torch.dtype = torch.float32) -> Texts:
        """The texts of prompts."""
        every = [*prompts, ""]
        return Texts(
            prompts, dict(zip(every, self.encode_text(every), strict=True)), self.device, dtype
        )

    def draw(self, shape: tuple[int, ...], _step: int, draws: torch.Generator) -> Tensor:
        """Noise (C, T, H, W) for a step of one clip."""
        return torch.randn(*shape, generator=draws)

    def latent_shape(self, *_: int) -> tuple[int, int, int, int]:
        """(C, T, H, W), whatever clips were asked for."""
        return self.shape

    def student(self) -> nn.Module:
        """A trainable linear student, off the teacher by SPREAD."""
        return self._net(LinearBlock)

    def fake_score(self) -> nn.Module:
        """A trainable copy of the teacher."""
        return self._net(GaussianBlock)

    def flops(self, *_: object) -> float:
        """Every role counts alike."""
        return 1.0

    def data(self, prompts: list[str], keys: Sequence[int]) -> Tensor:
        """Latents (B, C, T, H, W) drawn from the data."""
        noise = torch.stack(
            [torch.randn(len(self.mean), generator=generator("gaussian", key)) for key in keys]
        ).double()
        mean = self.mean + self.encode_text(prompts)[:, 0].double().cpu() @ self.shifts
        x0 = mean + noise @ torch.linalg.cholesky(self.covariance).T
        return x0.float().reshape(-1, *self.shape).to(self.device)

    def decode_video(self, latents: Tensor) -> Tensor:
        """Grey video (B, 3, 2 T, 16 H, 16 W) of latents (B, C, T, H, W): the mean channel, a third of it."""
        grey = latents.mean(1, keepdim=True) / 3
        for axis, times in ((-1, 16), (-2, 16), (-3, 2)):
            grey = grey.repeat_interleave(times, axis)
        return grey.expand(-1, 3, -1, -1, -1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames uint8 (B, 2 T, 3, 16 H, 16 W) of latents (B, C, T, H, W)."""
        return (
            ((self.decode_video(latents).clamp(-1, 1) + 1) * 127.5)
            .round()
            .to(torch.uint8)
            .transpose(1, 2)
            .cpu()
        )

    def exact_fake_score(
        self, student: nn.Module, sigmas: Tensor, stepping: str, exits: Sequence[int]
    ) -> "ExactFakeScore":
        """The fake score that tracks the student perfectly: of the mixture over the exit steps that training draws."""
        return ExactFakeScore(student, sigmas, stepping, exits)

    @torch.no_grad()
    def facts(
        self, student: nn.Module, sigmas: Tensor, stepping: str, guidance_scale: float
    ) -> dict[str, np.ndarray]:
        """Exact moments of the student's samples for each prompt, and those that it is to have (of the guided teacher)."""
        text = self.encode_text(self.prompts())[:, 0].double().cpu()  # the null text is 0
        block = LinearBlock(self.mean, self.shifts, self.covariance)
        block.load_state_dict(
            {k: v.detach().cpu().double() for k, v in student.blocks[0].state_dict().items()}
        )
        mean, covariance = step_moments(block, sigmas.double().cpu(), stepping, text)[-1]
        target = self.mean + guidance_scale * text @ self.shifts
        return {
            "mean": mean.numpy(),
            "covariance": covariance.numpy(),
            "target_mean": target.numpy(),
            "target_covariance": self.covariance.numpy(),
        }

    def _net(self, block: type[nn.Module]) -> nn.Module:
        return GaussianNet(block(self.mean, self.shifts, self.covariance)).float()


def step_moments(
    block: LinearBlock, sigmas: Tensor, stepping: str, text: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Means (B, d) and covariance (d, d) of the clean prediction at each step of a rollout (`distill_bench.rollout`)."""
    dtype = block.weight.dtype
    eye = torch.eye(block.weight.shape[-1], dtype=dtype, device=text.device)
    mean, covariance, steps = (
        torch.zeros(len(text), len(eye), dtype=dtype, device=text.device),
        eye,
        [],
    )
    for step, sigma in enumerate(sigmas.to(dtype)):
        weight, offset = block.at(sigma.expand(len(text)), text.to(dtype))
        weight = weight[0]  # of sigma alone
        clean = eye - sigma * weight
        steps.append((mean @ clean.T - sigma * offset, clean @ covariance @ clean.T))
        if step + 1 == len(sigmas):
            break
        lower = sigmas[step + 1].to(dtype)
        if stepping == "renoise":
            mean, covariance = (
                (1 - lower) * steps[-1][0],
                (1 - lower) ** 2 * steps[-1][1] + lower**2 * eye,
            )
        else:
            move = eye + (lower - sigma) * weight
            mean, covariance = mean @ move.T + (lower - sigma) * offset, move @ covariance @ move.T
    return steps


@dataclass(frozen=True)
class ExactFakeScore:
    """E[x0 | x_t] of the student's samples as they are now: each component's denoiser, weighted by its posterior."""

    student: nn.Module
    sigmas: Tensor
    stepping: str
    exits: Sequence[int]

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        flat, text = x_t.flatten(1), text[:, 0]
        with torch.no_grad():
            steps = step_moments(self.student.blocks[0], self.sigmas, self.stepping, text)
        parts = [tuple(moment.to(flat.dtype) for moment in steps[i]) for i in self.exits]
        clean = torch.stack(
            [flat - sigma[:, None] * velocity_of(flat, sigma, *part) for part in parts]
        )
        weight = torch.stack([log_density(flat, sigma, *part) for part in parts]).softmax(0)
        return (weight[..., None] * clean).sum(0).reshape(x_t.shape)

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        """Tokens (B, 1, d), as the network that it stands for has them."""
        return ((x_t - self(x_t, sigma, text)) / sigma.reshape(-1, 1, 1, 1, 1)).flatten(1)[:, None]


def build(
    out: Path, shape: tuple[int, int, int, int], prompts: int, condition: float, seed: int
) -> None:
    """Write a gaussian teacher: eigenvalues log-spaced over `condition` with mean 1, random axes, unit means."""
    d = math.prod(shape)
    draw = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64))
    values = torch.logspace(0, -math.log10(condition), d, dtype=torch.float64)
    covariance = axes @ torch.diag(values / values.mean()) @ axes.T
    tensors = {
        "mean": 0.5 * torch.randn(d, generator=draw, dtype=torch.float64),
        "shifts": 0.5 * torch.randn(prompts, d, generator=draw, dtype=torch.float64),
        "covariance": (covariance + covariance.T) / 2,
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "gaussian.safetensors")
    (out / GaussianPipeline.FILE).write_text(
        json.dumps({"latent_shape": list(shape), "condition": condition, "seed": seed}) + "\n"
    )
    (out / "prompts.txt").write_text("".join(f"component {i}\n" for i in range(prompts)))


def main(argv: list[str] | None = None) -> int:
    """Command line: build a gaussian teacher."""
    parser = argparse.ArgumentParser(
        prog="distill-bench gaussian", description=build.__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=4, help="T of the latents")
    parser.add_argument("--size", type=int, default=2, help="H and W of the latents")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument(
        "--condition", type=float, default=20.0, help="largest over smallest variance"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    build(
        options.out,
        (1, options.frames, options.size, options.size),
        options.prompts,
        options.condition,
        options.seed,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
