"""Texts once: encodes prompt files with a teacher's own text encoder into the store, so that training never loads it.

    distill-bench embed TEACHER PROMPTS... [--store runs]
    torchrun --nproc_per_node 8 -m distill_bench.embed ...    every rank takes its share

Prompts that are there are not encoded again, so that it goes on where it was stopped; `distill_bench.texts` says where they lie
and what a file of prompts is.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save
from torch import Tensor

from distill_bench.models import load_texts, place_of_launch
from distill_bench.store import write_bytes
from distill_bench.teacher import TeacherError
from distill_bench.texts import Embeddings, has_text_encoder, read_prompts, text_key

SHARD, BATCH = 128, 8  # prompts a file and a forward


def embed(teacher: str, files: list[Path], store: Path) -> tuple[Path, int]:
    """Encode every prompt of the files, and the null text; returns the folder and how many this rank encoded.

    Raises:
        ValueError: for a file that has no prompts, or a teacher that has no text encoder.
    """
    rank, ranks, device = place_of_launch()
    prompts = list(dict.fromkeys(["", *(prompt for path in files for prompt in read_prompts(path))]))
    pipeline = load_texts(teacher, device)
    if not has_text_encoder(pipeline.folder):
        raise TeacherError(f"teacher {pipeline.folder} has no text encoder: its text_encoder/ holds no weights")
    folder = pipeline.embeddings(store)
    there = Embeddings(folder)
    mine = prompts[rank::ranks]  # of all: which are missing changes while others write
    missing = [prompt for prompt in mine if prompt not in there]
    if missing:
        text_pipeline = pipeline.text_pipeline()
        console = Console(file=sys.stderr, quiet=not sys.stderr.isatty() or rank > 0)
        shards = [missing[at : at + SHARD] for at in range(0, len(missing), SHARD)]
        for shard in track(shards, "encoding prompts", console=console, transient=True):
            chunks = [pipeline.encode_with(text_pipeline, shard[at : at + BATCH]).cpu() for at in range(0, len(shard), BATCH)]
            write_shard(folder, shard, torch.cat(chunks), teacher)
    return folder, len(missing)


def write_shard(folder: Path, prompts: list[str], embeddings: Tensor, teacher: str) -> None:
    """Write the embeddings (N, L, D) of prompts as one file, named by what is in it, whole or not at all."""
    rows = {}
    for prompt, embedding in zip(prompts, embeddings, strict=True):
        filled = (embedding != 0).any(-1).nonzero()
        rows[text_key(prompt)] = embedding[: int(filled.max()) + 1 if len(filled) else 0].contiguous()
    about = {"teacher": teacher, "length": str(embeddings.shape[1])}
    about["prompts"] = json.dumps({text_key(prompt): prompt for prompt in prompts})
    name = hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()[:16]
    write_bytes(folder / f"{name}.safetensors", save(rows, about))


def main(argv: list[str] | None = None) -> int:
    """Command line: encode prompt files once."""
    parser = argparse.ArgumentParser(prog="distill_bench.embed", description="encode prompt files with a teacher's text encoder")
    parser.add_argument("teacher", help="a pipeline folder or hub name")
    parser.add_argument("prompts", type=Path, nargs="+", help="text, one a line; .jsonl with `prompt`; .json lists, as VBench's")
    parser.add_argument("--store", type=Path, default=Path("runs"), help="where runs look for them; default: runs")
    options = parser.parse_args(argv)
    try:
        folder, made = embed(options.teacher, options.prompts, options.store)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"{made} prompts encoded into {folder}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
