"""Tiny runs on every architecture, and calls of their exported pipelines."""

from pathlib import Path

import diffusers
import pipelines
import torch
from runs import TINY_RUN

from distill_bench.config.resolve import resolve
from distill_bench.config.yaml_files import dump_yaml

LIKE_ANOTHER = ("cogvideox-2b", "wan22-a14b")  # their students are those of another pipeline
SIZES = {name: size for name, size in pipelines.SIZES.items() if name not in LIKE_ANOTHER}
FPS = {"wan21": 16, "wan22": 24, "cogvideox": 8, "cogvideox-1.5": 16, "ltx": 25}
TEXT_LENGTHS = {"wan21": 8, "wan22": 512, "ltx": 128, "cogvideox": 12, "cogvideox-1.5": 12}
STEPPING = {"dmd2": "renoise", "sgmd": "ode"}
SMALL_RUN = TINY_RUN | {"fake_score_updates": 1, "batch_size": 2, "nfe": 3, "shift": 3.0}
SMALL_RUN |= {"signals_every": None}


def make_run(teacher: Path, store: Path, name: str, **fields) -> Path:
    """The run folder of a config on a tiny teacher."""
    frames, height, width = pipelines.SIZES[teacher.name]
    run = store / name
    run.mkdir(parents=True)
    size = {"teacher": str(teacher), "frames": frames, "height": height, "width": width}
    (run / "run.yaml").write_text(
        dump_yaml(resolve(SMALL_RUN | size | fields).model_dump(mode="json"))
    )
    return run


def load_pipe(folder: Path) -> diffusers.DiffusionPipeline:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def to_pipe_layout(noise: torch.Tensor, teacher: str) -> torch.Tensor:
    """Latents (B, C, T, H, W) in the layout of the teacher's pipeline."""
    if teacher == "ltx":
        return noise.flatten(2).transpose(1, 2)
    return noise.transpose(1, 2) if "cog" in teacher else noise


def from_pipe_layout(latents: torch.Tensor, teacher: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Inverse of `to_pipe_layout`; `shape` is (C, T, H, W)."""
    if teacher == "ltx":
        return latents.transpose(1, 2).unflatten(2, shape[1:])
    return latents.transpose(1, 2) if "cog" in teacher else latents


def sample_pipe(
    pipe: diffusers.DiffusionPipeline,
    teacher: str,
    prompt: str,
    output: str,
    size: tuple | None = None,
    **options,
):
    """Samples of an exported pipeline for one prompt, in its own layout."""
    frames, height, width = size or SIZES[teacher]
    return pipe(
        prompt,
        num_inference_steps=3,
        guidance_scale=1.0,
        num_frames=frames,
        height=height,
        width=width,
        max_sequence_length=TEXT_LENGTHS[teacher],
        output_type=output,
        return_dict=False,
        **options,
    )[0]


def snippet_of(folder: Path) -> str:
    """The code in a model card."""
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
