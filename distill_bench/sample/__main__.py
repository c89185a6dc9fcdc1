"""TODO: sample.__main__."""

import argparse
from pathlib import Path

from distill_bench.sample.run import sample


def main(argv: list[str] | None = None) -> int:
    """Command line: sample one trained run folder."""
    parser = argparse.ArgumentParser(
        prog="distill_bench.sample", description=sample.__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="a run folder with run.yaml and a checkpoint")
    options = parser.parse_args(argv)
    try:
        print(*sample(options.run), sep="\n")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
