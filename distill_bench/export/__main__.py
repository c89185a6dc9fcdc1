"""TODO: export.__main__."""

import argparse
from pathlib import Path

from safetensors import SafetensorError

from distill_bench.export.pipeline import DTYPES, export


def main(argv: list[str] | None = None) -> int:
    """Command line: write a student as a pipeline folder."""
    parser = argparse.ArgumentParser(
        prog="distill-bench export", description=export.__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="a run folder with a trained student")
    parser.add_argument("folder", type=Path, help="where to: a new folder")
    parser.add_argument(
        "--updates", type=int, help="the student that was kept at this update; default: the last"
    )
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="of the student's weights; default: float32",
    )
    parser.add_argument(
        "--lora",
        action="store_true",
        help="the adapter alone, as a file that load_lora_weights takes",
    )
    options = parser.parse_args(argv)
    try:
        print(export(options.run, options.folder, options.updates, options.dtype, options.lora))
    except SafetensorError as error:  # for instance a disk that is full
        parser.exit(2, f"{parser.prog}: cannot write {options.folder}: {error}\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
