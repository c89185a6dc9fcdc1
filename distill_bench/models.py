"""Pipelines and their networks: everything that knows diffusers lies here, and ends in a `Denoiser`.

A teacher is a diffusers pipeline folder (`transformer/`, `scheduler/`, `text_encoder/`, `tokenizer/`, optional `vae/`), local
or by hub name; `mini-wan` is the one that ships with the package. Latent axes are always B, C, T, H, W.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, UMT5EncoderModel

from distill_bench import shapes
from distill_bench.adapters import Adapted
from distill_bench.autoencoder import FrameAutoencoder
from distill_bench.cost import Ledger
from distill_bench.gaussian import GaussianPipeline
from distill_bench.noise import velocity_to_x0
from distill_bench.sharding import Reached
from distill_bench.teacher import TeacherError, is_gaussian, teacher_folder

AUTOENCODERS = {"AutoencoderKLWan": AutoencoderKLWan, "FrameAutoencoder": FrameAutoencoder}


@dataclass(frozen=True)
class Pipeline:
    """The parts of a diffusers pipeline folder that are needed to train and to sample."""

    folder: Path
    transformer: nn.Module
    vae: nn.Module | None
    device: torch.device

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Text embeddings (B, L, D); padding is zero, as WanPipeline makes it. The empty prompt is the null text."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        encoder = UMT5EncoderModel.from_pretrained(self.folder / "text_encoder", dtype=torch.float32)
        encoder = encoder.to(self.device).eval()
        length = min(tokenizer.model_max_length, 512)
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        with torch.no_grad():
            chunks = [encoder(i, m).last_hidden_state for i, m in zip(ids.split(64), mask.split(64), strict=True)]
        return torch.cat(chunks).float() * mask.unsqueeze(-1)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip; without an autoencoder latents are pixels."""
        channels = self.transformer.config.in_channels
        if self.vae is None:
            return channels, frames, height, width
        if isinstance(self.vae, AutoencoderKLWan):
            temporal, spatial = self.vae.config.scale_factor_temporal, self.vae.config.scale_factor_spatial
            return channels, (frames - 1) // temporal + 1, height // spatial, width // spatial
        with torch.no_grad():
            return tuple(self.vae.encode(torch.zeros(1, 3, frames, height, width, device=self.device)).shape[1:])

    def student(self) -> nn.Module:
        """A trainable float32 copy of the teacher's network, where the student begins."""
        return load_transformer(self.folder)

    def fake_score(self) -> nn.Module:
        """A trainable float32 copy of the teacher's network, where the fake score begins."""
        return load_transformer(self.folder)

    def decode_video(self, latents: Tensor) -> Tensor:
        """Video (B, 3, T, H, W), about [-1, 1], of latents (B, C, T, H, W); differentiable."""
        if self.vae is None:
            return latents
        if isinstance(self.vae, AutoencoderKLWan):
            mean, std = self._wan_statistics()
            return self.vae.decode(latents * std + mean).sample
        return self.vae.decode(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames uint8 (B, T, 3, H, W) of latents (B, C, T, H, W)."""
        frames = ((self.decode_video(latents).float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return frames.transpose(1, 2).cpu()

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Latents (B, C, T, H, W) of frames uint8 (B, T, 3, H, W)."""
        video = torch.from_numpy(frames).to(self.device).float().transpose(1, 2) / 127.5 - 1
        if self.vae is None:
            return video
        if isinstance(self.vae, AutoencoderKLWan):
            mean, std = self._wan_statistics()
            return (self.vae.encode(video).latent_dist.mode() - mean) / std
        return self.vae.encode(video)

    def data(self, prompts: list[str], keys: list[int]) -> Tensor | None:
        """Latents (B, C, T, H, W) of real clips for the prompts, where their domain can be rendered; else None."""
        try:
            attributes = [shapes.parse(prompt) for prompt in prompts]
        except ValueError:
            return None
        return self.encode(np.stack([shapes.render(a, key) for a, key in zip(attributes, keys, strict=True)]))

    def flops(self, net: nn.Module, latent_shape: tuple[int, ...], text: Tensor) -> float:
        """FLOPs of one forward of one sample, for the weight of a role in the ledger."""
        return forward_flops(net, latent_shape, text)

    def exact_fake_score(self, *_: object) -> None:
        """None: the student's density is not known in closed form."""

    def facts(self, *_: object) -> dict[str, np.ndarray]:
        """What is known exactly of the student's clips beside their frames: nothing."""
        return {}

    def _wan_statistics(self) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        return tuple(
            torch.tensor(values, device=self.device).reshape(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )

    def prompts(self) -> list[str]:
        """The training prompts that lie beside the weights, one a line in `prompts.txt`."""
        path = self.folder / "prompts.txt"
        if not path.is_file():
            raise TeacherError(f"teacher {self.folder} has no prompts.txt: put the training prompts there, one a line")
        return [line for line in path.read_text().splitlines() if line.strip()]


def load_pipeline(name: str, device: torch.device) -> Pipeline | GaussianPipeline:
    """The teacher `name` on a device, in float32, frozen."""
    folder = teacher_folder(name)
    if is_gaussian(folder):
        return GaussianPipeline.load(folder, device)
    try:
        transformer = load_transformer(folder)
        vae = None
        if (folder / "vae").is_dir():
            vae_class = FrameAutoencoder.load_config(folder / "vae")["_class_name"]
            if vae_class not in AUTOENCODERS:
                raise TeacherError(f"unknown autoencoder {vae_class!r} in {folder}; known: {', '.join(AUTOENCODERS)}")
            vae = AUTOENCODERS[vae_class].from_pretrained(folder / "vae", torch_dtype=torch.float32)
            vae = vae.to(device).eval().requires_grad_(False)
    except OSError as error:
        raise TeacherError(f"cannot load teacher {folder}: {str(error).splitlines()[0]}") from error
    return Pipeline(folder, transformer.to(device).eval().requires_grad_(False), vae, device)


def load_transformer(folder: Path) -> nn.Module:
    """A trainable float32 copy of the pipeline's transformer: the student and the fake score begin as the teacher."""
    return WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).eval()


class Denoiser:
    """A role's network as clean prediction, (x_t, sigma, text) -> x0_hat; counts its passes in the ledger.

    With `weights` the network runs with those instead of its own (a moving average, without a second copy).
    """

    def __init__(
        self,
        net: nn.Module,
        role: str,
        ledger: Ledger,
        autocast: torch.dtype | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.net, self.role, self.ledger, self.autocast, self.weights = net, role, ledger, autocast, weights

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """x0_hat (B, C, T, H, W) of x_t (B, C, T, H, W) at sigma (B,) in (0, 1] with text (B, L, D)."""
        velocity = self._count(self._forward(x_t, sigma, text), len(x_t))
        return velocity_to_x0(velocity.to(x_t.dtype), x_t, sigma)

    def features(self, x_t: Tensor, sigma: Tensor, text: Tensor, depth: float) -> Tensor:
        """Tokens (B, N, width) after the share `depth` of the blocks; what lies behind is neither run nor counted."""
        blocks = self.net.blocks
        last, found = max(1, round(depth * len(blocks))), []

        def reached(_module: nn.Module, _inputs: tuple, tokens: Tensor) -> None:
            found.append(tokens)
            raise Reached(tokens)

        handle = blocks[last - 1].register_forward_hook(reached)
        try:
            self._forward(x_t, sigma, text)
        except Reached:
            pass
        finally:
            handle.remove()
        return self._count(found[0], len(x_t) * last / len(blocks)).to(x_t.dtype)

    def _forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        inputs = (x_t, 1000 * sigma, text)
        with torch.autocast(x_t.device.type, self.autocast, enabled=self.autocast is not None):
            if self.weights is not None:
                return functional_call(self.net, dict(self.weights), inputs, {"return_dict": False})[0]
            return self.net(*inputs, return_dict=False)[0]

    def _count(self, output: Tensor, samples: float) -> Tensor:
        self.ledger.add(self.role, "forward", samples)
        if output.requires_grad:
            output.register_hook(lambda _: self.ledger.add(self.role, self._kind_of_backward(), samples))
        return output

    def _kind_of_backward(self) -> str:
        """Asked when a backward runs: of a graph that two phases share each takes its own part.

        One that trains adapters alone computes no gradient of the base's weights, and costs what one to the input does.
        """
        trained = any(p.requires_grad for p in self.net.parameters()) and not isinstance(self.net, Adapted)
        return "full_backward" if trained else "input_backward"


class Guided:
    """Classifier-free guidance of a denoiser, uncond + guidance_scale * (cond - uncond); 1 is none.

    In one forward of both, or in two one after the other, which need half the memory.
    """

    def __init__(self, denoiser: Denoiser, null_text: Tensor, guidance_scale: float, batched: bool = True) -> None:
        self.denoiser, self.null_text, self.guidance_scale, self.batched = denoiser, null_text, guidance_scale, batched

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        if self.guidance_scale == 1:
            return self.denoiser(x_t, sigma, text)
        null_text = self.null_text.expand_as(text)
        if self.batched:
            both = torch.cat([text, null_text])
            cond, uncond = self.denoiser(torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both).chunk(2)
        else:
            cond, uncond = self.denoiser(x_t, sigma, text), self.denoiser(x_t, sigma, null_text)
        return uncond + self.guidance_scale * (cond - uncond)


def forward_flops(net: nn.Module, latent_shape: tuple[int, ...], text: Tensor) -> float:
    """FLOPs of one forward of one sample."""
    x = torch.zeros(1, *latent_shape, device=text.device, dtype=text.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x, torch.full((1,), 500.0, device=text.device, dtype=text.dtype), text[:1], return_dict=False)
    return float(counter.get_total_flops())
