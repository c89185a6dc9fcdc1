"""The mixture teacher: a closed-form mixture and the weights of its students in a folder.

`distill-bench pretrain --mixture` writes the folder.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_bench.domain.closed_form import PROMPTS_FILE, ClosedFormPipeline, FlatNetwork
from distill_bench.domain.controls import Damage, prompt_means, random_share
from distill_bench.domain.latent_clips import dithered, grey_video, undithered
from distill_bench.domain.mixture import Mixture, MixtureBlock, transported, with_motion
from distill_bench.domain.mixture_network import MixtureNetwork
from distill_bench.draws import generator
from distill_bench.noise import Stepping
from distill_bench.store.files import read_text
from distill_bench.teachers.folder import TeacherError
from distill_bench.teachers.kinds import ClosedFormTeacher

MARKER = "mixture.json"  # as in `distill_bench.teachers.kinds.CLOSED_FORM`
PARAMETERS_FILE = "mixture.safetensors"
NETWORK_FILE = "network.safetensors"


@dataclass(frozen=True)
class MixtureTeacher(ClosedFormTeacher):
    """The folder of a mixture teacher."""

    kind: ClassVar[str] = "mixture"
    has_exact_fake_score: ClassVar[bool] = False
    shares_architecture: ClassVar[bool] = True

    def load(self, device: torch.device) -> "MixturePipeline":
        """The loaded teacher: network in float32 on a device, parameters in float64 on the CPU."""
        shape = tuple(json.loads(read_text(self.folder / MARKER))["latent_shape"])
        tensors = load_file(self.folder / PARAMETERS_FILE)
        mixture = Mixture(**{name: value.double() for name, value in tensors.items()})
        net = FlatNetwork(MixtureBlock(mixture)).float().to(device).requires_grad_(False)
        return MixturePipeline(self.folder, device, shape, net, mixture)


@dataclass(frozen=True)
class MixturePipeline(ClosedFormPipeline):
    """A loaded mixture teacher (`distill_bench.teachers.kinds.Pipeline`)."""

    kind: ClassVar[str] = "mixture"

    mixture: Mixture

    def student(self) -> nn.Module:
        """New trainable network with the shipped weights, fitted to the teacher."""
        latents, prompts = len(self.mixture.basis), len(self.mixture.weights)
        net = FlatNetwork(MixtureNetwork(latents, prompts))
        try:
            net.load_state_dict(load_file(self.folder / NETWORK_FILE))
        except (OSError, RuntimeError) as error:
            raise TeacherError(
                f"{self.folder / NETWORK_FILE} cannot be loaded; run `distill-bench pretrain "
                "--mixture`"
            ) from error
        return net

    def fake_score(self) -> nn.Module:
        """New trainable network, equal to the student."""
        return self.student()

    def has_clips(self, prompts: list[str]) -> bool:
        """True: the data of every prompt can be drawn."""
        return True

    def data(self, prompts: list[str], keys: Sequence[int]) -> Tensor:
        """Latents (B, C, T, H, W) drawn from the data, one per prompt and key."""
        known = self.prompts()
        draws = [generator("mixture", key) for key in keys]
        share = torch.cat([torch.rand(1, generator=g) for g in draws])
        noise = torch.stack([torch.randn(len(self.mixture.basis), generator=g) for g in draws])
        rows = [known.index(prompt) for prompt in prompts]
        x0 = transported(self.mixture, rows, share, noise)
        return x0.reshape(-1, *self.shape).to(self.device)

    def controls(self, prompts: list[str]) -> dict[str, Damage]:
        """Controls that change the motion of the modes, which blended or frozen frames do not.

        `slowed` halves the motion of each clip, `stilled` gives a random quarter none, and
        `equalised` gives all clips of a prompt their mean motion, with their own headings.
        """
        return {
            "slowed": lambda frames, seed: self._changed(frames, lambda z: z / 2),
            "stilled": lambda frames, seed: self._changed(frames, lambda z: _stilled(z, seed)),
            "equalised": lambda frames, seed: self._changed(
                frames, lambda z: _equalised(z, prompts)
            ),
        }

    def _changed(self, frames: np.ndarray, change: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Frames whose motion coordinates z (B, 2) are change(z); all other axes keep theirs."""
        x = undithered(frames, self.shape).flatten(1)
        changed = with_motion(self.mixture, x, change(x @ self.mixture.basis[:, :2]))
        return dithered(changed.reshape(-1, *self.shape)).numpy()

    def encode(self, frames: np.ndarray) -> Tensor:
        """Latents (B, C, T, H, W) of frames uint8 (B, F, 3, Y, X) made by `decode`."""
        return undithered(frames, self.shape).float().to(self.device)

    def decode_video(self, latents: Tensor) -> Tensor:
        """Grey video (B, 3, F, Y, X) of latents (B, C, T, H, W); differentiable."""
        return grey_video(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames uint8 (B, F, 3, Y, X) of latents (B, C, T, H, W), dithered, on the CPU."""
        return dithered(latents)

    def facts(
        self,
        net: nn.Module | None,
        sigmas: Tensor,
        stepping: Stepping,
        target_guidance: float,
        guidance_scale: float = 1.0,
    ) -> dict[str, np.ndarray]:
        """Parameters of the mixture, its `prompts`, and the `latent_shape`, for every row."""
        parameters = {name: value.numpy() for name, value in self.mixture.tensors().items()}
        shape = np.array(self.shape)
        return parameters | {"prompts": np.array(self.prompts()), "latent_shape": shape}


def _stilled(z: Tensor, seed: int) -> Tensor:
    """Motion coordinates z (B, 2), a random quarter of them 0."""
    moving = torch.ones(len(z), 1, dtype=z.dtype)
    moving[random_share(len(z), seed)] = 0
    return moving * z


def _equalised(z: Tensor, prompts: Sequence[str]) -> Tensor:
    """Motion coordinates z (B, 2) at the mean norm of their prompt, with their own headings."""
    norm = z.norm(dim=1)
    mean = torch.from_numpy(prompt_means(norm.numpy(), prompts))
    return mean[:, None] * z / norm.clamp(min=1e-12)[:, None]


def write_mixture_teacher(
    out: Path, mixture: Mixture, prompts: Sequence[str], shape: Sequence[int], network: nn.Module
) -> None:
    """Write a folder of a mixture teacher.

    Args:
        out: the folder.
        mixture: with one row of weights per prompt.
        prompts: names of the rows.
        shape: of the latents, (C, T, H, W).
        network: the fitted `MixtureNetwork`, as a `FlatNetwork`.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in mixture.tensors().items()}
    save_file(tensors, out / PARAMETERS_FILE)
    save_file(network.state_dict(), out / NETWORK_FILE)
    (out / MARKER).write_text(json.dumps({"latent_shape": list(shape)}) + "\n", encoding="utf-8")
    (out / PROMPTS_FILE).write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
