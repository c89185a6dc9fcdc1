"""Extra data for `Method.needs` and `student_input: real_data`, made once per store."""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from distill_bench.config.schema import RunConfig
from distill_bench.draws import generator
from distill_bench.networks.denoiser import Denoiser, Guided
from distill_bench.networks.ledger import Ledger
from distill_bench.networks.offload import place, to_host_memory
from distill_bench.networks.pipeline import clips_per_batch
from distill_bench.networks.precision import cast
from distill_bench.noise import teacher_sigmas
from distill_bench.rollout import euler
from distill_bench.store.claims import once
from distill_bench.store.files import read_jsonl, write_bytes
from distill_bench.teachers.embeddings import Texts
from distill_bench.teachers.experts import guidance_of
from distill_bench.teachers.kinds import Pipeline
from distill_bench.train.inputs import Rows

ODE_PAIRS = 256
ODE_STEPS = 24  # at shift 3 the Gaussian teacher's samples are within 8 % of the exact solution
REAL_LATENTS = 432
FIRST_KEY = (
    2_000_000  # of rendered clips; the teacher and the evaluators were trained on other keys
)
ENCODED_TOGETHER = 16  # clips of a run's `data` per encoded batch


def providers(
    needs: frozenset[str], config: RunConfig, pipeline: Pipeline, store: Path
) -> dict[str, Rows]:
    """The rows of each need; data that the store lacks are made first.

    Raises:
        ValueError: for an unknown need, or if the clips have another size than the run's.
    """
    unknown = sorted(needs - PROVIDERS.keys())
    if unknown:
        raise ValueError(
            f"nothing provides {', '.join(unknown)}; a method may need: {', '.join(PROVIDERS)}"
        )
    return {need: PROVIDERS[need](config, pipeline, store) for need in sorted(needs)}


def ode_pairs(config: RunConfig, pipeline: Pipeline, store: Path) -> Rows:
    """Pairs of noise and the guided teacher's ODE solution from it: `noise`, `x0`, `text`.

    Yin et al., 2023, section 4.2.
    """
    return Rows("ode_pairs", *_teacher_samples(config, pipeline, store))


def real_latents(config: RunConfig, pipeline: Pipeline, store: Path) -> Rows:
    """Clean latents of real clips and their text: `x0`, `text`.

    They come from the folder of clips in the run's `data` (`clips.npy` and `manifest.jsonl`, as
    `distill_bench.sample` writes them). Without `data`, clips are rendered for the teacher's
    prompts, or sampled from the guided teacher if the prompts cannot be rendered.
    """
    if config.data is not None:
        prompts, x0 = _clips_of_run(config, pipeline)
        texts = pipeline.texts(prompts)
        return Rows("real_latents", {"x0": x0}, texts, range(len(prompts)))
    prompts = pipeline.prompts()[:REAL_LATENTS]
    text_of_row = [i % len(prompts) for i in range(REAL_LATENTS)]
    example = pipeline.data([prompts[0]], [FIRST_KEY])
    if example is None:
        pairs, texts, text_of_row = _teacher_samples(config, pipeline, store)
        return Rows("real_latents", {"x0": pairs["x0"]}, texts, text_of_row)
    expected = pipeline.latent_shape(config.frames, config.height, config.width)
    shape = tuple(example.shape[1:])
    if shape != tuple(expected):
        raise ValueError(
            f"rendered clips have latents of shape {shape}, but the run needs {tuple(expected)}; "
            "name a folder of clips in `data`"
        )
    key = [
        config.teacher_hash,
        config.frames,
        config.height,
        config.width,
        REAL_LATENTS,
        FIRST_KEY,
        *_prompts_key(config),
    ]

    def render() -> dict[str, Tensor]:
        keys = range(FIRST_KEY, FIRST_KEY + REAL_LATENTS)
        return {"x0": pipeline.data([prompts[i] for i in text_of_row], list(keys)).cpu()}

    path = _cached(store, "real_latents", key, render)
    return Rows("real_latents", load_file(path), pipeline.texts(prompts), text_of_row)


PROVIDERS = {"ode_pairs": ode_pairs, "real_latents": real_latents}


