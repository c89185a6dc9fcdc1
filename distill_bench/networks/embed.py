"""`distill-bench embed`: encodes prompts once with a teacher's text encoder, into the store.

    distill-bench embed TEACHER PROMPTS... [--negative-prompt default] [--store runs]
    torchrun --nproc_per_node 8 -m distill_bench.networks.embed ...    each rank encodes its share

Training then reads embeddings and never loads the text encoder. An interrupted command resumes:
prompts in the store are not encoded again. `distill_bench.teachers.embeddings` describes
the folder of embeddings, `distill_bench.teachers.prompts` the formats of prompt files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from distill_bench.networks.ranks import ranks
from distill_bench.networks.text_pipeline import load_texts
from distill_bench.store.files import user_text
from distill_bench.teachers.embeddings import has_text_encoder
from distill_bench.teachers.folder import TeacherError
from distill_bench.teachers.hub import fetch
from distill_bench.teachers.prompts import check_negative_prompt, read_prompts


def embed(
    teacher: str, files: list[Path], store: Path, negatives: Sequence[str] = ()
) -> tuple[Path, int]:
    """Encode this rank's share of all prompts in the files, of the empty and negative prompts.

    Args:
        teacher: a pipeline folder or hub name.
        files: of prompts.
        store: folder of the runs.
        negatives: values of the key `negative_prompt`.

    Returns:
        The folder of the embeddings, and the number of prompts that this rank encoded.

    Raises:
        ValueError: if a file has no prompts, a negative prompt is the name of a file, or the
            teacher has no text encoder.
    """
    for value in negatives:
        check_negative_prompt(value)
    here = ranks()
    prompts = [""]
    for path in files:
        prompts += read_prompts(path)
    fetch(teacher)
    pipeline = load_texts(teacher, here.device)
    prompts += map(pipeline.negative_text, negatives)
    prompts = list(dict.fromkeys(prompts))
    if not has_text_encoder(pipeline.folder):
        raise TeacherError(
            f"teacher {pipeline.folder} has no text encoder: its text_encoder/ holds no weights; "
            "use a folder with a complete text_encoder/"
        )
    # share all prompts and not the missing prompts, whose number changes while other ranks write
    encoded = pipeline.embed(prompts[here.rank :: here.world], store)
    return pipeline.embeddings_folder(store), encoded


def main(argv: list[str] | None = None) -> int:
    """Command line: encode the prompts of files."""
    parser = argparse.ArgumentParser(
        prog="distill-bench embed", description="encode prompt files with a teacher's text encoder"
    )
    parser.add_argument("teacher", help="a pipeline folder or hub name")
    parser.add_argument(
        "prompts",
        type=Path,
        nargs="+",
        help="text files with one prompt per line; .jsonl with `prompt`; .json lists like VBench's",
    )
    parser.add_argument(
        "--store", type=Path, default=Path("runs"), help="folder of the runs; default: runs"
    )
    parser.add_argument(
        "--negative-prompt",
        type=user_text,
        action="append",
        default=[],
        metavar="TEXT",
        help="also encode a run's negative_prompt: a text, file:PATH, or default; may be repeated",
    )
    options = parser.parse_args(argv)
    try:
        folder, encoded = embed(
            options.teacher, options.prompts, options.store, options.negative_prompt
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"{encoded} prompts encoded into {folder}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
