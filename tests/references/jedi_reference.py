"""Write jedi_reference.json: features of tiny V-JEPA networks by videojedi 1.1.0.

vjepa 0.1.2 pins old versions, so it is installed elsewhere, without its dependencies:

    pip install --no-deps --target /tmp/jedi videojedi==1.1.0 vjepa==0.1.2 beartype braceexpand \
        webdataset decord scikit-learn joblib threadpoolctl
    PYTHONPATH=/tmp/jedi:tests/helpers python tests/references/jedi_reference.py
"""

import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from random_weights import random_weights
from textures import textured_clips
from torchvision.transforms.v2.functional import resize
from videojedi import V_JEPA
from videojedi.mmd_polynomial import mmd_poly
from vjepa.models.attentive_pooler import AttentiveClassifier
from vjepa.models.vision_transformer import VisionTransformer

DIM, DEPTH, HEADS, PATCH, SCALE = 32, 2, 16, 56, 0.15
FRAMES, CHOSEN = 33, 16  # of a clip; evenly spaced ones


def shapes(net: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in net.state_dict().items()}


def main() -> None:
    tiny = partial(
        VisionTransformer,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=2,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )
    encoder = shapes(tiny(patch_size=PATCH, num_frames=CHOSEN))
    probe = shapes(AttentiveClassifier(DIM, HEADS, num_classes=174))
    V_JEPA.VIT_NAME_LOOKUP["vit_huge"] = tiny
    config = {
        "pretrain": {
            "checkpoint_key": "target_encoder",
            "model_name": "vit_huge",
            "patch_size": PATCH,
            "folder": "",
            "checkpoint": "",
            "uniform_power": True,
            "tubelet_size": 2,
            "frames_per_clip": CHOSEN,
        },
        "data": {"num_classes": 174, "frames_per_clip": CHOSEN},
        "optimization": {"resolution": 224, "attend_across_segments": True},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        weights = random_weights(encoder, SCALE)
        prefixed = {f"module.backbone.{name}": value for name, value in weights.items()}
        torch.save({"target_encoder": prefixed, "epoch": 0}, path / "vith16.pth.tar")
        weights = random_weights(probe, SCALE)
        prefixed = {f"module.{name}": value for name, value in weights.items()}
        torch.save({"classifier": prefixed, "epoch": 20}, path / "ssv2-probe.pth.tar")
        net = V_JEPA.VJEPA(folder, str(path / "config.yaml"))
    net.classifier.eval()
    frames = torch.from_numpy(textured_clips(2, FRAMES, 240, 300, seed=0))
    frames = frames[:, torch.linspace(0, FRAMES - 1, CHOSEN).round().long()]
    features = net.get_feats(resize(frames.float() / 255, [224, 224], antialias=True))
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=(7, 5)), draw.normal(0.5, 1.2, size=(9, 5))
    out = {
        "encoder": encoder,
        "probe": probe,
        "features": features.tolist(),
        "distance": 100 * mmd_poly(x, y, degree=2, coef0=0),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
