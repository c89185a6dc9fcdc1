"""Extra data that a method may declare in `needs`, or a run in `student_input`: made once and cached in the store."""

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
from distill_bench.draws import Draws, generator
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
from distill_bench.teachers.kinds import Pipeline
from distill_bench.train.inputs import Provider

ODE_PAIRS, ODE_STEPS = 256, 24
REAL_LATENTS, FIRST_KEY = (
    432,
    2_000_000,
)  # keys of rendered clips that neither teacher nor evaluators have seen


def providers(
    needs: frozenset[str], config: RunConfig, pipeline: Pipeline, store: Path
) -> dict[str, Provider]:
    """A provider for each need of a method.

    Raises:
        ValueError: for a need that nobody provides.
    """
    unknown = sorted(needs - PROVIDERS.keys())
    if unknown:
        raise ValueError(
            f"nothing provides {', '.join(unknown)}; a method may need: {', '.join(PROVIDERS)}"
        )
    return {need: PROVIDERS[need](config, pipeline, store) for need in sorted(needs)}


def ode_pairs(config: RunConfig, pipeline: Pipeline, store: Path) -> Provider:
    """Noise and what the guided teacher's ODE makes of it (Yin et al., 2023, section 4.2): `noise`, `x0`, `text`."""
    return _provider("ode_pairs", *_teacher_samples(config, pipeline, store))


def real_latents(config: RunConfig, pipeline: Pipeline, store: Path) -> Provider:
    """Clean latents of real clips and their text: `x0`, `text`.

    From the folder of clips that the run's `data` names (`clips.npy`, `manifest.jsonl`: as `distill_bench.sample` writes them);
    without one rendered for the teacher's prompts, where their domain can be, else sampled from the guided teacher.
    """
    if config.data is not None:
        prompts, x0 = _clips(config, pipeline)
        return _provider(
            "real_latents", {"x0": x0}, pipeline.texts(prompts), list(range(len(prompts)))
        )
    known = pipeline.prompts()[:REAL_LATENTS]
    which = [i % len(known) for i in range(REAL_LATENTS)]
    key = [
        config.teacher_hash,
        config.frames,
        config.height,
        config.width,
        REAL_LATENTS,
        FIRST_KEY,
        *_own_prompts(config),
    ]
    keys = range(FIRST_KEY, FIRST_KEY + REAL_LATENTS)
    x0 = pipeline.data([known[which[0]]], [FIRST_KEY])
    if x0 is None:
        pairs, texts, which = _teacher_samples(config, pipeline, store)
        return _provider("real_latents", {"x0": pairs["x0"]}, texts, which)
    expected = pipeline.latent_shape(config.frames, config.height, config.width)
    if tuple(x0.shape[1:]) != tuple(expected):
        raise ValueError(
            f"rendered clips make latents {tuple(x0.shape[1:])}, the run's are {tuple(expected)}; name a folder in `data`"
        )
    made = _made(
        store,
        "real_latents",
        key,
        lambda: {"x0": pipeline.data([known[i] for i in which], list(keys)).cpu()},
    )
    return _provider("real_latents", load_file(made), pipeline.texts(known), which)


PROVIDERS = {"ode_pairs": ode_pairs, "real_latents": real_latents}


def _provider(purpose: str, tensors: dict[str, Tensor], texts: Texts, which: list[int]) -> Provider:
    """Draws rows of the tensors (N, ...) with the text of each: row i has texts[which[i]]."""

    def draw(draws: Draws) -> dict[str, Tensor]:
        chosen = draws.integers(purpose, len(which))
        rows = {key: value[chosen] for key, value in tensors.items()} | {
            "text": texts.rows(which[i] for i in chosen)
        }
        return {key: value.to(draws.device, draws.dtype) for key, value in rows.items()}

    return draw


