"""Names of a Wan transformer's weights in other codes, and LoRA files by these names."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill_bench.sample.released_weights import check_released, load_released
from distill_bench.teachers.folder import TeacherError

# diffusers' name -> the name in Wan-Video/Wan2.1, wan/modules/model.py, which Self-Forcing and
# LightX2V keep
ORIGINAL = [
    (r"^condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    (r"^condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    (r"^condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    (r"^condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    (r"^condition_embedder.time_proj", "time_projection.1"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"(blocks.\d+.)attn1.to_out.0", r"\1self_attn.o"),
    (r"(blocks.\d+.)attn1.to_", r"\1self_attn."),
    (r"(blocks.\d+.)attn1.norm_", r"\1self_attn.norm_"),
    (r"(blocks.\d+.)attn2.to_out.0", r"\1cross_attn.o"),
    (r"(blocks.\d+.)attn2.to_", r"\1cross_attn."),
    (r"(blocks.\d+.)attn2.norm_", r"\1cross_attn.norm_"),
    (r"(blocks.\d+.)norm2", r"\1norm3"),
    (r"(blocks.\d+.)ffn.net.0.proj", r"\1ffn.0"),
    (r"(blocks.\d+.)ffn.net.2", r"\1ffn.2"),
    (r"(blocks.\d+.)scale_shift_table", r"\1modulation"),
]
# diffusers' name -> FastVideo's, fastvideo/configs/models/dits/wanvideo.py
FASTVIDEO = [
    (r"^patch_embedding", "patch_embedding.proj"),
    (r"text_embedder.linear_1", "text_embedder.fc_in"),
    (r"text_embedder.linear_2", "text_embedder.fc_out"),
    (r"time_embedder.linear_1", "time_embedder.mlp.fc_in"),
    (r"time_embedder.linear_2", "time_embedder.mlp.fc_out"),
    (r"condition_embedder.time_proj", "condition_embedder.time_modulation.linear"),
    (r"(blocks.\d+.)attn1.to_out.0", r"\1to_out"),
    (r"(blocks.\d+.)attn1.(to_|norm_)", r"\1\2"),
    (r"(blocks.\d+.)attn2.to_out.0", r"\1attn2.to_out"),
    (r"(blocks.\d+.)ffn.net.0.proj", r"\1ffn.fc_in"),
    (r"(blocks.\d+.)ffn.net.2", r"\1ffn.fc_out"),
    (r"(blocks.\d+.)norm2", r"\1self_attn_residual_norm.norm"),
]


def renamed(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, new in table:
        name, count = re.subn(pattern, new, name)
        if count:
            break
    return name


def lora(original: bool, alpha: float | None) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on two layers."""
    draw = torch.Generator().manual_seed(1)
    layers = {"blocks.0.attn1.to_q": (24, 24), "blocks.1.ffn.net.0.proj": (32, 24)}
    entries = {}
    for layer, (out, inputs) in layers.items():
        name = f"diffusion_model.{renamed(layer, ORIGINAL)}" if original else f"transformer.{layer}"
        a, b = ("lora_down", "lora_up") if original else ("lora_A", "lora_B")
        entries[f"{name}.{a}.weight"] = torch.randn(2, inputs, generator=draw)
        entries[f"{name}.{b}.weight"] = torch.randn(out, 2, generator=draw)
        if alpha is not None:
            entries[f"{name}.alpha"] = torch.tensor(alpha)
    return entries


def refusal(tensors: dict[str, torch.Tensor], folder: Path, tiny_wan: Path) -> str:
    """The message with which weights are refused, before and after they are loaded."""
    path = folder / "weights.safetensors"
    save_file(tensors, path)
    messages = set()
    for call in (check_released, load_released):
        with pytest.raises(TeacherError) as error:
            call(path, tiny_wan)
        messages.add(str(error.value))
    (message,) = messages
    assert "\n" not in message
    return message