def _teacher_samples(
    config: RunConfig, pipeline: Pipeline, store: Path
) -> tuple[dict[str, Tensor], Texts, list[int]]:
    """Samples of the guided teacher's ODE, cached in one file per batch.

    Ranks share the batches, and a killed process loses only one batch. The teacher runs in the
    run's training precision.

    Returns:
        `noise` and `x0`, (ODE_PAIRS, C, T, H, W); the texts; the index of each row's text.
    """
    shape = pipeline.latent_shape(config.frames, config.height, config.width)
    key = [config.teacher_hash, config.guidance_scale, config.shift, ODE_PAIRS, ODE_STEPS, *shape]
    key += _prompts_key(config)
    autocast = None
    if config.precision == "bfloat16":
        key += [config.precision, config.weights]
        autocast = torch.bfloat16
    if config.negative_prompt_hash:
        key += ["negative_prompt", config.negative_prompt_hash]
    prompts = pipeline.prompts()[:ODE_PAIRS]
    texts = pipeline.texts(prompts, negative_prompt=config.negative_prompt)
    text_of_row = [i % len(prompts) for i in range(ODE_PAIRS)]
    batch_size = clips_per_batch(config)

    @functools.cache
    def teacher() -> Guided:
        net = pipeline.transformer
        if config.weights == "bfloat16":
            net = cast(net, torch.bfloat16)
        net = place(net, pipeline.device, config.teacher_offload)
        denoiser = Denoiser(net, "teacher", Ledger(1), autocast)
        batched = config.guidance_forwards == "batched"
        scale = guidance_of(config.guidance_scale, config.teacher)
        return Guided(denoiser, texts.null_text, scale, batched)

    def make(first: int) -> dict[str, Tensor]:
        rows = range(first, min(first + batch_size, ODE_PAIRS))
        print(f"the teacher's samples {first} to {rows[-1]} of {ODE_PAIRS}", flush=True)
        noises = [torch.randn(*shape, generator=generator("ode_pairs", i)) for i in rows]
        noise = torch.stack(noises)
        sigmas = teacher_sigmas(ODE_STEPS, config.shift).to(pipeline.device)
        text = texts.rows(text_of_row[i] for i in rows)
        x0 = euler(teacher(), noise.to(pipeline.device), sigmas, text)
        return {"noise": noise, "x0": x0.cpu()}

    def batches(wait: bool) -> list[Path]:
        return [
            _cached(
                store,
                "ode_pairs",
                [*key, first, batch_size],
                functools.partial(make, first),
                wait,
            )
            for first in range(0, ODE_PAIRS, batch_size)
        ]

    batches(wait=False)  # make the batches that no other process is making
    made = [load_file(path) for path in batches(wait=True)]
    if teacher.cache_info().currsize:
        to_host_memory(pipeline.transformer)  # where it was before
    samples = {name: torch.cat([part[name] for part in made]) for name in made[0]}
    return samples, texts, text_of_row


def _prompts_key(config: RunConfig) -> list[str]:
    """Part of a cache key: the hash of the run's prompts; empty for the teacher's own prompts."""
    return [config.prompts_hash] if config.prompts is not None else []


def _cached(
    store: Path, name: str, key: list, make: Callable[[], dict[str, Tensor]], wait: bool = True
) -> Path:
    """The file extras/<name>-<hash of key>.safetensors, made if it is missing.

    Args:
        wait: if False, return before the file exists while another process is making it.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    path = store / "extras" / f"{name}-{digest}.safetensors"

    def write() -> None:
        tensors = {name: tensor.contiguous() for name, tensor in make().items()}
        write_bytes(path, save(tensors))

    once(path.with_suffix(""), path.is_file, write, wait)
    return path


def _clips_of_run(config: RunConfig, pipeline: Pipeline) -> tuple[list[str], Tensor]:
    """Prompts and latents (N, C, T, H, W) of the clips in the run's `data`."""
    folder = Path(config.data)
    frames = np.load(folder / "clips.npy", allow_pickle=False)
    prompts = [line["prompt"] for line in read_jsonl(folder / "manifest.jsonl")]
    if len(prompts) != len(frames):
        raise ValueError(
            f"data {folder}: clips.npy holds {len(frames)} clips, but manifest.jsonl lists "
            f"{len(prompts)}; write one line per clip"
        )
    expected = (config.frames, 3, config.height, config.width)
    if frames.shape[1:] != expected:
        raise ValueError(
            f"data {folder}: clips are {frames.shape[1:]} (T, 3, H, W), but the run needs "
            f"{expected}; render them at the run's frames, height and width"
        )
    parts = np.array_split(frames, -(-len(frames) // ENCODED_TOGETHER))
    return prompts, torch.cat([pipeline.encode(part).cpu() for part in parts])