def _teacher_samples(
    config: RunConfig, pipeline: Pipeline, store: Path
) -> tuple[dict[str, Tensor], Texts, list[int]]:
    """Guided ODE samples in the precision of the run's own passes, file by file: shared by ranks, and not lost with a process."""
    shape = pipeline.latent_shape(config.frames, config.height, config.width)
    low = config.precision == "bfloat16"
    key = [config.teacher_hash, config.guidance_scale, config.shift, ODE_PAIRS, ODE_STEPS, *shape]
    key += _own_prompts(config) + ([config.precision, config.weights] if low else [])
    prompts = pipeline.prompts()[:ODE_PAIRS]
    texts = pipeline.texts(prompts)
    which = [i % len(prompts) for i in range(ODE_PAIRS)]
    together = clips_per_batch(config)

    @functools.cache
    def teacher() -> Guided:
        net = (
            cast(pipeline.transformer, torch.bfloat16)
            if config.weights == "bfloat16"
            else pipeline.transformer
        )
        net = place(net, pipeline.device, config.teacher_offload)
        denoiser = Denoiser(net, "teacher", Ledger(1), torch.bfloat16 if low else None)
        return Guided(
            denoiser, texts.null_text, config.guidance_scale, config.guidance_forwards == "batched"
        )

    def make(first: int) -> dict[str, Tensor]:
        some = range(first, min(first + together, ODE_PAIRS))
        print(f"the teacher's samples {first} to {some[-1]} of {ODE_PAIRS}", flush=True)
        noise = torch.stack(
            [torch.randn(*shape, generator=generator("ode_pairs", i)) for i in some]
        )
        sigmas = teacher_sigmas(ODE_STEPS, config.shift).to(pipeline.device)
        x0 = euler(teacher(), noise.to(pipeline.device), sigmas, texts.rows(which[i] for i in some))
        return {"noise": noise, "x0": x0.cpu()}

    def files(wait: bool) -> list[Path]:
        firsts = range(0, ODE_PAIRS, together)
        return [
            _made(store, "ode_pairs", [*key, first, together], functools.partial(make, first), wait)
            for first in firsts
        ]

    files(wait=False)  # what nobody else is making
    made = [load_file(path) for path in files(wait=True)]
    if teacher.cache_info().currsize:
        to_host_memory(pipeline.transformer)  # where whoever runs it next expects it
    return {name: torch.cat([part[name] for part in made]) for name in made[0]}, texts, which


def _own_prompts(config: RunConfig) -> list[str]:
    """What the prompts of a run count as, where they are not its teacher's."""
    return [config.prompts_hash] if config.prompts is not None else []


def _made(
    store: Path, name: str, key: list, make: Callable[[], dict[str, Tensor]], wait: bool = True
) -> Path:
    """The file extras/<name>-<hash of key>.safetensors with what `make` gives; without `wait` it may be still in the making."""
    path = (
        store
        / "extras"
        / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.safetensors"
    )

    def write() -> None:
        write_bytes(path, save({k: v.contiguous() for k, v in make().items()}))

    once(path.with_suffix(""), path.is_file, write, wait)
    return path


def _clips(config: RunConfig, pipeline: Pipeline) -> tuple[list[str], Tensor]:
    """Prompts and latents of the run's own folder of clips."""
    folder = Path(config.data)
    frames = np.load(folder / "clips.npy", allow_pickle=False)
    prompts = [line["prompt"] for line in read_jsonl(folder / "manifest.jsonl")]
    if len(prompts) != len(frames):
        raise ValueError(
            f"data {folder}: clips.npy holds {len(frames)} clips, manifest.jsonl lists {len(prompts)}"
        )
    if frames.shape[1:] != (config.frames, 3, config.height, config.width):
        raise ValueError(
            f"data {folder}: clips are {frames.shape[1:]} (T, 3, H, W), the run's "
            f"{(config.frames, 3, config.height, config.width)}; render them at the run's frames, height and width"
        )
    return prompts, torch.cat(
        [pipeline.encode(part).cpu() for part in np.array_split(frames, -(-len(frames) // 16))]
    )
