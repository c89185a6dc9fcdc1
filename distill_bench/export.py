"""Out: a trained student as a diffusers pipeline folder with its own scheduler, a model card and a snippet.

    distill-bench export RUN FOLDER [--updates N] [--dtype bfloat16] [--lora]

The folder holds the teacher's text encoder, tokenizer and autoencoder, the student's weights (their moving average, where the run
has one) and a scheduler with which the pipeline takes the student's own steps: `num_inference_steps` is the run's nfe, and
`guidance_scale` 1. With `--lora` it holds, of a run with adapters, a file that `load_lora_weights` takes, and the scheduler.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from distill_bench import __version__, checkpoint
from distill_bench.adapters import lora_config, merge
from distill_bench.architectures import OWN_AUTOENCODER, Architecture, architecture_of
from distill_bench.config import AdapterConfig, RunConfig, load_run
from distill_bench.draws import generator
from distill_bench.masters import cast
from distill_bench.models import check_content, load_transformer
from distill_bench.noise import student_sigmas
from distill_bench.store import attempts, read_json, read_jsonl
from distill_bench.teacher import is_gaussian, read_config, teacher_folder
from distill_bench.texts import has_text_encoder

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
    teacher = teacher_folder(config.teacher)
    if is_gaussian(teacher):
        raise ValueError(f"{run_dir} has a gaussian teacher: its student is no pipeline")
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
        merge(student)
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


@contextlib.contextmanager
def harness_draws(pipe: diffusers.DiffusionPipeline, seed: int) -> Iterator[torch.Generator]:
    """Inside, an exported pipeline that is given this generator draws the noises of one clip as `distill_bench.sample` does.

    On a CPU. The pipeline makes the first noise by the generator, and its scheduler the later ones by that or by torch's own:
    both are seeded before each step.
    """
    draws, step, after = generator("sample", seed, 0), pipe.scheduler.step, itertools.count(1)

    @functools.wraps(step)  # pipelines look at what it takes
    def seeded(*inputs: object, **options: object) -> object:
        for_this = generator("sample", seed, next(after)).initial_seed()
        draws.manual_seed(for_this)
        torch.manual_seed(for_this)
        return step(*inputs, **options)

    with torch.random.fork_rng(devices=[]):
        pipe.scheduler.step = seeded
        try:
            yield draws
        finally:
            del pipe.scheduler.step


# --- the model card ---


def card(run_dir: Path, config: RunConfig, updates: int, name: str, call: list[str]) -> str:
    """What the student is, where it comes from, what it scores, and how it is called."""
    teacher, begun = _called(config.teacher), config.student and _called(config.student)
    sigmas = ", ".join(
        f"{sigma:.6g}" for sigma in student_sigmas(config.nfe, config.shift).tolist()
    )
    steps = {
        "renoise": "each predicts the clip and noises it again",
        "ode": "Euler steps of its ODE",
    }[config.stepping]
    summary = read_json(run_dir / "train.json") or {}
    started = [read_json(attempt / "start.json") or {} for attempt in attempts(run_dir)[-1:]]
    code = next((start["commit"] for start in started if start.get("commit")), "unknown")
    fields = {key: value for key, value in config.method.items() if key != "name"}
    about = {
        "run": run_dir.name,
        "teacher": f"{teacher} (content {config.teacher_hash})",
        "begun from": begun and f"{begun} (content {config.student_hash})",
        "method": f"{config.method['name']}, version {config.method_version}",
        "its fields": ", ".join(f"{key} {value}" for key, value in fields.items()) or "none",
        "student updates": f"{updates} of {config.student_updates}, batch {config.batch_size}",
        "fake-score updates a student update": config.fake_score_updates,
        "learning rates": f"student {config.student_lr:g}, fake score {config.fake_score_lr:g}",
        "guidance of the teacher": config.guidance_scale,
        "moving average": config.ema,
        "seed": config.seed,
        "cost of the run (forwards of the student over a batch)": summary.get(
            "cost_forward_equivalents"
        ),
        "its training time (s)": summary.get("train_seconds"),
        "its peak memory (GiB)": summary.get("peak_memory_gib"),
        "code": f"distill-bench {__version__}, commit {code}",
    }
    scores = read_jsonl(run_dir / "samples" / str(updates) / "metrics.jsonl")
    if updates == max(checkpoint.students(run_dir)):
        scores = scores or read_jsonl(run_dir / "metrics.jsonl")
    return (
        "\n".join(
            [
                "---",
                "library_name: diffusers",
                "pipeline_tag: text-to-video",
                *([f"base_model: {_on_hub(teacher)[0]}"] if teacher.count("/") == 1 else []),
                "---",
                "",
                f"# {name}",
                "",
                f"A student of {config.nfe} steps, distilled from {teacher}. It is called without guidance, on clips of",
                f"{config.frames} frames of {config.height}x{config.width}. Its noise levels are {sigmas}: {steps}.",
                "The scheduler makes these levels for this number of steps alone.",
                "",
                *call,
                "",
                "## Where it comes from",
                "",
                *_table(
                    ("", ""), [(key, value) for key, value in about.items() if value is not None]
                ),
                "",
                "## Scores",
                "",
                *(_scores(scores) if scores else ["None: this student has not been scored."]),
                "",
                "## Licence",
                "",
                "The weights derive from the teacher's, and its text encoder, tokenizer and autoencoder are copies: the teacher's",
                "licence holds for them, and that of the prompts that they were trained with may. distill-bench itself is Apache-2.0.",
            ]
        )
        + "\n"
    )


def _called(pipeline: str) -> str:
    """A pipeline's name for others: of a folder the last part."""
    return Path(pipeline).name if Path(pipeline).exists() else pipeline


