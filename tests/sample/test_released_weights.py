"""Weights of transformers as other codes name them, and LoRA files, on a tiny Wan transformer."""

import itertools
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from export_runs import load_pipe, sample_pipe
from released_names import FASTVIDEO, ORIGINAL, lora, refusal, renamed
from runs import TINY_RUN
from safetensors.torch import save_file

from distill_bench.config.resolve import resolve
from distill_bench.config.rows.row import ReleasedRow, released_rows
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.export import harness_draws
from distill_bench.networks.pipeline import load_transformer
from distill_bench.sample.load_folder import load_clips
from distill_bench.sample.released_weights import check_released, load_released
from distill_bench.sample.rows import sample_row
from distill_bench.teachers.folder import TeacherError


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
        ([], "base_model.model._orig_mod."),
        (ORIGINAL, "module.student."),
        ([], "generator._checkpoint_wrapped_module."),
    ],
    ids=["diffusers", "prefix", "LightX2V", "ComfyUI", "FastVideo", "peft", "DDP", "checkpointed"],
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


@pytest.mark.parametrize("entry", ["ema", "generator", "student", "model", "state_dict"])
def test_the_student_of_any_codes_checkpoint_is_found(entry, tiny_wan, weights, tmp_path):
    """A moving average is preferred; optimizer and discriminator stay aside."""
    path, others = tmp_path / "state.pt", {name: -tensor for name, tensor in weights.items()}
    content = {"optimizer": {"step": 1}, entry: weights, "critic": others}
    torch.save(content | ({"model": others} if entry == "ema" else {}), path)
    assert_loads(path, tiny_wan, weights)


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


def test_a_pipeline_of_another_architecture_is_refused(tiny_wan, tmp_path):
    """Its network would get the teacher's texts and latents."""
    folder = Path(shutil.copytree(tiny_wan, tmp_path / "other"))
    check_released(folder, tiny_wan)
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"text_dim": 16', '"text_dim": 24'))
    with pytest.raises(TeacherError, match="its text width is 24, but that of the teacher"):
        check_released(folder, tiny_wan)


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
