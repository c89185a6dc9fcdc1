"""Write mini-wan as a diffusers pipeline folder, with a card of its training and quality."""

import argparse
import copy
import json
import shutil

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import PreTrainedTokenizerFast

from distill_bench.autoencoder import FrameAutoencoder
from distill_bench.domain import shapes
from distill_bench.pretrain.fit_autoencoder import MIX
from distill_bench.pretrain.network import TeacherNetwork
from distill_bench.pretrain.quality import (
    COUNTS,
    FD_CLIPS,
    FINAL_COUNTS,
    GUIDANCE,
    SHIFT,
    STEPS,
)

# options that fix a run's weights at each step; a resumed run must share them with its checkpoint
RECIPE = ("clips", "autoencoder_steps", "batch", "muon_lr", "lr", "seed")


def write_pipeline(
    network: TeacherNetwork,
    vae: FrameAutoencoder,
    tokenizer: PreTrainedTokenizerFast,
    curve: list[dict[str, float]],
    options: argparse.Namespace,
) -> None:
    """Write the pipeline folder (float16 safetensors), all-or-nothing."""
    folder = options.out.with_name(f".{options.out.name}.writing")
    shutil.rmtree(folder, ignore_errors=True)
    half = copy.deepcopy(network).half()
    half.transformer.save_pretrained(folder / "transformer")
    half.text_encoder.save_pretrained(folder / "text_encoder")
    # a new network, because the configuration of a loaded one names the folder it was loaded from
    half_vae = FrameAutoencoder(vae.config.latent_channels, vae.config.width)
    half_vae.load_state_dict(vae.state_dict())
    half_vae.half().save_pretrained(folder / "vae")
    tokenizer.save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "vae": ["distill_bench.autoencoder", "FrameAutoencoder"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(prompts()) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(quality_card(curve, options), encoding="utf-8")
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(options.out)


def prompts() -> list[str]:
    """Captions from which students are trained and evaluated, a third of each kind.

    The 216 named ones, three times the 72 with a direction and twelve times the 18 free ones.
    """
    captions = [[shapes.caption(a) for a in shapes.all_attributes(kind)] for kind in shapes.KINDS]
    most = max(map(len, captions))
    return [caption for kind in captions for caption in kind * (most // len(kind))]


def quality_card(curve: list[dict[str, float]], options: argparse.Namespace) -> str:
    """Model card: command, training curve and quality."""
    columns = list(dict.fromkeys(name for row in curve for name in row))
    rows = [" | ".join(str(row.get(name, "")) for name in columns) for row in curve]
    table = "\n".join(f"| {row} |" for row in rows)
    mix = ", ".join(f"{5 * share} % {kind}" for kind, share in MIX.items())
    return f"""# mini-wan

A miniature of Wan (the same classes), trained on {options.clips} captioned synthetic clips of
`distill_bench/domain/shapes.py`: {mix}.

    {command(options)}

Quality of samples, by the oracle: {STEPS} steps, moving average of the weights, unguided unless a
column says guided (at {GUIDANCE}). `colour` to `all`, `guided`: share of clips of named captions
that show what the caption names. Of free captions, whose data has speeds 0 in
{shapes.STILL_SHARE:.0%} of the clips: `speed_w1`, W1 distance of speeds to the data's in px/frame;
`mean_speed`, over the data's; `still`, share of still clips less the data's. `fd`, Fréchet distance
of {FD_CLIPS} samples to data of the same captions; `fd_floor`, of data to such data; means over
sets of data. `nearest`: distance of unguided samples of named captions to their nearest training
clip, over that of held-out clips.
Clips:
{" named and ".join(map(str, COUNTS))} free; in the last row
{" and ".join(map(str, FINAL_COUNTS))}.

| {" | ".join(columns)} |
|{"---|" * len(columns)}
{table}

torch {torch.__version__}, {torch.get_num_threads()} threads. Licence: Apache-2.0.
"""


def command(options: argparse.Namespace) -> str:
    """Command that trains this teacher."""
    names = ("steps", "decay_steps", "every", *RECIPE)
    flags = [f"--{name.replace('_', '-')} {getattr(options, name)}" for name in names]
    flags += ["--compile"] * options.compile
    first, second = flags[: len(flags) // 2], flags[len(flags) // 2 :]
    return " ".join(["distill-bench pretrain", *first, "\\\n       ", *second])