def _on_hub(called: str) -> tuple[str, str]:
    """OWNER/NAME, and the revision where one was asked for."""
    name, _, revision = called.partition("@") if "/" in called else (called, "", "")
    return name, revision


def snippet(
    config: RunConfig, architecture: Architecture, name: str, index: dict[str, Any], lora: bool
) -> list[str]:
    """How the student is sampled with diffusers; `index` has its parts' libraries and names."""
    library, scheduler = index["scheduler"]
    if OWN_AUTOENCODER in index.get("vae", []):
        return [
            "Its autoencoder is distill-bench's own, which no pipeline of diffusers calls: it is a `student` for further runs."
        ]
    begun, revision = _on_hub(_called(config.student or config.teacher)) if lora else (name, "")
    source = f'"{begun}"' + (f', revision="{revision}"' if revision else "")
    tokens = architecture.text_length(
        AutoTokenizer.from_pretrained(architecture.folder / "tokenizer")
    )
    lines = [
        "import torch",
        f"from diffusers import {architecture.PIPELINE}",
        "from diffusers.utils import export_to_video",
        "",
        f"pipe = {architecture.PIPELINE}.from_pretrained({source})",
    ]
    own = (
        "  # where distill-bench is installed: the scheduler is a class of its"
        if library.startswith("distill_bench")
        else ""
    )
    if lora:
        lines.insert(1, f"from {library} import {scheduler}{own}")
        lines += [
            f'pipe.load_lora_weights("{name}")',
            f'pipe.scheduler = {scheduler}.from_pretrained("{name}", subfolder="scheduler")',
        ]
    elif own:
        lines.insert(1, f"import {library}{own}")
    tiles = ", ".join(f"{key}={size}" for key, size in architecture.tiles().items())
    lines.append(
        f"pipe.vae.enable_tiling({tiles})  # large frames in tiles, as the run's own samples are decoded"
    )
    if architecture.FRAMEWISE:
        lines.append("pipe.vae.use_framewise_decoding = True")
    if config.stepping == "renoise" and config.nfe > 1:
        lines.append("torch.manual_seed(0)  # its steps noise again by torch's own generator")
    return [
        "```python",
        *lines,
        "frames = pipe(",
        '    "a prompt",',
        f"    num_inference_steps={config.nfe}, guidance_scale=1.0, generator=torch.Generator().manual_seed(0),",
        f"    num_frames={config.frames}, height={config.height}, width={config.width}, max_sequence_length={tokens},",
        ").frames[0]",
        f'export_to_video(list(frames), "clip.mp4", fps={architecture.own_fps:g})',
        "```",
    ]


def _scores(lines: Iterable[dict]) -> list[str]:
    rows = []
    for line in lines:
        value = line["value"]
        sd = "" if line.get("sd") is None else f"{line['sd']:.3g}"
        shown = f"{value:.4g}" if math.isfinite(value) else str(value)
        rows.append(
            (
                line["title"],
                shown,
                sd,
                line.get("unit") or "",
                line["n"],
                line.get("extractor") or "",
                line["protocol"],
            )
        )
    return _table(("score", "value", "sd", "unit", "clips", "extractor", "protocol"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ("---",) * len(head), *rows)]


def main(argv: list[str] | None = None) -> int:
    """Command line: write a student as a pipeline folder."""
    parser = argparse.ArgumentParser(
        prog="distill_bench.export", description=export.__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="a run folder with a trained student")
    parser.add_argument("folder", type=Path, help="where to: a new folder")
    parser.add_argument(
        "--updates", type=int, help="the student that was kept at this update; default: the last"
    )
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="of the student's weights; default: float32",
    )
    parser.add_argument(
        "--lora",
        action="store_true",
        help="the adapter alone, as a file that load_lora_weights takes",
    )
    options = parser.parse_args(argv)
    try:
        print(export(options.run, options.folder, options.updates, options.dtype, options.lora))
    except SafetensorError as error:  # for instance a disk that is full
        parser.exit(2, f"{parser.prog}: cannot write {options.folder}: {error}\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
