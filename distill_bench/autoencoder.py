"""Autoencoder of mini-wan: frames of 32x32 become latents of 4x8x8; time is not compressed.

Also the conversion between the frames of clips and the video that autoencoders take.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class FrameAutoencoder(ModelMixin, ConfigMixin):
    """Convolutional autoencoder of single frames.

    Latents are standardised by statistics that are stored with the weights.
    """

    @register_to_config
    def __init__(self, latent_channels: int = 4, width: int = 48) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 4, 2, 1),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, latent_channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 8 * width, 1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            nn.Conv2d(width, 3, 3, padding=1),
        )
        self.register_buffer("latents_mean", torch.zeros(latent_channels))
        self.register_buffer("latents_std", torch.ones(latent_channels))

    def encode(self, video: Tensor) -> Tensor:
        """Latents (B, 4, T, H/4, W/4) of a video (B, 3, T, H, W) in [-1, 1]."""
        frames = video.transpose(1, 2).flatten(0, 1)
        latents = self.encoder(frames).unflatten(0, (len(video), -1)).transpose(1, 2)
        return (latents - self._over(self.latents_mean)) / self._over(self.latents_std)

    def decode(self, latents: Tensor) -> Tensor:
        """Video (B, 3, T, H, W), roughly in [-1, 1], of latents (B, 4, T, H/4, W/4)."""
        scaled = latents * self._over(self.latents_std) + self._over(self.latents_mean)
        frames = self.decoder(scaled.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (len(latents), -1)).transpose(1, 2)

    @staticmethod
    def _over(statistic: Tensor) -> Tensor:
        """A statistic per channel, shaped to broadcast over (B, C, T, H, W)."""
        return statistic.reshape(1, -1, 1, 1, 1)


def frames_to_video(frames: Tensor) -> Tensor:
    """Video (B, 3, F, Y, X) in [-1, 1] of frames uint8 (B, F, 3, Y, X)."""
    return frames.float().transpose(1, 2) / 127.5 - 1


def video_to_frames(video: Tensor) -> Tensor:
    """Frames uint8 (B, F, 3, Y, X), on the CPU, of video (B, 3, F, Y, X), clamped to [-1, 1]."""
    frames = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return frames.transpose(1, 2).cpu()
