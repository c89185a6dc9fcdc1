"""Writes the model card of an exported student, and the code that samples it with diffusers."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from distill_bench import __version__
from distill_bench.config.rows.sampling import guidance_in_words
from distill_bench.config.schema import RunConfig
from distill_bench.noise import student_sigmas
from distill_bench.store.claims import attempts
from distill_bench.store.files import read_json, read_jsonl
from distill_bench.teachers.architecture import OWN_AUTOENCODER, Architecture
from distill_bench.teachers.diffusers_folder import EXPERTS
from distill_bench.teachers.kinds import find_teacher
from distill_bench.teachers.prompts import PUBLISHED, negative_text
from distill_bench.train import checkpoint

STEPS = {
    "renoise": "each step predicts the clean clip and adds fresh noise",
    "ode": "each step is an Euler step of the student's ODE",
}


def card(
    run_dir: Path, config: RunConfig, stepping: str, updates: int, name: str, call: list[str]
) -> str:
    """Model card of a student in Markdown: sampling, origin, scores, licence.

    Args:
        run_dir: the run's folder, for its cost, code and scores.
        config: config of the run.
        stepping: of the exported scheduler, a key of `STEPS`.
        updates: student update at which the student was kept.
        name: name of the exported folder; the card's title.
        call: lines of Markdown on how to sample it, from `snippet`.
    """
    teacher = model_name(config.teacher)
    sigmas = student_sigmas(config.nfe, config.shift).tolist()
    on_hub = teacher.count("/") == 1
    scores = _scores_of(run_dir, updates)
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-video",
        *([f"base_model: {_split_revision(teacher)[0]}"] if on_hub else []),
        "---",
        "",
        f"# {name}",
        "",
        f"A {config.nfe}-step student, distilled from {teacher}. Call it without guidance, for",
        f"clips of {config.frames} frames of {config.height}x{config.width}. Its noise levels are",
        f"{', '.join(f'{sigma:.6g}' for sigma in sigmas)}: {STEPS[stepping]}.",
        *(
            f"With the scheduler in `scheduler_{other}`, {STEPS[other]}."
            for other in other_steppings(config, stepping)
        ),
        "A scheduler gives these levels for this number of steps only.",
        "",
        *call,
        "",
        "## Origin",
        "",
        *_table(("", ""), _origin(run_dir, config, updates)),
        "",
        "## Scores",
        "",
        *(_score_table(scores) if scores else ["None: this student has not been scored."]),
        "",
        "## Licence",
        "",
        "The weights derive from the teacher's, and text encoder, tokenizer and autoencoder are",
        "copies of the teacher's: its licence applies to all of them. The licence of the training",
        "prompts may apply as well. distill-bench itself is Apache-2.0.",
        "",
    ]
    return "\n".join(lines)


def other_steppings(config: RunConfig, stepping: str) -> list[str]:
    """Steppings other than the exported one that give other samples."""
    return [other for other in STEPS if other != stepping] if config.nfe > 1 else []


def _origin(run_dir: Path, config: RunConfig, updates: int) -> list[tuple[str, object]]:
    """Settings, cost and code of a run as (name, value) pairs; unknown values are left out."""
    teacher = f"{model_name(config.teacher)} (content {config.teacher_hash})"
    start = config.student and f"{model_name(config.student)} (content {config.student_hash})"
    if config.student_expert == "low_noise":
        start = f"{start or teacher}, {EXPERTS['low_noise']}"
    fields = [f"{key} {value}" for key, value in config.method.items() if key != "name"]
    summary = read_json(run_dir / "train.json") or {}
    last_attempts = attempts(run_dir)[-1:]
    starts = [read_json(attempt / "start.json") or {} for attempt in last_attempts]
    commit = next((start["commit"] for start in starts if start.get("commit")), "unknown")
    rows = {
        "run": run_dir.name,
        "teacher": teacher,
        "student started from": start,
        "initial student of the run": config.init_run,
        "method": f"{config.method['name']}, version {config.method_version}",
        "fields of the method": ", ".join(fields) or "none",
        "student updates": f"{updates} of {config.student_updates}, batch {config.batch_size}",
        "fake-score updates per student update": config.fake_score_updates,
        "learning rates": f"student {config.student_lr:g}, fake score {config.fake_score_lr:g}",
        "guidance scale of the teacher": guidance_in_words(config.guidance_scale),
        "stepping in training": config.stepping if config.nfe > 1 else None,
        "negative prompt of the teacher": _negative_prompt(config),
        "decay of the moving average": config.ema,
        "seed": config.seed,
        "training cost (student forwards over a batch)": summary.get("cost_forward_equivalents"),
        "training time (s)": summary.get("train_seconds"),
        "peak memory (GiB)": summary.get("peak_memory_gib"),
        "code": f"distill-bench {__version__}, commit {commit}",
    }
    return [(name, value) for name, value in rows.items() if value is not None]


def _negative_prompt(config: RunConfig) -> str | None:
    """The text as one cell of a table; None for the empty prompt."""
    value = config.negative_prompt
    # the teacher of a run from elsewhere may be absent, so it is asked for its own text alone
    published = find_teacher(config.teacher).negative_prompt if value == PUBLISHED else ""
    text = negative_text(value, published)
    return " ".join(text.split()).replace("|", "\\|") or None


def model_name(pipeline: str) -> str:
    """Name of a pipeline without local paths: last part of a local folder, or the hub name."""
    return Path(pipeline).name if Path(pipeline).exists() else pipeline


def _split_revision(name: str) -> tuple[str, str]:
    """Split `owner/name@revision` of the hub; the revision may be empty."""
    repository, _, revision = name.partition("@") if "/" in name else (name, "", "")
    return repository, revision


def snippet(
    config: RunConfig,
    stepping: str,
    architecture: Architecture,
    name: str,
    index: dict[str, Any],
    lora: bool,
) -> list[str]:
    """Lines of Markdown with the code that samples an exported student.

    Args:
        config: config of the run.
        stepping: of the exported scheduler, a key of `STEPS`.
        architecture: architecture of the teacher.
        name: name of the exported folder.
        index: the folder's model_index.json: library and class of each part.
        lora: the folder holds only an adapter and a scheduler.
    """
    if OWN_AUTOENCODER in index.get("vae", []):
        return [
            "Its autoencoder is distill-bench's own, which diffusers' pipelines cannot call. Use",
            "the folder as the `student` of further runs.",
        ]
    tokenizer = AutoTokenizer.from_pretrained(architecture.folder / "tokenizer")
    size = f"num_frames={config.frames}, height={config.height}, width={config.width}"
    return [
        "```python",
        *_loading_code(config, architecture, name, index, lora),
        *_decoding_code(architecture),
        *(
            f'# pipe.scheduler = type(pipe.scheduler).from_pretrained("{name}", '
            f'subfolder="scheduler_{other}")'
            for other in other_steppings(config, stepping)
        ),
        *(
            ["torch.manual_seed(0)  # later steps draw their noise from torch's own generator"]
            if stepping == "renoise" and config.nfe > 1
            else []
        ),
        "frames = pipe(",
        '    "a prompt",',
        f"    num_inference_steps={config.nfe}, guidance_scale=1.0,",
        "    generator=torch.Generator().manual_seed(0),",
        f"    {size},",
        f"    max_sequence_length={architecture.text_length(tokenizer)},",
        ").frames[0]",
        f'export_to_video(list(frames), "clip.mp4", fps={architecture.own_fps:g})',
        "```",
    ]


def _loading_code(
    config: RunConfig, architecture: Architecture, name: str, index: dict[str, Any], lora: bool
) -> list[str]:
    library, scheduler = index["scheduler"]
    ours = library.startswith("distill_bench")
    reason = "  # the scheduler's class: needs distill-bench installed" if ours else ""
    imports = [
        "import torch",
        f"from diffusers import {architecture.PIPELINE}",
        "from diffusers.utils import export_to_video",
    ]
    if lora:
        imports.insert(1, f"from {library} import {scheduler}{reason}")
    elif ours:
        imports.insert(1, f"import {library}{reason}")
    source, revision = name, ""
    if lora:
        source, revision = _split_revision(model_name(config.student or config.teacher))
    arguments = f'"{source}"' + (f', revision="{revision}"' if revision else "")
    lines = [*imports, ""]
    if lora and architecture.boundary is not None:
        network, part = architecture.transformer["_class_name"], EXPERTS[config.student_expert]
        lines = [
            *imports,
            f"from diffusers import {network}",
            "",
            f'expert = {network}.from_pretrained({arguments}, subfolder="{part}")',
        ]
        arguments += ", transformer=expert, transformer_2=None, boundary_ratio=None"
    lines.append(f"pipe = {architecture.PIPELINE}.from_pretrained({arguments})")
    if lora:
        lines += [
            f'pipe.load_lora_weights("{name}")',
            f'pipe.scheduler = {scheduler}.from_pretrained("{name}", subfolder="scheduler")',
        ]
    return lines


def _decoding_code(architecture: Architecture) -> list[str]:
    tiles = ", ".join(f"{key}={size}" for key, size in architecture.tiles().items())
    lines = [f"pipe.vae.enable_tiling({tiles})  # large frames in the same tiles as in the run"]
    if architecture.FRAMEWISE:
        lines.append("pipe.vae.use_framewise_decoding = True")
    return lines


def _scores_of(run_dir: Path, updates: int) -> list[dict]:
    """Scores of the student kept at an update; metrics.jsonl of the run is for its last student."""
    scores = read_jsonl(run_dir / "samples" / str(updates) / "metrics.jsonl")
    if not scores and updates == max(checkpoint.students(run_dir)):
        scores = read_jsonl(run_dir / "metrics.jsonl")
    return scores


def _score_table(scores: Iterable[dict]) -> list[str]:
    rows = []
    for score in scores:
        value = score["value"]
        row = {
            "score": score["title"],
            "value": f"{value:.4g}" if math.isfinite(value) else str(value),
            "sd": "" if score.get("sd") is None else f"{score['sd']:.3g}",
            "unit": score.get("unit") or "",
            "clips": score["n"],
            "extractor": score.get("extractor") or "",
            "protocol": score["protocol"],
        }
        rows.append(row)
    return _table(tuple(rows[0]), [tuple(row.values()) for row in rows])


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ("---",) * len(head), *rows)]
