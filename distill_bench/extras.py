"""Extra data that a method may declare in `needs`, or a run in `student_input`: made once and cached in the store."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from distill_bench.config import RunConfig, method_of
from distill_bench.cost import Ledger
from distill_bench.draws import Draws, generator
from distill_bench.models import Denoiser, Guided, Pipeline
from distill_bench.noise import teacher_sigmas
from distill_bench.rollout import euler
from distill_bench.store import once, read_jsonl, write_bytes
from distill_bench.texts import Texts

ODE_PAIRS, ODE_STEPS = 256, 24
REAL_LATENTS, FIRST_KEY = 432, 2_000_000  # keys of rendered clips that neither teacher nor evaluators have seen

Provider = Callable[[Draws], dict[str, Tensor]]  # draws of a batch -> tensors (B, ...)


def needs_of(config: RunConfig) -> frozenset[str]:
    """What a run needs: its method's own, and real latents where the student begins from them."""
    return method_of(config).needs | ({"real_latents"} if config.student_input == "real_data" else set())


def providers(needs: frozenset[str], config: RunConfig, pipeline: Pipeline, store: Path) -> dict[str, Provider]:
    """A provider for each need of a method.

    Raises:
        ValueError: for a need that nobody provides.
    """
    unknown = sorted(needs - PROVIDERS.keys())
    if unknown:
        raise ValueError(f"nothing provides {', '.join(unknown)}; a method may need: {', '.join(PROVIDERS)}")
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
        return _provider("real_latents", {"x0": x0}, pipeline.texts(prompts), list(range(len(prompts))))
    known = pipeline.prompts()[:REAL_LATENTS]
    which = [i % len(known) for i in range(REAL_LATENTS)]
    key = [config.teacher_hash, config.frames, config.height, config.width, REAL_LATENTS, FIRST_KEY]
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
    made = _cached(store, "real_latents", key, lambda: {"x0": pipeline.data([known[i] for i in which], list(keys)).cpu()})
    return _provider("real_latents", made, pipeline.texts(known), which)


PROVIDERS = {"ode_pairs": ode_pairs, "real_latents": real_latents}


def _provider(purpose: str, tensors: dict[str, Tensor], texts: Texts, which: list[int]) -> Provider:
    """Draws rows of the tensors (N, ...) with the text of each: row i has texts[which[i]]."""

    def draw(draws: Draws) -> dict[str, Tensor]:
        chosen = draws.integers(purpose, len(which))
        rows = {key: value[chosen] for key, value in tensors.items()} | {"text": texts.rows(which[i] for i in chosen)}
        return {key: value.to(draws.device, draws.dtype) for key, value in rows.items()}

    return draw


def _teacher_samples(config: RunConfig, pipeline: Pipeline, store: Path) -> tuple[dict[str, Tensor], Texts, list[int]]:
    shape = pipeline.latent_shape(config.frames, config.height, config.width)
    key = [config.teacher_hash, config.guidance_scale, config.shift, ODE_PAIRS, ODE_STEPS, *shape]
    prompts = pipeline.prompts()[:ODE_PAIRS]
    texts = pipeline.texts(prompts)
    which = [i % len(prompts) for i in range(ODE_PAIRS)]

    def make() -> dict[str, Tensor]:
        teacher = Guided(
            Denoiser(pipeline.transformer.to(pipeline.device), "teacher", Ledger(1)), texts.null_text, config.guidance_scale
        )
        sigmas = teacher_sigmas(ODE_STEPS, config.shift).to(pipeline.device)
        noise = torch.stack([torch.randn(*shape, generator=generator("ode_pairs", i)) for i in range(ODE_PAIRS)])
        x0 = [
            euler(teacher, noise[i : i + 16].to(pipeline.device), sigmas, texts.rows(which[i : i + 16])).cpu()
            for i in range(0, ODE_PAIRS, 16)
        ]
        return {"noise": noise, "x0": torch.cat(x0)}

    return _cached(store, "ode_pairs", key, make), texts, which


def _cached(store: Path, name: str, key: list, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` gives, from extras/<name>-<hash of key>.safetensors once it is there."""
    path = store / "extras" / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.safetensors"
    once(path.with_suffix(""), path.is_file, lambda: write_bytes(path, save({k: v.contiguous() for k, v in make().items()})))
    return load_file(path)


def _clips(config: RunConfig, pipeline: Pipeline) -> tuple[list[str], Tensor]:
    """Prompts and latents of the run's own folder of clips."""
    folder = Path(config.data)
    frames = np.load(folder / "clips.npy", allow_pickle=False)
    prompts = [line["prompt"] for line in read_jsonl(folder / "manifest.jsonl")]
    if len(prompts) != len(frames):
        raise ValueError(f"data {folder}: clips.npy holds {len(frames)} clips, manifest.jsonl lists {len(prompts)}")
    if frames.shape[1:] != (config.frames, 3, config.height, config.width):
        raise ValueError(
            f"data {folder}: clips are {frames.shape[1:]} (T, 3, H, W), the run's "
            f"{(config.frames, 3, config.height, config.width)}; render them at the run's frames, height and width"
        )
    return prompts, torch.cat([pipeline.encode(part).cpu() for part in np.array_split(frames, -(-len(frames) // 16))])
