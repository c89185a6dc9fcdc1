"""The trained network on the mixture: student and fake score, a small residual perceptron."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

WIDTH, LAYERS = 256, 4
FREQUENCIES = 8
FLOOR = 0.15  # added to sigma where the network sees x_t in units of the noise


class MixtureNetwork(nn.Module):
    """Velocity (x_t, sigma, text) -> (B, 1, d) as a linear part and a perceptron's correction.

    As in EDM (Karras et al., 2022, section 5), inputs and outputs are scaled to unit variance at
    every noise level: with data of unit variance and k = (1 - s)^2 + s^2, the velocity is
    (2 s - 1) / k x_t, which is the best linear guess, plus the perceptron's output over sqrt k. A
    second copy of x_t, over s + FLOOR, lets it resolve narrow modes at low noise.
    """

    def __init__(self, latents: int, prompts: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(2 * latents + FREQUENCIES + 2, WIDTH)
        self.text = nn.Linear(prompts, WIDTH, bias=False)
        self.null_text = nn.Parameter(torch.zeros(WIDTH))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS - 1))
        self.output = nn.Linear(WIDTH, latents)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Velocity of x_t (B, d) at sigma (B,) with text (B, P), as tokens (B, 1, d)."""
        s = sigma[:, None]
        k = (1 - s) ** 2 + s**2
        pi_multiples = math.pi * torch.arange(1, FREQUENCIES + 1, device=s.device, dtype=s.dtype)
        level = [(s * pi_multiples).cos(), s, (s + 0.02).log() / 4]
        hidden = self.inputs(torch.cat([x_t * k.rsqrt(), x_t / (s + FLOOR), *level], 1))
        no_text = 1 - text.sum(1, keepdim=True)
        hidden = silu(hidden + self.text(text) + no_text * self.null_text)
        for layer in self.layers:
            hidden = hidden + silu(layer(hidden))
        return ((2 * s - 1) / k * x_t + self.output(hidden) * k.rsqrt())[:, None]
