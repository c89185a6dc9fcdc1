"""A run on each architecture, from two updates to the pipeline folder that its student leaves as."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from pipelines import PROMPTS
from runs import TINY_RUN
from safetensors.torch import load_file, save_file

from distill_bench.config.resolve import load_run, resolve
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.evaluate.score import evaluate
from distill_bench.export import __main__ as export_main
from distill_bench.export import card, harness_draws, pipeline
from distill_bench.networks.denoiser import Denoiser
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.pipeline import load_pipeline, load_transformer
from distill_bench.noise import student_sigmas
from distill_bench.rollout import rollout
from distill_bench.sample.clip_files import read_clip
from distill_bench.sample.load_folder import load_clips
from distill_bench.sample.run import sample
from distill_bench.teachers.architecture import architecture_of
from distill_bench.train import checkpoint
from distill_bench.train.loop import train
from distill_bench.train.setup import build_from

pytestmark = pytest.mark.slow

SIZES = {name: size for name, size in pipelines.SIZES.items() if name != "cogvideox-2b"}
STEPPING = {"dmd2": "renoise", "sgmd": "ode"}
SMALL_RUN = TINY_RUN | {"fake_score_updates": 1, "batch_size": 2, "nfe": 3, "shift": 3.0}
SMALL_RUN |= {"signals_every": None}


@pytest.fixture(scope="module", autouse=True)
def one_by_one():
    """Clips are drawn one by one, as large ones are and a pipeline's here: some processors round otherwise for two at once."""
    with mock.patch("distill_bench.networks.pipeline.CLIPS_PER_BATCH", 1):
        yield


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    for name in SIZES:
        pipelines.save(name, root / name)
    return root


def make_run(teacher: Path, store: Path, name: str, **fields) -> Path:
    """The run folder of a config on a tiny teacher."""
    frames, height, width = SIZES[teacher.name]
    run = store / name
    run.mkdir(parents=True)
    size = {"teacher": str(teacher), "frames": frames, "height": height, "width": width}
    (run / "run.yaml").write_text(
        dump_yaml(resolve(SMALL_RUN | size | fields).model_dump(mode="json"))
    )
    return run


@pytest.fixture(
    scope="module",
    params=[(teacher, method) for teacher in SIZES for method in STEPPING],
    ids="-".join,
)
def run(request, teachers, tmp_path_factory) -> Path:
    """Two updates of a method on a teacher: dmd2 with noise at every step, sgmd by Euler steps."""
    teacher, method = request.param
    store = tmp_path_factory.mktemp("store")
    run = make_run(teachers / teacher, store, "whole", method=method, stepping=STEPPING[method])
    assert train(run)["status"] == "done"
    return run


def student_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(list(checkpoint.students(run).values())[-1])


def test_the_student_starts_from_the_teachers_weights_and_moves(run):
    student = student_of(run)
    teacher = load_transformer(Path(load_run(run).teacher)).state_dict()
    assert student.keys() == teacher.keys()
    assert any(not torch.equal(student[name], teacher[name]) for name in student)


def test_its_clips_are_scored_and_are_videos_at_the_teachers_rate(run):
    config, clips = load_run(run), sample(run)[-1]
    frames = np.load(clips / "clips.npy")
    assert frames.shape == (2, config.frames, 3, config.height, config.width)
    (line,) = [line for line in evaluate(clips, {}, ["motion"]) if line["column"] == "motion"]
    assert np.isfinite(line["value"])
    rate = {"wan21": 16, "wan22": 24, "cogvideox": 8, "cogvideox-1.5": 16, "ltx": 25}[
        Path(config.teacher).name
    ]
    assert load_clips(clips).fps == rate
    written = read_clip(clips / "videos" / "000001.mp4")
    video = written.frames
    assert written.fps == rate and video.shape == frames[1].shape
    assert np.corrcoef(video.mean(1).ravel(), frames[1].mean(1).ravel())[0, 1] > 0.8, (
        "noise, compressed"
    )


def opened(folder: Path) -> diffusers.DiffusionPipeline:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def laid(noise: torch.Tensor, teacher: str) -> torch.Tensor:
    """Latents (B, C, T, H, W) as a pipeline takes them."""
    if teacher == "ltx":
        return noise.flatten(2).transpose(1, 2)
    return noise.transpose(1, 2) if "cog" in teacher else noise


