"""TODO: export.card."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from distill_bench import __version__
from distill_bench.config.schema import RunConfig
from distill_bench.noise import student_sigmas
from distill_bench.store.claims import attempts
from distill_bench.store.files import read_json, read_jsonl
from distill_bench.teachers.architectures import OWN_AUTOENCODER, Architecture
from distill_bench.train import checkpoint


def card(run_dir: Path, config: RunConfig, updates: int, name: str, call: list[str]) -> str:
    """What the student is, where it comes from, what it scores, and how it is called."""
    teacher, begun = model_name(config.teacher), config.student and model_name(config.student)
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


def model_name(pipeline: str) -> str:
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
    begun, revision = _on_hub(model_name(config.student or config.teacher)) if lora else (name, "")
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
