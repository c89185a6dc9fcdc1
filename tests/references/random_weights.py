"""Random weights that depend on names and shapes alone, so that two programs can share them."""

import numpy as np
import torch
from torch import Tensor

Shapes = dict[str, list[int]]


def random_weights(shapes: Shapes, scale: float) -> dict[str, Tensor]:
    """Normal weights of these shapes by name; those of norms vary around 1."""
    draw = np.random.default_rng(0)
    return {
        name: torch.from_numpy(
            scale * draw.standard_normal(shape) + ("norm" in name and name.endswith("weight"))
        ).float()
        for name, shape in sorted(shapes.items())
    }
