"""Runs on each architecture, from two updates of training to the exported pipeline."""

import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from export_runs import (
    FPS,
    SIZES,
    from_pipe_layout,
    load_pipe,
    make_run,
    sample_pipe,
    snippet_of,
    to_pipe_layout,
)
from pipelines import PROMPTS
from safetensors.torch import load_file, save_file

from distill_bench.config.resolve import load_run
from distill_bench.evaluate.score import evaluate
from distill_bench.export import __main__ as export_main
from distill_bench.export import harness_draws, pipeline
from distill_bench.networks.denoiser import Denoiser
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.pipeline import load_pipeline, load_transformer
from distill_bench.noise import student_sigmas
from distill_bench.rollout import rollout
from distill_bench.sample.clip_files import read_clip
from distill_bench.sample.load_folder import load_clips
from distill_bench.sample.run import sample
from distill_bench.train import checkpoint
from distill_bench.train.loop import train
from distill_bench.train.setup import build_from

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def student_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(list(checkpoint.students(run).values())[-1])


def test_the_student_starts_from_the_teachers_weights_and_moves(run):
    student = student_of(run)
    teacher = load_transformer(Path(load_run(run).teacher)).state_dict()
    assert student.keys() == teacher.keys()
    assert any(not torch.equal(student[name], teacher[name]) for name in student)


def test_clips_are_scored_and_written_as_videos_at_the_teachers_rate(run):
    config, clips = load_run(run), sample(run)[-1]
    frames = np.load(clips / "clips.npy")
    assert frames.shape == (2, config.frames, 3, config.height, config.width)
    (line,) = [line for line in evaluate(clips, {}, ["motion"]) if line["column"] == "motion"]
    assert np.isfinite(line["value"])
    fps = FPS[Path(config.teacher).name]
    assert load_clips(clips).fps == fps
    video = read_clip(clips / "videos" / "000001.mp4")
    assert video.fps == fps
    assert video.frames.shape == frames[1].shape
    # a video is compressed, and these clips are noise
    written, drawn = video.frames.mean(1).ravel(), frames[1].mean(1).ravel()
    assert np.corrcoef(written, drawn)[0, 1] > 0.8


@pytest.mark.parametrize("own", [True, False], ids=["own", "other"])
def test_the_exported_pipeline_takes_the_steps_of_either_scheduler(own, run, tmp_path):
    """From the same noises, its latents have the bits of the harness's rollout.

    The pipeline draws its later noises from torch's generator, in the layout of its latents.
    """
    config = load_run(run)
    teacher = Path(config.teacher).name
    stepping = config.stepping if own else {"ode": "renoise", "renoise": "ode"}[config.stepping]
    student = pipeline.export(run, tmp_path / "student")
    pipe = load_pipe(student)
    if not own:
        scheduler = type(pipe.scheduler)
        pipe.scheduler = scheduler.from_pretrained(student, subfolder=f"scheduler_{stepping}")
        chosen = pipeline.export(run, tmp_path / "chosen", stepping=stepping)
        assert pipe.scheduler.config == load_pipe(chosen).scheduler.config
    ours = load_pipeline(config.teacher, torch.device("cpu"))
    shape = ours.latent_shape(*SIZES[teacher])
    first = torch.randn(1, *shape, generator=torch.Generator().manual_seed(4))
    given = to_pipe_layout(first, teacher)
    torch.manual_seed(3)
    noises = [
        first,
        *(from_pipe_layout(torch.randn(given.shape), teacher, shape) for _ in range(2)),
    ]
    torch.manual_seed(3)
    out = from_pipe_layout(
        sample_pipe(pipe, teacher, PROMPTS[0], "latent", latents=given), teacher, shape
    )

    net = ours.student()
    checkpoint.load_student(list(checkpoint.students(run).values())[-1], net)
    with torch.no_grad():
        text = ours.encode_text(PROMPTS[:1])
        sigmas = student_sigmas(config.nfe, config.shift)
        expected = rollout(Denoiser(net, "student", Ledger(1)), noises, sigmas, text, stepping)
    assert torch.equal(out, expected)


def test_the_exported_pipeline_gives_the_runs_own_samples(run, tmp_path):
    """Given the harness's draws, diffusers' pipeline ends in the frames of the run's samples."""
    config = load_run(run)
    teacher = Path(config.teacher).name
    pipe, clips = load_pipe(pipeline.export(run, tmp_path / "student")), load_clips(sample(run)[-1])
    for prompt, seed, clip in zip(clips.prompts, clips.seeds, clips.frames, strict=True):
        with harness_draws(pipe, seed) as draws:
            frames = sample_pipe(pipe, teacher, prompt, "np", generator=draws)[0]
        np.testing.assert_array_equal(
            np.round(frames * 255).astype(np.uint8), clip.transpose(0, 2, 3, 1)
        )


# Frames, height and width above one tile of the autoencoder.
LARGE = {"wan21": (5, 16, 272), "cogvideox": (9, 64, 64), "ltx": (25, 64, 64)}


