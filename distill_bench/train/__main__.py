"""`python -m distill_bench.train RUN_FOLDER`: train one run."""

import argparse
from contextlib import nullcontext
from pathlib import Path

from distill_bench.config.resolve import load_run
from distill_bench.plan.memory import check_memory
from distill_bench.store.compiled import compiled_networks
from distill_bench.store.machine import keep_freed_memory
from distill_bench.store.stop import StopRequest
from distill_bench.train.loop import ended, train


def main(argv: list[str] | None = None) -> int:
    """Train one run folder from the command line."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(
        prog="distill-bench train", description=train.__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="a run folder with run.yaml")
    options = parser.parse_args(argv)
    try:
        config = load_run(options.run)
        if ended(options.run) is None:
            check_memory(config)
        with compiled_networks(options.run.parent) if config.compile else nullcontext():
            summary = train(options.run, StopRequest().listen())
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"{summary['status']} after {summary['student_updates']} student updates")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
