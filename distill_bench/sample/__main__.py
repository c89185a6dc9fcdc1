"""Command line: `python -m distill_bench.sample RUN`; ranks started by torchrun share the clips."""

import argparse
from pathlib import Path

from distill_bench.sample.run import sample


def main(argv: list[str] | None = None) -> int:
    """Sample the students of a run folder and print the folders of clips; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="distill-bench sample", description="Sample the clips of a run's kept students."
    )
    parser.add_argument("run", type=Path, help="run folder with run.yaml and a checkpoint")
    options = parser.parse_args(argv)
    try:
        print(*sample(options.run), sep="\n")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
