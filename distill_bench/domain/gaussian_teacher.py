"""The Gaussian teacher: mean, shifts and covariance in a folder instead of a pipeline.

distill-bench gaussian --out FOLDER --frames 4 --size 2    write a teacher, for `teacher: FOLDER`
"""

import argparse
import copy
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

from distill_bench.autoencoder import video_to_frames
from distill_bench.domain.closed_form import (
    PROMPTS_FILE,
    ClosedFormPipeline,
    FlatNetwork,
    enlarged,
)
from distill_bench.domain.gaussian import (
    DataSamples,
    ExactFakeScore,
    GaussianBlock,
    LinearBlock,
    RolloutSamples,
    step_moments,
)
from distill_bench.draws import generator
from distill_bench.noise import Stepping
from distill_bench.teachers.folder import TeacherError
from distill_bench.teachers.kinds import ClosedFormTeacher, RealLatents

MARKER = "gaussian.json"  # as in `distill_bench.teachers.kinds.CLOSED_FORM`
MOMENTS_FILE = "gaussian.safetensors"


@dataclass(frozen=True)
class GaussianTeacher(ClosedFormTeacher):
    """The folder of a Gaussian teacher."""

    kind: ClassVar[str] = "gaussian"

    def load(self, device: torch.device) -> "GaussianPipeline":
        """The loaded teacher: network in float32 on a device, moments in float64 on the CPU."""
        shape = tuple(json.loads((self.folder / MARKER).read_bytes())["latent_shape"])
        moments = {
            name: value.double() for name, value in load_file(self.folder / MOMENTS_FILE).items()
        }
        net = FlatNetwork(GaussianBlock(**moments)).float().to(device).requires_grad_(False)
        return GaussianPipeline(self.folder, device, shape, net, **moments)


@dataclass(frozen=True)
class GaussianPipeline(ClosedFormPipeline):
    """A loaded Gaussian teacher (`distill_bench.teachers.kinds.Pipeline`)."""

    kind: ClassVar[str] = "gaussian"

    mean: Tensor  # (d,) with d = C T H W
    shifts: Tensor  # (E, d)
    covariance: Tensor  # (d, d)

    def student(self) -> nn.Module:
        """New trainable linear student; it differs from the teacher by SPREAD."""
        return self._new_net(LinearBlock)

    def fake_score(self) -> nn.Module:
        """New trainable copy of the teacher."""
        return self._new_net(GaussianBlock)

    def _new_net(self, block: type[nn.Module]) -> nn.Module:
        return FlatNetwork(block(self.mean, self.shifts, self.covariance)).float()

    def has_clips(self, prompts: list[str]) -> bool:
        """False: no evaluator of these students reads frames."""
        return False

    def data(self, prompts: list[str], keys: Sequence[int]) -> Tensor:
        """Latents (B, C, T, H, W) drawn from the data, one per prompt and key."""
        noise = torch.stack(
            [torch.randn(len(self.mean), generator=generator("gaussian", key)) for key in keys]
        ).double()
        mean = self.mean + self.encode_text(prompts)[:, 0].double().cpu() @ self.shifts
        x0 = mean + noise @ torch.linalg.cholesky(self.covariance).T
        return x0.float().reshape(-1, *self.shape).to(self.device)

    def encode(self, frames: np.ndarray) -> Tensor:
        """Raise an error, because frames do not determine the latents.

        Raises:
            TeacherError: always.
        """
        raise TeacherError("a gaussian teacher cannot encode clips: it draws its own real latents")

    def decode_video(self, latents: Tensor) -> Tensor:
        """Grey video (B, 3, 2 T, 16 H, 16 W): a third of the mean over channels."""
        return enlarged(latents.mean(1, keepdim=True) / 3, frames=2, pixels=16)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames uint8 (B, 2 T, 3, 16 H, 16 W) of latents (B, C, T, H, W)."""
        return video_to_frames(self.decode_video(latents))

    def exact_fake_score(
        self,
        student: nn.Module,
        sigmas: Tensor,
        stepping: Stepping,
        exits: Sequence[int],
        data: RealLatents | None,
    ) -> ExactFakeScore:
        """The fake score of the student's own density."""
        if data is None:
            return ExactFakeScore(student, RolloutSamples(sigmas, stepping, exits))
        rows = data.every()
        x0, text = rows["x0"].flatten(1).to(self.device), rows["text"][:, 0].to(self.device)
        return ExactFakeScore(student, DataSamples(sigmas, exits, x0, text))

    @torch.no_grad()
    def facts(
        self,
        net: nn.Module | None,
        sigmas: Tensor,
        stepping: Stepping,
        target_guidance: float,
        guidance_scale: float = 1.0,
    ) -> dict[str, np.ndarray]:
        """Exact moments of a network's samples and of their target, the guided teacher.

        Returns:
            `mean` and `target_mean` (E, d); `covariance` and `target_covariance` (d, d). Empty for
            rows of no network.
        """
        if net is None:
            return {}
        # the null text is 0 and velocities are affine in the text, so guidance scales the text
        text = self.encode_text(self.prompts())[:, 0].double().cpu()
        block = copy.deepcopy(net.blocks[0]).double().cpu()
        levels = sigmas.double().cpu()
        mean, covariance = step_moments(block, levels, stepping, guidance_scale * text)[-1]
        target_mean = self.mean + target_guidance * text @ self.shifts
        return {
            "mean": mean.numpy(),
            "covariance": covariance.numpy(),
            "target_mean": target_mean.numpy(),
            "target_covariance": self.covariance.numpy(),
        }


def write_gaussian_teacher(
    out: Path, shape: tuple[int, int, int, int], prompts: int, condition: float, seed: int
) -> None:
    """Write a Gaussian teacher with random moments.

    Args:
        out: the new folder.
        shape: latents, (C, T, H, W).
        prompts: number of prompts.
        condition: largest over smallest variance; the eigenvalues are log-spaced and have mean 1.
        seed: of the random axes and means.
    """
    d = math.prod(shape)
    draw = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64))
    values = torch.logspace(0, -math.log10(condition), d, dtype=torch.float64)
    covariance = axes @ torch.diag(values / values.mean()) @ axes.T
    moments = {
        "mean": 0.5 * torch.randn(d, generator=draw, dtype=torch.float64),
        "shifts": 0.5 * torch.randn(prompts, d, generator=draw, dtype=torch.float64),
        "covariance": (covariance + covariance.T) / 2,
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(moments, out / MOMENTS_FILE)
    marker = {"latent_shape": list(shape), "condition": condition, "seed": seed}
    (out / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
    (out / PROMPTS_FILE).write_text(
        "".join(f"component {i}\n" for i in range(prompts)), encoding="utf-8"
    )


def main(argv: list[str] | None = None) -> int:
    """Command line: write a Gaussian teacher."""
    parser = argparse.ArgumentParser(
        prog="distill-bench gaussian", description="write a Gaussian teacher with random moments"
    )
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    parser.add_argument("--frames", type=int, default=4, help="T of the latents")
    parser.add_argument("--size", type=int, default=2, help="H and W of the latents")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument(
        "--condition", type=float, default=20.0, help="largest over smallest variance"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    write_gaussian_teacher(
        options.out,
        (1, options.frames, options.size, options.size),
        options.prompts,
        options.condition,
        options.seed,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
