"""Files of every network that an evaluator loads by path, with random weights of the real classes.

Only I3D's own class is not public: `RandomLogits` has the signature of its TorchScript file.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from clip_folders import write_lines
from random_weights import random_weights
from textures import textured_clips
from tiny_qwen2_vl import write_tiny_qwen2_vl
from torch import Tensor, nn

REFERENCES = Path(__file__).parent
SCALE = 0.15
CLIP_MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
VIDEOALIGN = {
    "data_config": {
        "eval_dim": ["VQ", "MQ", "TA"],
        "prompt_template_type": "detailed_special",
        "sample_type": "uniform",
        "num_frames": None,
        "fps": 2.0,
        "max_frame_pixels": 448 * 448,
    },
    "model_config": {"output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
    "peft_lora_config": {
        "lora_enable": True,
        "use_rslora": False,
        "lora_r": 4,
        "lora_alpha": 8,
    },
}


class RandomLogits(nn.Module):
    """Small random network with the signature of the published i3d_torchscript.pt."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(3, 16, (3, 7, 7), (2, 6, 6)),
            nn.ReLU(),
            nn.Conv3d(16, 32, (2, 3, 3), (2, 2, 2)),
            nn.ReLU(),
        )
        self.out = nn.Linear(32, 400)

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = True
    ) -> Tensor:
        assert x.shape[1] == 3 and not rescale and not resize and return_features
        return 10 * self.out(self.body(x).mean([2, 3, 4]))


def write_i3d(folder: Path, net: nn.Module | None = None) -> Path:
    """The TorchScript file for `fvd`; default: of `RandomLogits`."""
    torch.manual_seed(0)
    path = folder / "i3d_torchscript.pt"
    torch.jit.script((net or RandomLogits()).eval()).save(str(path))
    return path


def write_clip(folder: Path, config: dict = CLIP_MODEL) -> Path:
    """Write a CLIP as open_clip's folder, by default a tiny one; returns it."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
    torch.save(open_clip.CLIP(**config).state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def write_raft(folder: Path) -> Path:
    """The weights of torchvision's raft_small for `motion`."""
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    path = folder / "raft_small.pth"
    torch.save(raft_small(weights=None).state_dict(), path)
    return path


def write_video_transformers(folder: Path) -> tuple[str, str]:
    """The file of VideoMAE-v2 for CD-FVD and the folder of V-JEPA for JEDi."""
    reference = json.loads((REFERENCES / "jedi_reference.json").read_text())
    encoder = random_weights(reference["encoder"], SCALE)
    torch.save({"target_encoder": encoder}, folder / "vith16.pth.tar")
    probe = random_weights(reference["probe"], SCALE)
    torch.save({"classifier": probe}, folder / "ssv2-probe.pth.tar")
    shapes = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: shape
        for name, shape in reference["encoder"].items()
        if name != "pos_embed"
    }
    torch.save(random_weights(shapes, SCALE), folder / "videomae.pth")
    return f"{folder}/videomae.pth", str(folder)


def write_dinov3(folder: Path) -> Path:
    """Write a tiny DINOv3 as transformers' folder; returns it."""
    from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor, DINOv3ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = DINOv3ViTConfig(patch_size=16, intermediate_size=48, initializer_range=0.3, **sizes)
    DINOv3ViTModel(config).save_pretrained(folder)
    DINOv3ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_videoalign(folder: Path, config: dict = VIDEOALIGN) -> dict[str, str]:
    """Write both folders; returns the settings of the evaluator."""
    base = write_tiny_qwen2_vl(folder / "base")
    (folder / "reward" / "checkpoint-7").mkdir(parents=True, exist_ok=True)
    shapes = json.loads((REFERENCES / "videoalign_reference.json").read_text())["shapes"]
    weights = random_weights(shapes, SCALE)
    torch.save(weights, folder / "reward" / "checkpoint-7" / "model.pth")
    (folder / "reward" / "model_config.json").write_text(json.dumps(config))
    return {"weights": f"{folder}/reward", "base": f"{base}"}


def write_textures(
    folder: Path,
    seed: int,
    frames: int = 16,
    clips: int = 4,
    size: tuple[int, int] = (128, 136),
) -> Path:
    """Clips that all of these networks take, two per prompt, with their manifest."""
    folder.mkdir(parents=True)
    np.save(folder / "clips.npy", textured_clips(clips, frames, *size, seed))
    prompts = [f"texture {i // 2}" for i in range(clips)]
    lines = [{"index": i, "prompt": p, "seed": seed + i} for i, p in enumerate(prompts)]
    write_lines(folder, lines)
    (folder / "row.json").write_text(json.dumps({"kind": "student"}))
    return folder


RANDOM: dict[str, Callable[[Path], dict[str, str]]] = {  # writes networks; gives settings
    "fvd": lambda folder: {"extractor": f"i3d-k400-logits-400:{write_i3d(folder)}"},
    "clip_score": lambda folder: {"model": f"local-dir:{write_clip(folder / 'clip')}"},
    "motion": lambda folder: {"raft": f"{write_raft(folder)}"},
    "cd_fvd": lambda folder: {"weights": write_video_transformers(folder)[0]},
    "jedi": lambda folder: {"weights": write_video_transformers(folder)[1]},
    "dino_similarity": lambda folder: {"weights": f"{write_dinov3(folder / 'dinov3')}"},
    "videoalign": lambda folder: write_videoalign(folder / "videoalign"),
}
