"""VideoMAE-v2, V-JEPA and DINOv3 against the original networks and preprocessing, random weights.

The originals are cd-fvd's code, videojedi's features (tests/references/jedi_reference.py), and
torchvision's transforms with transformers' DINOv3.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from preprocessing_mistakes import RESIZED, SCALED, resized
from random_weights import random_weights
from textures import textured_clips
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.transforms import v2

from distill_bench.evaluate import encoders, video_transformers
from distill_bench.evaluate.extractors import Extractor, load_extractor
from distill_bench.evaluator import Clips

REFERENCE = json.loads(
    (Path(__file__).parents[1] / "references" / "jedi_reference.json").read_text()
)
TOLERANCE = 1e-5  # of the features' standard deviation
CAUGHT = 20 * TOLERANCE
SCALE = 0.15


def textures(frames: int, *size: int) -> Tensor:
    return torch.from_numpy(textured_clips(2, frames, *size, seed=0))


def original_videomae_v2(patch: int, depth: int) -> nn.Module:
    from cdfvd.third_party.VideoMAEv2.videomaev2_finetune import VisionTransformer

    net = VisionTransformer(
        patch_size=patch,
        embed_dim=32,
        depth=depth,
        num_heads=16,
        mlp_ratio=2,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        num_classes=174,
    ).eval()
    shapes = {name: list(value.shape) for name, value in net.state_dict().items()}
    net.load_state_dict(random_weights(shapes, SCALE))
    return net


Case = tuple[Extractor, Tensor, Tensor]


def videomae_v2(folder: Path, frames: int = 16, patch: int = 56) -> Case:
    """Extractor, clips, and their features by cd-fvd."""
    from cdfvd.third_party.VideoMAEv2.utils import preprocess_videomae

    net, clips = original_videomae_v2(patch, 2), textures(frames, 230, 300)
    torch.save({"module": net.state_dict()}, folder / "net.pth")
    with torch.no_grad():
        features = net.forward_features(preprocess_videomae(clips.permute(0, 1, 3, 4, 2).numpy()))
    return load_extractor(f"videomae-v2-ssv2:{folder}/net.pth"), clips, features


def vjepa(folder: Path) -> Case:
    """Extractor, clips of 33 frames, and their features by videojedi."""
    for name, file, key, prefix in (
        ("encoder", "vith16.pth.tar", "target_encoder", "module.backbone."),
        ("probe", "ssv2-probe.pth.tar", "classifier", "module."),
    ):
        weights = random_weights(REFERENCE[name], SCALE)
        prefixed = {prefix + name: value for name, value in weights.items()}
        torch.save({key: prefixed, "epoch": 300}, folder / file)
    features = torch.tensor(REFERENCE["features"])
    return load_extractor(f"vjepa-ssv2:{folder}"), textures(33, 240, 300), features


def error(extractor: Extractor, clips: Tensor, expected: Tensor) -> float:
    """Largest difference of features in their standard deviations."""
    with torch.no_grad():
        return ((extractor.net(clips) - expected).abs().max() / expected.std()).item()


@pytest.mark.slow
@pytest.mark.parametrize("make", [videomae_v2, vjepa])
def test_features_are_the_originals_and_mistakes_are_caught(make, tmp_path, monkeypatch):
    extractor, clips, expected = make(tmp_path)
    assert extractor.dim == 32
    assert error(extractor, clips, expected) < TOLERANCE
    clips, expected = clips[:1], expected[:1]
    assert error(extractor, clips, expected) < TOLERANCE, "depends on the batch"
    for mistake in SCALED.values():
        with monkeypatch.context() as patch:
            patch.setattr(encoders, "scaled", mistake)
            assert error(extractor, clips, expected) > CAUGHT
    antialiased = make is vjepa
    for mistake in (*RESIZED.values(), resized(antialias=not antialiased)):
        with monkeypatch.context() as patch:
            patch.setattr(video_transformers, "interpolate", mistake)
            assert error(extractor, clips, expected) > CAUGHT
    if make is vjepa:  # reads 16 of 33 frames
        assert error(extractor, clips[:, :16], expected) > CAUGHT
        assert error(extractor, clips[:, 1:], expected) > CAUGHT


@pytest.mark.slow
def test_positions_of_other_numbers_of_frames_are_those_of_cd_fvd(tmp_path):
    """81 frames give 10240 tokens; 9 frames take the same path."""
    extractor, clips, expected = videomae_v2(tmp_path, frames=9, patch=14)
    assert error(extractor, clips, expected) < TOLERANCE
    ids = [extractor.id_for(Clips(clips[:, :t].numpy(), ["a", "b"], [0, 1])) for t in (8, 9)]
    assert ids[0].startswith("videomae-v2-ssv2@T8#") and ids[0] != ids[1]


def tiny_dinov3(folder: Path, **preprocessing) -> Path:
    from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor, DINOv3ViTModel

    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        patch_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_register_tokens=4,
        initializer_range=0.3,
    )
    DINOv3ViTModel(config).save_pretrained(folder)
    settings = {"size": {"height": 64, "width": 64}} | preprocessing
    DINOv3ViTImageProcessor(**settings).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_dinov3_averages_class_tokens_of_frames_as_torchvision_prepares_them(tmp_path):
    """The class token after the last norm, from a 64x64 frame: scaled, resized, normalised."""
    from transformers import DINOv3ViTModel

    clips = textures(3, 90, 120)
    folder = tiny_dinov3(tmp_path / "right")
    prepared = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize((64, 64), antialias=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    net = DINOv3ViTModel.from_pretrained(folder)
    with torch.no_grad():
        tokens = net(prepared(clips.flatten(0, 1))).last_hidden_state[:, 0]
    expected = normalize(tokens, dim=-1).reshape(2, 3, 32).mean(1)
    extractor = load_extractor(f"dinov3:{folder}")
    assert (extractor.name, extractor.dim) == ("dinov3-right", 32)
    assert error(extractor, clips, expected) < TOLERANCE
    assert torch.allclose(extractor.net(clips[1:]), expected[1:], atol=1e-5)
    for index, wrong in enumerate(
        (
            {"image_mean": [0.5] * 3},
            {"image_std": [0.5] * 3},
            {"rescale_factor": 1 / 256},
            {"do_normalize": False},
            {"resample": 3},  # bicubic
            {"size": {"height": 48, "width": 64}},
        )
    ):
        planted = load_extractor(f"dinov3:{tiny_dinov3(tmp_path / str(index), **wrong)}")
        assert error(planted, clips, expected) > CAUGHT, wrong
        assert planted.sha256 != extractor.sha256
    for changed in (clips.flip(2), clips.flip(3), clips[:, :2], clips // 2):
        assert error(extractor, changed, expected) > CAUGHT


def test_missing_and_foreign_weights_end_in_one_line(tmp_path):
    torch.save({"module": {"head.weight": torch.zeros(2)}}, tmp_path / "foreign.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    net = original_videomae_v2(56, 1).state_dict()
    torch.save({k: v for k, v in net.items() if "blocks.0.norm1" not in k}, tmp_path / "torn.pth")
    for spec, reason in (
        ("videomae-v2-ssv2", "vit_g_hybrid_pt_1200e_ssv2_ft.pth of https://"),
        ("vjepa-ssv2", "vith16.pth.tar and ssv2-probe.pth.tar from https://"),
        (f"videomae-v2-ssv2:{tmp_path}/none.pth", "no weights at "),
        (f"videomae-v2-ssv2:{tmp_path}/text.pth", "is no checkpoint of PyTorch"),
        (f"videomae-v2-ssv2:{tmp_path}/foreign.pth", "holds no VideoMAE-v2"),
        (
            f"videomae-v2-ssv2:{tmp_path}/torn.pth",
            "lacks 2 weights, e.g. encoder.layer.0.layernorm_before.bias",
        ),
        (f"vjepa-ssv2:{tmp_path}", "no weights at "),
        (f"dinov3:{tmp_path}", "dinov3 needs a transformers folder"),
    ):
        with pytest.raises(ValueError, match=reason) as raised:
            load_extractor(spec)
        assert "\n" not in str(raised.value)
