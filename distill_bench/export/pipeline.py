"""Writes a trained student as a diffusers pipeline folder.

The folder holds the student's weights (their moving average, if the run keeps one), copies of the
teacher's text encoder, tokenizer and autoencoder, a model card, and a scheduler with which the
pipeline takes the student's own steps: call it with `num_inference_steps` = nfe and
`guidance_scale` = 1. Beside it, `scheduler_ode` or `scheduler_renoise` takes the other stepping at
the same noise levels. For a run with an adapter, `lora=True` instead writes a file for
`load_lora_weights`, the card and the scheduler.
"""

import json
import shutil
from pathlib import Path

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distill_bench.config.resolve import load_run
from distill_bench.config.schema import AdapterConfig, RunConfig
from distill_bench.export.card import STEPS, card, other_steppings, snippet
from distill_bench.networks.adapters import lora_config, merge_adapter
from distill_bench.networks.pipeline import check_content, load_transformer
from distill_bench.networks.precision import cast
from distill_bench.teachers.architecture import architecture_of
from distill_bench.teachers.contents import read_config
from distill_bench.teachers.embeddings import has_text_encoder
from distill_bench.teachers.folder import teacher_folder
from distill_bench.teachers.kinds import find_teacher
from distill_bench.train import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEPPINGS = tuple(STEPS)
COPIED_PARTS = ("text_encoder", "tokenizer", "vae")
ONE_TRANSFORMER = {"transformer_2": [None, None], "boundary_ratio": None}  # in model_index.json


