"""A teacher with two experts, from the reference clips to the student's exported pipeline."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from export_runs import load_pipe, make_run, snippet_of
from safetensors.torch import load_file

from distill_bench.config.resolve import load_run
from distill_bench.export import export, harness_draws
from distill_bench.sample.load_folder import load_clips
from distill_bench.sample.references import references
from distill_bench.sample.released_weights import check_released, load_released
from distill_bench.sample.run import sample
from distill_bench.sample.sampler import Sampler
from distill_bench.teachers.folder import TeacherError
from distill_bench.train.loop import train

pytestmark = pytest.mark.slow

SIZE = {"num_frames": 5, "height": 16, "width": 16, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def a14b(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "wan22-a14b"
    pipelines.save("wan22-a14b", folder)
    return folder


def frames_of(pipe: diffusers.DiffusionPipeline, prompt: str, **options) -> np.ndarray:
    """Frames uint8 (F, 3, Y, X) of diffusers' own pipeline."""
    (video,) = pipe(prompt, output_type="np", return_dict=False, **SIZE | options)
    return np.round(video[0] * 255).astype(np.uint8).transpose(0, 3, 1, 2)


def test_a_student_of_the_low_noise_expert_is_sampled_and_exported_as_one_transformer(
    a14b, tmp_path
):
    """Every clip is that of diffusers' own pipelines from the same noise."""
    run = make_run(a14b, tmp_path / "store", "run", student_expert="low_noise", nfe=3)
    config = load_run(run)
    teacher = load_clips(references(config, run.parent)["teacher"])
    pipe = load_pipe(a14b)
    sampler = Sampler(config, run.parent)
    steps, shift = config.protocol.teacher_steps, config.shift
    scheduler = sampler.pipeline.architecture.student_scheduler(steps, shift, "ode")
    pipe.register_modules(scheduler=scheduler)
    guidance = config.protocol.teacher_guidance
    called = [count_calls(net) for net in (pipe.transformer, pipe.transformer_2)]
    for prompt, seed, clip in zip(teacher.prompts, teacher.seeds, teacher.frames, strict=True):
        with harness_draws(pipe, seed) as draws:
            frames = frames_of(
                pipe,
                prompt,
                num_inference_steps=steps,
                guidance_scale=guidance,
                guidance_scale_2=guidance,
                generator=draws,
            )
        # pipeline and harness round in another order
        assert np.abs(frames.astype(int) - clip.astype(int)).max() <= 1
    assert all(map(len, called))

    assert train(run)["status"] == "done"
    student, clips = export(run, tmp_path / "student"), load_clips(sample(run)[-1])
    index = json.loads((student / "model_index.json").read_text())
    assert index["transformer_2"] == [None, None] and index["boundary_ratio"] is None
    assert not (student / "transformer_2").exists()
    assert "transformer_2 |" in (student / "README.md").read_text()
    pipe = diffusers.WanPipeline.from_pretrained(student)
    for prompt, seed, clip in zip(clips.prompts, clips.seeds, clips.frames, strict=True):
        with harness_draws(pipe, seed) as draws:
            steps = {"num_inference_steps": 3, "guidance_scale": 1.0, "generator": draws}
            np.testing.assert_array_equal(frames_of(pipe, prompt, **steps), clip)


def count_calls(net: torch.nn.Module) -> list[None]:
    """A list that grows with every forward of a network."""
    calls: list[None] = []
    net.register_forward_hook(lambda *_: calls.append(None))
    return calls


def test_an_adapter_of_one_expert_is_loaded_into_that_expert_alone(a14b, tmp_path):
    """The card's code gives the weights of the merged export."""
    adapter = {"rank": 2, "alpha": 6.0}
    run = make_run(
        a14b,
        tmp_path / "store",
        "run",
        student_expert="low_noise",
        adapter=adapter,
        student_lr=0.05,
    )
    train(run)
    merged = load_file(
        export(run, tmp_path / "merged") / "transformer/diffusion_pytorch_model.safetensors"
    )
    lora = export(run, tmp_path / "lora", lora=True)
    setup = snippet_of(lora).split("pipe.vae")[0]
    namespace: dict = {}
    exec(
        setup.replace('"wan22-a14b"', repr(str(a14b))).replace('"lora"', repr(str(lora))), namespace
    )
    pipe = namespace["pipe"]
    assert pipe.transformer_2 is None and pipe.config.boundary_ratio is None
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for name, weight in pipe.transformer.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-6)

    (file,) = lora.glob("*.safetensors")
    for call in (check_released, load_released):
        with pytest.raises(
            TeacherError, match="is a LoRA for one transformer, but the teacher has"
        ):
            call(file, a14b)


def test_a_released_pipeline_with_two_experts_is_a_row(a14b, tiny_wan):
    """Also beside a teacher with one transformer."""
    check_released(a14b, tiny_wan)
    assert load_released(a14b, tiny_wan).state_dict().keys() > {"low_noise.scale_shift_table"}