@pytest.mark.parametrize("name", LARGE)
def test_large_clips_of_the_exported_pipeline_are_those_of_the_run(name, teachers, tmp_path):
    """The snippet makes the pipeline tile as the harness does."""
    size = dict(zip(("frames", "height", "width"), LARGE[name], strict=True))
    run = make_run(
        teachers / name,
        tmp_path / "store",
        "run",
        method="dmd2",
        stepping="ode",
        student_updates=1,
        **size,
    )
    train(run)
    clips = load_clips(sample(run)[-1])
    setup = snippet_of(pipeline.export(run, tmp_path / "student")).split("frames = pipe(")[0]
    namespace: dict = {}
    exec(setup.replace('"student"', repr(str(tmp_path / "student"))), namespace)
    with harness_draws(namespace["pipe"], clips.seeds[0]) as draws:
        frames = sample_pipe(
            namespace["pipe"], name, clips.prompts[0], "np", LARGE[name], generator=draws
        )[0]
    # pipeline and harness scale in another order: a value half-way between two may round to either
    assert np.abs(frames * 255 - clips.frames[0].transpose(0, 2, 3, 1)).max() < 0.501


@pytest.mark.parametrize("name", SIZES)
def test_an_adapter_is_exported_as_a_lora_file_or_merged(name, teachers, tmp_path):
    """Both pipelines agree to the rounding of a product; alpha differs from the rank."""
    run = make_run(
        teachers / name,
        tmp_path / "store",
        "run",
        method="dmd2",
        stepping="ode",
        adapter={"rank": 2, "alpha": 6.0},
        student_lr=0.05,
    )
    train(run)
    merged = load_pipe(pipeline.export(run, tmp_path / "merged"))
    lora = pipeline.export(run, tmp_path / "lora", lora=True)
    assert sorted(path.name for path in lora.iterdir()) == [
        "README.md",
        "pytorch_lora_weights.safetensors",
        "scheduler",
        "scheduler_renoise",
    ]
    text = (lora / "README.md").read_text()
    assert f'from_pretrained("{name}")' in text
    assert 'pipe.load_lora_weights("lora")' in text
    loaded = load_pipe(teachers / name)
    loaded.scheduler = type(merged.scheduler).from_pretrained(lora, subfolder="scheduler")
    before = sample_pipe(
        loaded, name, PROMPTS[0], "latent", generator=torch.Generator().manual_seed(0)
    )
    loaded.load_lora_weights(lora)
    a, b = (
        sample_pipe(pipe, name, PROMPTS[0], "latent", generator=torch.Generator().manual_seed(0))
        for pipe in (merged, loaded)
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert (a - before).abs().max() > 1e-2  # the adapter changes the samples


def test_a_student_smaller_than_its_teacher_trains_and_is_exported(teachers, tmp_path):
    """Student and fake score start from the small folder; the ledger weighs the larger teacher."""
    small = Path(shutil.copytree(teachers / "wan21", tmp_path / "small"))
    config = dict(load_transformer(small).config) | {
        "num_layers": 1,
        "num_attention_heads": 1,
        "ffn_dim": 16,
    }
    diffusers.WanTransformer3DModel.from_config(config).save_pretrained(small / "transformer")
    run = make_run(teachers / "wan21", tmp_path / "store", "run", method="dmd2", student=str(small))
    built = build_from(run)
    assert all(built.networks[role].config.num_layers == 1 for role in ("student", "fake_score"))
    assert built.ledger.weight("teacher") > 1.5 and built.ledger.weight("fake_score") == 1
    assert train(run)["status"] == "done"
    pipe, clips = load_pipe(pipeline.export(run, tmp_path / "student")), load_clips(sample(run)[-1])
    assert pipe.transformer.config.num_layers == 1
    with harness_draws(pipe, clips.seeds[0]) as draws:
        frames = sample_pipe(pipe, "wan21", clips.prompts[0], "np", generator=draws)[0]
    np.testing.assert_array_equal(
        np.round(frames * 255).astype(np.uint8), clips.frames[0].transpose(0, 2, 3, 1)
    )


@pytest.mark.parametrize("run", [("wan21", "dmd2")], indirect=True, ids="-".join)
@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("occupied", [], "exists and is not empty"),
        ("new", ["--updates", "7"], "kept no student at update 7; it kept students at 2"),
    ],
)
def test_an_export_overwrites_nothing_and_needs_a_kept_student(
    folder, options, message, run, tmp_path, capsys
):
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as exit_info:
        export_main.main([str(run), str(tmp_path / folder), *options])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["occupied"]
    assert [path.name for path in (tmp_path / "occupied").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("run", [("wan21", "dmd2")], indirect=True, ids="-".join)
def test_a_failed_export_prints_one_line_and_leaves_nothing(run, tmp_path):
    """Files are limited to 20 KiB, which fails like a full disk."""
    argv = [sys.executable, "-m", "distill_bench.export", str(run), str(tmp_path / "student")]
    result = subprocess.run(
        ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "File too large" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_impossible_exports_are_refused(teachers, tmp_path):
    run = make_run(teachers / "wan21", tmp_path, "untrained", method="dmd2")
    with pytest.raises(ValueError, match="has no student: train it first"):
        pipeline.export(run, tmp_path / "out")
    train(run)
    path = list(checkpoint.students(run).values())[-1]
    weights = load_file(path)
    save_file({key: value for key, value in weights.items() if "ffn" not in key}, path)
    with pytest.raises(
        ValueError,
        match="does not fit the run's transformer: 8 names of weights differ, e.g. blocks.0.ffn",
    ):
        pipeline.export(run, tmp_path / "out")
    (teachers / "wan21" / "extra.txt").write_text("something else")
    try:
        with pytest.raises(ValueError, match="teacher .* has changed since the run was resolved"):
            pipeline.export(run, tmp_path / "out")
    finally:
        (teachers / "wan21" / "extra.txt").unlink()
    assert not (tmp_path / "out").exists()
