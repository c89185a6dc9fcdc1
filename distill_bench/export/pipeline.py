"""Out: a trained student as a diffusers pipeline folder with its own scheduler, a model card and a snippet.

    distill-bench export RUN FOLDER [--updates N] [--dtype bfloat16] [--lora]

The folder holds the teacher's text encoder, tokenizer and autoencoder, the student's weights (their moving average, where the run
has one) and a scheduler with which the pipeline takes the student's own steps: `num_inference_steps` is the run's nfe, and
`guidance_scale` 1. With `--lora` it holds, of a run with adapters, a file that `load_lora_weights` takes, and the scheduler.
"""

import json
import shutil
from pathlib import Path

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distill_bench.config.resolve import load_run
from distill_bench.config.schema import AdapterConfig
from distill_bench.export.card import card, snippet
from distill_bench.networks.adapters import lora_config, merge_adapter
from distill_bench.networks.pipeline import check_content, load_transformer
from distill_bench.networks.precision import cast
from distill_bench.teachers.architectures import architecture_of
from distill_bench.teachers.contents import read_config
from distill_bench.teachers.folder import teacher_folder
from distill_bench.teachers.kinds import find_teacher
from distill_bench.teachers.texts import has_text_encoder
from distill_bench.train import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


COPIED = ("text_encoder", "tokenizer", "vae")


def export(
    run_dir: Path, out: Path, updates: int | None = None, dtype: str = "float32", lora: bool = False
) -> Path:
    """Write the student of a run as a pipeline folder, whole or not at all.

    Args:
        updates: at which student update it was kept; None is the last.
        dtype: of the student's weights; the teacher's parts are copied as they are.
        lora: write its adapter alone, for the pipeline that it began from; else an adapter is added to the weights.

    Raises:
        ValueError: if there is no such student, it has no adapter where one is asked for, the folder holds something, or the
            teacher is not the one that it was trained by.
    """
    config, kept = load_run(run_dir), checkpoint.students(run_dir)
    if not kept:
        raise ValueError(
            f"{run_dir} has no student: train it first (python -m distill_bench.train {run_dir})"
        )
    updates = max(kept) if updates is None else updates
    if updates not in kept:
        raise ValueError(
            f"{run_dir} kept no student at update {updates}; it did at {', '.join(map(str, kept))}"
        )
    if lora and config.adapter is None:
        raise ValueError(
            f"{run_dir} trained all weights: it has no adapter to write; leave out --lora"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there and not empty: name a new folder")
    source = find_teacher(config.teacher)
    if not source.has_networks:
        raise ValueError(f"{run_dir} has a {source.kind} teacher: its student is no pipeline")
    teacher = source.folder
    check_content(config)
    if not lora and not has_text_encoder(teacher):
        raise ValueError(
            f"the teacher {teacher} has no text encoder: put it back, for a pipeline has one; or --lora"
        )
    architecture = architecture_of(teacher)
    temporary = out.with_name(f".{out.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        base = teacher if config.student is None else teacher_folder(config.student)
        scheduler = architecture_of(base).student_scheduler(
            config.nfe, config.shift, config.stepping
        )
        scheduler.save_pretrained(temporary / "scheduler")
        index = {
            key: value
            for key, value in read_config(teacher, "model_index.json").items()
            if key != "_name_or_path"
        }
        library = type(scheduler).__module__
        index["scheduler"] = [
            "diffusers" if library.startswith("diffusers.") else library,
            type(scheduler).__name__,
        ]
        if lora:
            _save_adapter(
                kept[updates], temporary, architecture.PIPELINE, config.adapter, DTYPES[dtype]
            )
        else:
            student = load_transformer(base)
            _load(kept[updates], student, config.adapter)
            cast(student, DTYPES[dtype]).save_pretrained(temporary / "transformer")
            for part in COPIED:
                if (teacher / part).is_dir():
                    shutil.copytree(teacher / part, temporary / part)
            (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        call = snippet(config, architecture, out.name, index, lora)
        (temporary / "README.md").write_text(card(run_dir, config, updates, out.name, call))
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _load(path: Path, student: torch.nn.Module, adapter: AdapterConfig | None) -> None:
    if adapter is not None:
        checkpoint.load_student(path, student, adapter)
        merge_adapter(student)
        return
    with safe_open(path, "pt") as file:
        unlike = set(file.keys()) ^ {name for name, _ in student.named_parameters()}
    if unlike:
        raise ValueError(
            f"{path} is not of this transformer: {len(unlike)} weights differ by name, for instance {min(unlike)}"
        )
    checkpoint.load_student(path, student)


def _save_adapter(
    path: Path, out: Path, pipeline: str, adapter: AdapterConfig, dtype: torch.dtype
) -> None:
    """The kept adapter as diffusers' LoRA file, with the rank and alpha that its names do not tell."""
    layers = {name: weight.to(dtype) for name, weight in load_file(path).items()}
    about = lora_config(adapter).to_dict()
    getattr(diffusers, pipeline).save_lora_weights(
        out, layers, transformer_lora_adapter_metadata=about
    )
