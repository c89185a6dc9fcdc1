"""`distill-bench export RUN FOLDER`: writes a trained student as a diffusers pipeline."""

import argparse
from pathlib import Path

from safetensors import SafetensorError

from distill_bench.export.pipeline import DTYPES, STEPPINGS, export


def main(argv: list[str] | None = None) -> int:
    """Write a student as a pipeline folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="distill-bench export", description=export.__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="a run folder with a trained student")
    parser.add_argument("folder", type=Path, help="the folder to write; new or empty")
    parser.add_argument(
        "--updates", type=int, help="export the student kept at this update; default: the last"
    )
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="data type of the student's weights; default: float32",
    )
    parser.add_argument(
        "--lora",
        action="store_true",
        help="write only the adapter, as a file for load_lora_weights, and the scheduler",
    )
    parser.add_argument(
        "--stepping",
        choices=STEPPINGS,
        help="stepping of the pipeline's scheduler; default: as in training",
    )
    options = parser.parse_args(argv)
    try:
        wanted = options.updates, options.dtype, options.lora, options.stepping
        print(export(options.run, options.folder, *wanted))
    except SafetensorError as error:  # e.g. a full disk
        parser.exit(2, f"{parser.prog}: cannot write {options.folder}: {error}\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
