"""Weights of transformers as other codes name them, and LoRA files, on a tiny Wan transformer."""

import itertools
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from export_runs import load_pipe, sample_pipe
from runs import TINY_RUN
from safetensors.torch import load_file, save_file

from distill_bench.config.resolve import load_run, resolve
from distill_bench.config.rows.row import ReleasedRow, released_rows
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.export import harness_draws
from distill_bench.networks.pipeline import load_transformer
from distill_bench.sample.load_folder import load_clips
from distill_bench.sample.released_weights import check_released, load_released
from distill_bench.sample.rows import sample_row
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


@pytest.fixture(scope="module")
def weights(tiny_wan: Path) -> dict[str, torch.Tensor]:
    """Weights of another transformer of the teacher's architecture, by diffusers' names."""
    draw = torch.Generator().manual_seed(0)
    state = load_transformer(tiny_wan).state_dict()
    return {name: torch.randn(tensor.shape, generator=draw) for name, tensor in state.items()}


def assert_loads(path: Path, tiny_wan: Path, weights: dict[str, torch.Tensor]) -> None:
    check_released(path, tiny_wan)
    state = load_released(path, tiny_wan).state_dict()
    assert state.keys() == weights.keys()
    assert [name for name in state if not torch.equal(state[name], weights[name])] == []


@pytest.mark.parametrize(
    ("table", "prefix"),
    [
        ([], ""),
        ([], "transformer."),
        (ORIGINAL, ""),
        (ORIGINAL, "model.diffusion_model."),
        (FASTVIDEO, ""),
    ],
    ids=["diffusers", "diffusers, prefix", "LightX2V", "ComfyUI", "FastVideo"],
)
def test_a_transformers_weights_load_by_any_codes_names(table, prefix, tiny_wan, weights, tmp_path):
    path = tmp_path / "weights.safetensors"
    names = {name: prefix + renamed(name, table) for name in weights}
    assert len(set(names.values())) == len(names)
    save_file({names[name]: tensor for name, tensor in weights.items()}, path)
    assert_loads(path, tiny_wan, weights)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_training_checkpoint_of_self_forcing_gives_its_moving_average(
    wrapped, tiny_wan, weights, tmp_path
):
    def name_of(name: str) -> str:
        original = renamed(name, ORIGINAL)
        if wrapped:
            original = "_fsdp_wrapped_module." + re.sub(
                r"^(blocks.\d+)", r"\1._fsdp_wrapped_module", original
            )
        return f"model.{original}"

    student = {name_of(name): tensor for name, tensor in weights.items()}
    raw = {name: torch.zeros_like(tensor) for name, tensor in student.items()}
    path = tmp_path / "self_forcing_dmd.pt"
    torch.save({"generator": raw, "generator_ema": student, "critic": raw}, path)
    assert_loads(path, tiny_wan, weights)


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


def test_weights_that_do_not_fit_are_refused_by_a_line_that_names_them(tiny_wan, weights, tmp_path):
    name = "blocks.1.attn1.to_q.weight"
    without = {key: tensor for key, tensor in weights.items() if key != name}
    message = refusal(without, tmp_path, tiny_wan)
    assert f"1 weights of the teacher's transformer are missing, e.g. {name}" in message
    message = refusal(weights | {"blocks.9.x": torch.zeros(1)}, tmp_path, tiny_wan)
    assert "1 names are unknown, e.g. blocks.9.x" in message
    message = refusal(weights | {name: torch.zeros(3, 3)}, tmp_path, tiny_wan)
    assert f"1 weights have another shape, e.g. {name}" in message
    message = refusal({"a": torch.zeros(1)}, tmp_path, tiny_wan)
    assert "names are unknown, e.g. a" in message


