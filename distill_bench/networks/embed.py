"""Texts once: encodes prompt files with a teacher's own text encoder into the store, so that training never loads it.

    distill-bench embed TEACHER PROMPTS... [--store runs]
    torchrun --nproc_per_node 8 -m distill_bench.embed ...    every rank takes its share

Prompts that are there are not encoded again, so that it goes on where it was stopped; `distill_bench.teachers.texts` says where they lie
and what a file of prompts is.
"""

import argparse
from pathlib import Path

from distill_bench.networks.ranks import ranks
from distill_bench.networks.text_pipeline import load_texts
from distill_bench.teachers.folder import TeacherError
from distill_bench.teachers.hub import fetch
from distill_bench.teachers.texts import has_text_encoder, read_prompts


def embed(teacher: str, files: list[Path], store: Path) -> tuple[Path, int]:
    """Encode every prompt of the files, and the null text; returns the folder and how many this rank encoded.

    Raises:
        ValueError: for a file that has no prompts, or a teacher that has no text encoder.
    """
    here = ranks()
    prompts = list(
        dict.fromkeys(["", *(prompt for path in files for prompt in read_prompts(path))])
    )
    fetch(teacher)
    pipeline = load_texts(teacher, here.device)
    if not has_text_encoder(pipeline.folder):
        raise TeacherError(
            f"teacher {pipeline.folder} has no text encoder: its text_encoder/ holds no weights"
        )
    made = pipeline.embed(
        prompts[here.rank :: here.world], store
    )  # a share of all: which are missing changes while others write
    return pipeline.embeddings(store), made


def main(argv: list[str] | None = None) -> int:
    """Command line: encode prompt files once."""
    parser = argparse.ArgumentParser(
        prog="distill-bench embed", description="encode prompt files with a teacher's text encoder"
    )
    parser.add_argument("teacher", help="a pipeline folder or hub name")
    parser.add_argument(
        "prompts",
        type=Path,
        nargs="+",
        help="text, one a line; .jsonl with `prompt`; .json lists, as VBench's",
    )
    parser.add_argument(
        "--store", type=Path, default=Path("runs"), help="where runs look for them; default: runs"
    )
    options = parser.parse_args(argv)
    try:
        folder, made = embed(options.teacher, options.prompts, options.store)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"{made} prompts encoded into {folder}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
