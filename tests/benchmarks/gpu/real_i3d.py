"""I3D (Carreira and Zisserman, arXiv:1705.07750) with random weights, as slow as the real one.

Inception-v1 with all filters in three dimensions, and the signature of the i3d_torchscript.pt that
published FVDs use.
"""

import torch
from torch import Tensor, nn

# channels of the branches 1x1x1; 1x1x1 to 3x3x3; 1x1x1 to 3x3x3; pooled to 1x1x1 (figure 3)
MIXED = (
    (192, 64, 96, 128, 16, 32, 32),
    (256, 128, 128, 192, 32, 96, 64),
    (480, 192, 96, 208, 16, 48, 64),
    (512, 160, 112, 224, 24, 64, 64),
    (512, 128, 128, 256, 24, 64, 64),
    (512, 112, 144, 288, 32, 64, 64),
    (528, 256, 160, 320, 32, 128, 128),
    (832, 256, 160, 320, 32, 128, 128),
    (832, 384, 192, 384, 48, 128, 128),
)


class Unit(nn.Module):
    """Convolution, batch normalisation and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class Mixed(nn.Module):
    """An Inception block: four branches side by side."""

    def __init__(self, inputs: int, a: int, b0: int, b1: int, c0: int, c1: int, d: int) -> None:
        super().__init__()
        self.a = Unit(inputs, a, 1)
        self.b = nn.Sequential(Unit(inputs, b0, 1), Unit(b0, b1, 3))
        self.c = nn.Sequential(Unit(inputs, c0, 1), Unit(c0, c1, 3))
        self.d = nn.Sequential(nn.MaxPool3d(3, 1, 1), Unit(inputs, d, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1)


class InceptionI3d(nn.Module):
    """Clips (B, 3, T, 224, 224) in [-1, 1] to 400 logits."""

    def __init__(self) -> None:
        super().__init__()
        mixed = [Mixed(*channels) for channels in MIXED]
        self.body = nn.Sequential(
            Unit(3, 64, 7, 2),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            Unit(64, 64, 1),
            Unit(64, 192, 3),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *mixed[:2],
            nn.MaxPool3d(3, 2, 1),
            *mixed[2:7],
            nn.MaxPool3d(2, 2, ceil_mode=True),
            *mixed[7:],
        )
        self.out = nn.Conv3d(1024, 400, 1)

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = True
    ) -> Tensor:
        assert x.shape[1] == 3 and not rescale and not resize and return_features
        pooled = nn.functional.avg_pool3d(self.body(x), (2, 7, 7), 1)
        return self.out(pooled).mean([2, 3, 4])