def export(
    run_dir: Path,
    out: Path,
    updates: int | None = None,
    dtype: str = "float32",
    lora: bool = False,
    stepping: str | None = None,
) -> Path:
    """Write the student of a run as a pipeline folder, all or nothing.

    Args:
        run_dir: a run folder with a trained student.
        out: the folder to write; new or empty.
        updates: export the student kept at this student update; None: the last one.
        dtype: data type of the student's weights, a key of `DTYPES`; parts of the teacher are
            copied unchanged.
        lora: write only the adapter, for the pipeline that the student started from. If False, the
            adapter is merged into the weights.
        stepping: of the pipeline's scheduler, one of `STEPPINGS`; None: as in training.

    Returns:
        `out`.

    Raises:
        ValueError: if the run kept no such student, has no adapter although `lora` is set, or has
            a teacher without networks; if `out` is not empty; if the teacher has changed; or if
            diffusers has no scheduler for the stepping.
        OSError: if the folder cannot be written.
    """
    config = load_run(run_dir)
    updates, weights = _kept_student(run_dir, updates)
    if lora and config.adapter is None:
        raise ValueError(
            f"{run_dir} trained all weights: it has no adapter to write; leave out --lora"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: name a new folder")
    stepping = _known_stepping(run_dir, config, stepping)
    teacher = _complete_teacher(run_dir, config, lora)
    temporary = out.with_name(f".{out.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        base = teacher if config.student is None else teacher_folder(config.student)
        index = _write_schedulers(temporary, config, stepping, teacher, base)
        if lora:
            _write_adapter(temporary, weights, config.adapter, teacher, DTYPES[dtype])
        else:
            student = load_transformer(base, config.student_expert)
            _load_student(weights, student, config.adapter)
            cast(student, DTYPES[dtype]).save_pretrained(temporary / "transformer")
            for part in COPIED_PARTS:
                if (teacher / part).is_dir():
                    shutil.copytree(teacher / part, temporary / part)
            (temporary / "model_index.json").write_text(
                json.dumps(index, indent=2) + "\n", encoding="utf-8"
            )
        call = snippet(config, stepping, architecture_of(teacher), out.name, index, lora)
        (temporary / "README.md").write_text(
            card(run_dir, config, stepping, updates, out.name, call), encoding="utf-8"
        )
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _kept_student(run_dir: Path, updates: int | None) -> tuple[int, Path]:
    """Student update and weights file of the student kept at `updates`; None: of the last."""
    kept = checkpoint.students(run_dir)
    if not kept:
        raise ValueError(
            f"{run_dir} has no student: train it first (python -m distill_bench.train {run_dir})"
        )
    updates = max(kept) if updates is None else updates
    if updates not in kept:
        raise ValueError(
            f"{run_dir} kept no student at update {updates}; it kept students at "
            f"{', '.join(map(str, kept))}"
        )
    return updates, kept[updates]


def _complete_teacher(run_dir: Path, config: RunConfig, lora: bool) -> Path:
    """Folder of the run's teacher, checked to have all parts that the export copies."""
    teacher = find_teacher(config.teacher)
    if not teacher.has_networks:
        raise ValueError(
            f"{run_dir} has a {teacher.kind} teacher: its student is not a diffusers pipeline"
        )
    check_content(config)
    if not lora and not has_text_encoder(teacher.folder):
        raise ValueError(
            f"the teacher {teacher.folder} has no text encoder, and a pipeline needs one: put it "
            "back, or write the adapter alone with --lora"
        )
    return teacher.folder


def _known_stepping(run_dir: Path, config: RunConfig, stepping: str | None) -> str:
    """The stepping of the exported scheduler."""
    chosen = config.stepping if stepping is None else stepping
    if chosen not in STEPPINGS:
        raise ValueError(
            f"{run_dir} steps with {chosen:.0%} of new noise; diffusers has no scheduler for that: "
            f"choose another by --stepping, {' or '.join(STEPPINGS)}"
        )
    return str(chosen)


def _write_schedulers(
    out: Path, config: RunConfig, stepping: str, teacher: Path, base: Path
) -> dict:
    """Write the student's scheduler, and the one of the other stepping if steps differ.

    Returns:
        The teacher's model_index.json with the student's scheduler, and without a second expert.
    """
    architecture = architecture_of(base)
    scheduler = architecture.student_scheduler(config.nfe, config.shift, stepping)
    scheduler.save_pretrained(out / "scheduler")
    for other in other_steppings(config, stepping):
        architecture.student_scheduler(config.nfe, config.shift, other).save_pretrained(
            out / f"scheduler_{other}"
        )
    index = read_config(teacher, "model_index.json")
    index = {key: value for key, value in index.items() if key != "_name_or_path"}
    if architecture_of(teacher).boundary is not None:
        index |= ONE_TRANSFORMER
    module = type(scheduler).__module__
    library = "diffusers" if module.startswith("diffusers.") else module
    return index | {"scheduler": [library, type(scheduler).__name__]}


def _load_student(weights: Path, student: torch.nn.Module, adapter: AdapterConfig | None) -> None:
    """Load a kept student into its transformer, in place; an adapter is merged.

    Raises:
        ValueError: if the weights belong to another transformer.
    """
    if adapter is not None:
        checkpoint.load_student(weights, student, adapter)
        merge_adapter(student)
        return
    with safe_open(weights, "pt") as file:
        unmatched = set(file.keys()) ^ {name for name, _ in student.named_parameters()}
    if unmatched:
        raise ValueError(
            f"{weights} does not fit the run's transformer: {len(unmatched)} names of weights "
            f"differ, e.g. {min(unmatched)}"
        )
    checkpoint.load_student(weights, student)


def _write_adapter(
    out: Path, weights: Path, adapter: AdapterConfig, teacher: Path, dtype: torch.dtype
) -> None:
    """Write a kept adapter as diffusers' LoRA file, with rank and alpha as its metadata."""
    layers = {name: weight.to(dtype) for name, weight in load_file(weights).items()}
    pipeline_class = getattr(diffusers, architecture_of(teacher).PIPELINE)
    pipeline_class.save_lora_weights(
        out, layers, transformer_lora_adapter_metadata=lora_config(adapter).to_dict()
    )
