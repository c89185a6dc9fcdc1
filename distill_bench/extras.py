"""Extra data that a method may declare in `needs`: made once from the teacher, cached in the store, shared by all runs."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_bench.config import RunConfig
from distill_bench.cost import Ledger
from distill_bench.draws import Draws, generator
from distill_bench.models import Denoiser, Guided, Pipeline
from distill_bench.noise import teacher_sigmas
from distill_bench.rollout import euler

ODE_PAIRS, ODE_STEPS = 256, 24

Provider = Callable[[Draws], dict[str, Tensor]]  # draws of a batch -> tensors (B, ...)


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
    shape = pipeline.latent_shape(config.frames, config.height, config.width)
    key = [config.teacher_hash, config.guidance_scale, config.shift, ODE_PAIRS, ODE_STEPS, *shape]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    path = store / "extras" / f"ode_pairs-{name}.safetensors"
    prompts = pipeline.prompts()
    texts = pipeline.encode_text([*prompts, ""])
    which = [i % len(prompts) for i in range(ODE_PAIRS)]
    if not path.is_file():
        teacher = Guided(Denoiser(pipeline.transformer, "teacher", Ledger(1)), texts[-1:], config.guidance_scale)
        sigmas = teacher_sigmas(ODE_STEPS, config.shift).to(pipeline.device)
        noise = torch.stack([torch.randn(*shape, generator=generator("ode_pairs", i)) for i in range(ODE_PAIRS)])
        x0 = [
            euler(teacher, noise[i : i + 16].to(pipeline.device), sigmas, texts[which[i : i + 16]]).cpu()
            for i in range(0, ODE_PAIRS, 16)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        save_file({"noise": noise, "x0": torch.cat(x0)}, temporary)
        os.replace(temporary, path)  # whoever comes first: the bits are the same
    pairs = load_file(path)

    def draw(draws: Draws) -> dict[str, Tensor]:
        chosen = draws.integers("ode_pairs", ODE_PAIRS)
        text = texts[[which[i] for i in chosen]]
        return {
            "noise": pairs["noise"][chosen].to(text.device),
            "x0": pairs["x0"][chosen].to(text.device),
            "text": text,
        }

    return draw


PROVIDERS = {"ode_pairs": ode_pairs}