def of_pipeline(latents: torch.Tensor, teacher: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `laid`."""
    if teacher == "ltx":
        return latents.transpose(1, 2).unflatten(2, shape[1:])
    return latents.transpose(1, 2) if "cog" in teacher else latents


def called(
    pipe: diffusers.DiffusionPipeline,
    teacher: str,
    prompt: str,
    output: str,
    size: tuple | None = None,
    **options,
):
    """What an exported pipeline gives for one prompt."""
    frames, height, width = size or SIZES[teacher]
    length = {"wan21": 8, "wan22": 512, "ltx": 128}.get(teacher, 12)
    return pipe(
        prompt,
        num_inference_steps=3,
        guidance_scale=1.0,
        num_frames=frames,
        height=height,
        width=width,
        max_sequence_length=length,
        output_type=output,
        return_dict=False,
        **options,
    )[0]


def test_the_exported_pipeline_takes_the_students_own_steps(run, tmp_path):
    """Its latents are those of the harness's rollout from the same noises, bit for bit.

    The later noises are those that the pipeline draws: here from torch's generator, in the order of its own latents.
    """
    config = load_run(run)
    teacher = Path(config.teacher).name
    pipe = opened(pipeline.export(run, tmp_path / "student"))
    mine = load_pipeline(config.teacher, torch.device("cpu"))
    shape = mine.latent_shape(*SIZES[teacher])
    first = torch.randn(1, *shape, generator=torch.Generator().manual_seed(4))
    given = laid(first, teacher)
    torch.manual_seed(3)
    noises = [first, *(of_pipeline(torch.randn(given.shape), teacher, shape) for _ in range(2))]
    torch.manual_seed(3)
    out = of_pipeline(called(pipe, teacher, PROMPTS[0], "latent", latents=given), teacher, shape)

    net = mine.student()
    checkpoint.load_student(list(checkpoint.students(run).values())[-1], net)
    with torch.no_grad():
        text = mine.encode_text(PROMPTS[:1])
        sigmas = student_sigmas(config.nfe, config.shift)
        expected = rollout(
            Denoiser(net, "student", Ledger(1)), noises, sigmas, text, config.stepping
        )
    assert torch.equal(out, expected)


def test_the_exported_pipeline_gives_the_runs_own_samples(run, tmp_path):
    """diffusers' pipeline loads the folder and, given the harness's draws, ends in the frames of the run's samples: same bits."""
    config = load_run(run)
    teacher = Path(config.teacher).name
    pipe, clips = opened(pipeline.export(run, tmp_path / "student")), load_clips(sample(run)[-1])
    for prompt, seed, clip in zip(clips.prompts, clips.seeds, clips.frames, strict=True):
        with harness_draws(pipe, seed) as draws:
            frames = called(pipe, teacher, prompt, "np", generator=draws)[0]
        np.testing.assert_array_equal(
            np.round(frames * 255).astype(np.uint8), clip.transpose(0, 2, 3, 1)
        )


def snippet_of(folder: Path) -> str:
    """The code in a model card."""
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("run", [("cogvideox", "dmd2")], indirect=True, ids="-".join)
def test_the_cards_snippet_runs_in_a_fresh_interpreter(run, tmp_path):
    """The class of its scheduler is none that diffusers imports itself."""
    code = snippet_of(pipeline.export(run, tmp_path / "student"))
    path = os.pathsep.join(
        [str(Path(pipeline.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    written = read_clip(tmp_path / "clip.mp4")
    assert written.fps == 8 and written.frames.shape == (9, 3, 32, 32)


LARGE = {
    "wan21": (5, 16, 272),
    "cogvideox": (9, 64, 64),
    "ltx": (25, 64, 64),
}  # more than a tile, of pixels or of frames


@pytest.mark.parametrize("name", LARGE)
def test_large_clips_of_the_exported_pipeline_are_those_of_the_run(name, teachers, tmp_path):
    """It tiles where the snippet tells it to, as the harness does."""
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
    told: dict = {}
    exec(setup.replace('"student"', repr(str(tmp_path / "student"))), told)
    with harness_draws(told["pipe"], clips.seeds[0]) as draws:
        frames = called(told["pipe"], name, clips.prompts[0], "np", LARGE[name], generator=draws)[0]
    # a value halfway between two may be rounded to either: the pipeline and the harness scale in another order
    assert np.abs(frames * 255 - clips.frames[0].transpose(0, 2, 3, 1)).max() < 0.501


@pytest.mark.parametrize("run", [("wan21", "dmd2")], indirect=True, ids="-".join)
def test_a_revision_of_the_teacher_is_an_argument_of_its_own(run, tmp_path):
    config = load_run(run)
    architecture, scheduler = (
        architecture_of(Path(config.teacher)),
        {"scheduler": ["diffusers", "S"]},
    )
    config = config.model_copy(update={"teacher": "owner/name@v1.0"})
    call = card.snippet(config, architecture, "student", scheduler, lora=True)
    said = card.card(run, config, 2, "student", call)
    assert (
        "\nbase_model: owner/name\n" in said
        and '.from_pretrained("owner/name", revision="v1.0")' in said
    )


@pytest.mark.parametrize("name", SIZES)
def test_an_adapter_leaves_as_a_lora_file_or_added_to_the_weights(name, teachers, tmp_path):
    """Both pipelines give the frames of the run's own adapter, to the rounding of a product; alpha is not the rank."""
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
    merged = opened(pipeline.export(run, tmp_path / "merged"))
    lora = pipeline.export(run, tmp_path / "lora", lora=True)
    assert sorted(path.name for path in lora.iterdir()) == [
        "README.md",
        "pytorch_lora_weights.safetensors",
        "scheduler",
    ]
    said = (lora / "README.md").read_text()
    assert f'from_pretrained("{name}")' in said and 'pipe.load_lora_weights("lora")' in said
    loaded = opened(teachers / name)
    loaded.scheduler = type(merged.scheduler).from_pretrained(lora, subfolder="scheduler")
    before = called(loaded, name, PROMPTS[0], "latent", generator=torch.Generator().manual_seed(0))
    loaded.load_lora_weights(lora)
    a, b = (
        called(pipe, name, PROMPTS[0], "latent", generator=torch.Generator().manual_seed(0))
        for pipe in (merged, loaded)
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert (a - before).abs().max() > 1e-2, "the adapter does something"


def test_a_student_smaller_than_its_teacher(teachers, tmp_path):
    """Student and fake score begin from the small folder, the ledger weighs the teacher, and the small one leaves."""
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
    pipe, clips = opened(pipeline.export(run, tmp_path / "student")), load_clips(sample(run)[-1])
    assert pipe.transformer.config.num_layers == 1
    with harness_draws(pipe, clips.seeds[0]) as draws:
        frames = called(pipe, "wan21", clips.prompts[0], "np", generator=draws)[0]
    np.testing.assert_array_equal(
        np.round(frames * 255).astype(np.uint8), clips.frames[0].transpose(0, 2, 3, 1)
    )


@pytest.mark.parametrize(
    "run", [("wan21", "dmd2"), ("cogvideox", "sgmd")], indirect=True, ids="-".join
)
def test_an_export_is_whole_says_where_it_comes_from_and_overwrites_nothing(run, tmp_path, capsys):
    out = tmp_path / "student"
    scores = evaluate(sample(run)[-1], {}, ["motion"])
    assert export_main.main([str(run), str(out), "--dtype", "bfloat16"]) == 0
    weights = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    kept = {"float32"} if Path(load_run(run).teacher).name.startswith("wan") else set()
    assert {str(w.dtype).removeprefix("torch.") for w in weights.values()} == {"bfloat16"} | kept, (
        "some stay in float32"
    )
    said = (out / "README.md").read_text()
    rows = [f"| {line['title']} | {line['value']:.4g} |" for line in scores]
    config, call = load_run(run), "num_inference_steps=3, guidance_scale=1.0"
    for fact in (run.name, config.teacher_hash, call, "Licence", *rows):
        assert fact in said, fact
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]
    size = {key: getattr(config, key) for key in ("teacher", "frames", "height", "width")}
    again = resolve(SMALL_RUN | size | {"method": "dmd2", "student": str(out)})
    assert (
        again.student_hash
        and load_transformer(out).architecture.unlike(load_transformer(out).architecture) is None
    )
    capsys.readouterr()
    for folder, options, wrong in (
        (out, [], "exists and is not empty"),
        (
            tmp_path / "new",
            ["--updates", "7"],
            "kept no student at update 7; it kept students at 2",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            export_main.main([str(run), str(folder), *options])
        assert (
            ended.value.code == 2
            and wrong in (line := capsys.readouterr().err)
            and line.count("\n") == 1
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("run", [("wan21", "dmd2")], indirect=True, ids="-".join)
def test_an_export_that_cannot_be_written_is_one_line_and_leaves_nothing(run, tmp_path):
    """A file may not have more than 20 KiB here: as on a disk that is full."""
    argv = [sys.executable, "-m", "distill_bench.export", str(run), str(tmp_path / "student")]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *argv],
        cwd=Path(pipeline.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        done.returncode == 2 and "File too large" in done.stderr and done.stderr.count("\n") == 1
    ), done.stderr
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_one_line(teachers, tmp_path):
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
        with pytest.raises(ValueError, match="teacher .* is not what the run was resolved with"):
            pipeline.export(run, tmp_path / "out")
    finally:
        (teachers / "wan21" / "extra.txt").unlink()
    assert not (tmp_path / "out").exists()