def test_files_that_hold_no_weights_are_refused(tiny_wan, tmp_path):
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save({"step": 3}, tmp_path / "step.pt")
    torch.save({"config": Path("run")}, tmp_path / "config.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, reason in (
        ("text.safetensors", "cannot load"),
        ("step.pt", "holds no weights by name"),
        ("config.pt", "it holds a pathlib.* beside weights; save the weights alone"),
        ("text.pt", "is no checkpoint of PyTorch: it was not written by torch.save"),
        ("none.pt", "No such file"),
    ):
        with pytest.raises(TeacherError, match=reason) as error:
            check_released(tmp_path / name, tiny_wan)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_a_checkpoint_in_the_format_of_old_versions_of_torch_loads(tiny_wan, weights, tmp_path):
    path = tmp_path / "old.pt"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    assert_loads(path, tiny_wan, weights)


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


def pipe_frames(pipe: diffusers.WanPipeline, clips: list[tuple[str, int]]) -> np.ndarray:
    """Frames uint8 (N, T, 3, H, W) of a pipeline, for prompts and seeds, from the harness's noise.

    Three steps without guidance.
    """
    frames = []
    for prompt, seed in clips:
        with harness_draws(pipe, seed) as draws:
            frames.append(sample_pipe(pipe, "wan21", prompt, "np", generator=draws)[0])
    return np.round(np.stack(frames) * 255).astype(np.uint8).transpose(0, 1, 4, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("stepping", ["ode", "renoise"])
def test_a_released_student_has_the_frames_of_its_own_pipeline(stepping, tiny_wan, tmp_path):
    """Its pipeline never saw the harness; files of its weights, and a LoRA, give the same frames.

    The pipeline takes the steps of diffusers' scheduler at shift 3; the rows state its levels.
    """
    student = load_pipe(tiny_wan)
    renoise = stepping == "renoise"
    student.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, stochastic_sampling=renoise
    )
    draw = torch.Generator().manual_seed(2)
    state = student.transformer.state_dict()
    for tensor in state.values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=draw)
    student.save_pretrained(tmp_path / "pipeline")
    save_file(state, tmp_path / "diffusers.safetensors")
    for name, table in (("LightX2V", ORIGINAL), ("FastVideo", FASTVIDEO)):
        named = {renamed(key, table): tensor for key, tensor in state.items()}
        save_file(named, tmp_path / f"{name}.safetensors")
    checkpoint = {f"model.{renamed(key, ORIGINAL)}": tensor for key, tensor in state.items()}
    torch.save({"generator_ema": checkpoint}, tmp_path / "Self-Forcing.pt")
    save_file(lora(False, None), tmp_path / "lora.safetensors")
    save_file(lora(True, 6.0), tmp_path / "lora-LightX2V.safetensors")

    config = resolve(TINY_RUN | {"teacher": str(tiny_wan)})
    student.scheduler.set_timesteps(3)
    levels = tuple(student.scheduler.sigmas[:-1].tolist())
    # how weights are stored does not depend on the stepping
    paths = [tmp_path / "pipeline"] if renoise else sorted(tmp_path.iterdir())
    entries = [
        ReleasedRow(name=path.stem, network=str(path), sigmas=levels, stepping=stepping)
        for path in paths
    ]
    made = {}
    for name, (row, _) in released_rows(entries, config).items():
        folder = tmp_path / "store" / name
        folder.mkdir(parents=True)
        (folder / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
        made[row.label] = load_clips(sample_row(folder, row))
    clips = list(zip(made["pipeline"].prompts, made["pipeline"].seeds, strict=True))

    adapted = load_pipe(tiny_wan)
    adapted.scheduler = student.scheduler
    expected = {"teacher": pipe_frames(adapted, clips)}
    for name in ("lora", "lora-LightX2V"):
        adapted.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors")
        expected[name] = pipe_frames(adapted, clips)
        adapted.unload_lora_weights()
    expected["pipeline"] = pipe_frames(student, clips)
    for one, other in itertools.combinations(expected.values(), 2):
        assert np.abs(one.astype(int) - other).max() > 2
    assert len(made) == (1 if renoise else 7)
    for label, own in made.items():
        frames = expected.get(label, expected["pipeline"])
        np.testing.assert_array_equal(own.frames, frames, label)
