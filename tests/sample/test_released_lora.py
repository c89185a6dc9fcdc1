"""LoRA files of other codes, added to a tiny Wan transformer."""

import json
from pathlib import Path

import pytest
import torch
from released_names import lora, refusal
from safetensors.torch import load_file, save_file

from distill_bench.config.resolve import load_run
from distill_bench.networks.pipeline import load_transformer
from distill_bench.sample.released_weights import check_released, load_released


@pytest.mark.parametrize("original", [False, True], ids=["diffusers", "LightX2V"])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_a_lora_is_added_to_the_teachers_weights(original, alpha, tiny_wan, tmp_path):
    entries = lora(original, alpha)
    path = tmp_path / "lora.safetensors"
    save_file(entries, path)
    check_released(path, tiny_wan)
    before = load_transformer(tiny_wan).state_dict()
    after = load_released(path, tiny_wan).state_dict()
    a, b = (
        tensor
        for name, tensor in entries.items()
        if "to_q" in name or "self_attn.q" in name
        if not name.endswith("alpha")
    )
    scale = 1.0 if alpha is None else alpha / 2
    name = "blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(after[name], before[name] + scale * b @ a)
    changed = [key for key in after if not torch.equal(after[key], before[key])]
    assert changed == [name, "blocks.1.ffn.net.0.proj.weight"]


def test_a_lora_of_another_network_is_refused(tiny_wan, tmp_path):
    entries = {name.replace("blocks.1", "blocks.7"): t for name, t in lora(False, None).items()}
    message = refusal(entries, tmp_path, tiny_wan)
    assert "2 entries belong to no layer of it, e.g. blocks.7.ffn.net.0.proj.lora_A" in message


def test_a_lora_that_lacks_a_factor_of_a_layer_is_refused(tiny_wan, tmp_path):
    entries = lora(False, None)
    del entries["transformer.blocks.0.attn1.to_q.lora_B.weight"]
    message = refusal(entries, tmp_path, tiny_wan)
    assert "has one factor of two for 1 layers, e.g. blocks.0.attn1.to_q" in message


@pytest.mark.parametrize(
    ("layer", "down", "up"),
    [
        ("blocks.0.attn1.to_q", (2, 32), (24, 2)),
        ("blocks.0.attn1.to_q", (2, 24), (32, 2)),
        ("blocks.0.attn1.to_q", (2, 24), (24, 3)),
        ("patch_embedding", (2, 4, 1, 2, 3), (24, 2, 1, 1, 1)),
    ],
    ids=["inputs", "outputs", "ranks", "kernel"],
)
def test_a_lora_of_another_size_is_refused(layer, down, up, tiny_wan, tmp_path):
    entries = {f"{layer}.lora_A.weight": torch.ones(down), f"{layer}.lora_B.weight": torch.ones(up)}
    message = refusal(entries, tmp_path, tiny_wan)
    assert f"its entries for 1 layers have another shape, e.g. for {layer}; name" in message


@pytest.mark.parametrize("kind", ["diff", "diff_b"])
def test_changes_of_weights_and_biases_are_added(kind, tiny_wan, tmp_path):
    name = f"blocks.1.attn2.to_v.{'bias' if kind == 'diff_b' else 'weight'}"
    before = load_transformer(tiny_wan).state_dict()
    change, path = torch.randn(before[name].shape), tmp_path / "lora.safetensors"
    entry = f"diffusion_model.blocks.1.cross_attn.v.{kind}"
    entries = lora(True, None) | {entry: change}
    save_file(entries, path)
    state = load_released(path, tiny_wan).state_dict()
    assert torch.equal(state[name], before[name] + change)
    message = refusal(entries | {entry: torch.zeros(3)}, tmp_path, tiny_wan)
    assert "for 1 layers have another shape, e.g. for blocks.1.attn2.to_v" in message


@pytest.mark.parametrize(
    ("entry", "layer"),
    [
        ("diffusion_model.blocks.0.ffn.0.{}.weight", "blocks.0.ffn.net.0.proj"),
        ("diffusion_model.blocks.0.cross_attn.k.{}.weight", "blocks.0.attn2.to_k"),
        ("time_projection.1.{}.weight", "condition_embedder.time_proj"),
        ("head.head.{}.weight", "proj_out"),
        ("transformer.blocks.0.to_k.{}.weight", "blocks.0.attn1.to_k"),
        ("transformer.blocks.0.ffn.fc_in.{}.weight", "blocks.0.ffn.net.0.proj"),
        ("base_model.model.patch_embedding.{}.default.weight", "patch_embedding"),
    ],
)
def test_a_lora_of_one_layer_has_any_codes_names(entry, layer, tiny_wan, tmp_path):
    before = load_transformer(tiny_wan).state_dict()
    out, *inputs = before[f"{layer}.weight"].shape
    up, down = torch.randn(out, 2, *[1] * (len(inputs) - 1)), torch.randn(2, *inputs)
    path = tmp_path / "lora.safetensors"
    save_file({entry.format("lora_B"): up, entry.format("lora_A"): down}, path)
    check_released(path, tiny_wan)
    state = load_released(path, tiny_wan).state_dict()
    added = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1))
    for name, tensor in before.items():
        change = added.reshape(tensor.shape) if name == f"{layer}.weight" else 0
        torch.testing.assert_close(state[name], tensor + change)


def test_an_entry_alpha_goes_before_that_of_the_metadata(tiny_wan, tmp_path):
    name, path = "blocks.0.attn1.to_q.weight", tmp_path / "lora.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 10})}
    changes = []
    for alpha in (None, 6.0):
        save_file(lora(False, alpha), path, metadata)
        changes.append(load_released(path, tiny_wan).state_dict()[name])
    before = load_transformer(tiny_wan).state_dict()[name]
    torch.testing.assert_close((changes[0] - before) * 6, (changes[1] - before) * 10)


@pytest.mark.slow
def test_an_exported_adapter_is_the_merged_export(make_run, tmp_path):
    """Its alpha stands in the metadata of the file."""
    from distill_bench.export import export
    from distill_bench.train.loop import train

    run = make_run("run", adapter={"rank": 2, "alpha": 6.0}, student_lr=0.05)
    train(run)
    merged = load_transformer(export(run, tmp_path / "merged")).state_dict()
    file = export(run, tmp_path / "lora", lora=True) / "pytorch_lora_weights.safetensors"
    assert len(load_file(file))
    teacher = Path(load_run(run).teacher)
    state = load_released(file, teacher).state_dict()
    base = load_transformer(teacher).state_dict()
    for name, weight in merged.items():
        torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-6)
    assert any(not torch.allclose(state[name], base[name], atol=1e-3) for name in state)
