"""TODO: report.__main__."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distill_bench.report.page import ReportError, report
from distill_bench.report.results import ResultsError, parse_keys


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: report one sweep."""
    parser = argparse.ArgumentParser(
        prog="distill_bench.report", description="tables, figures and a page of a sweep"
    )
    parser.add_argument("sweep", help="the sweep's YAML, or its name")
    parser.add_argument("--store", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument(
        "--baseline",
        metavar="KEY=VALUE,...",
        help="row that differences are taken to; default: the sweep's first",
    )
    parser.add_argument(
        "--budget",
        type=float,
        help="cost of the equal-cost table; default: the largest that all runs reach",
    )
    options = parser.parse_args(argv)
    try:
        baseline = parse_keys(options.baseline) if options.baseline else None
        print(report(options.sweep, options.store, options.out, baseline, options.budget))
    except (ReportError, ResultsError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{parser.prog}: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
