"""Command line of `report`: tables, figures and page of a sweep.

    python -m distill_bench.report SWEEP [--baseline method=NAME,KEY=VALUE] [--budget COST]

Reads only files and needs no torch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distill_bench.config.resolve import absolute_paths
from distill_bench.report.csv_files import ResultsError
from distill_bench.report.rows import parse_keys
from distill_bench.report.write import ReportError, report
from distill_bench.store.failures import os_error
from distill_bench.store.files import user_path, user_text


def main(argv: Sequence[str] | None = None) -> int:
    """Report one sweep; returns 0, or 2 if there is nothing to report."""
    parser = argparse.ArgumentParser(
        prog="distill-bench report",
        description="Write tables, figures and a page of a sweep's runs to results/SWEEP.",
    )
    parser.add_argument("sweep", help="name or YAML of the sweep")
    parser.add_argument("--store", type=user_path, default=Path("runs"), help="folder of the runs")
    parser.add_argument(
        "--out", type=user_path, default=Path("results"), help="folder of all results"
    )
    parser.add_argument(
        "--baseline",
        type=user_text,
        metavar="KEY=VALUE,...",
        help="row that is subtracted in differences, e.g. method=dmd2,fake_score_updates=5; "
        "default: the sweep's baseline, else its first row",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="COST",
        help="training cost of the equal-cost table, in forward equivalents; "
        "default: the largest that every finished run reaches",
    )
    options = parser.parse_args(argv)
    try:
        baseline = parse_keys(options.baseline) if options.baseline else None
        baseline = baseline and baseline | absolute_paths(baseline)
        print(report(options.sweep, options.store, options.out, baseline, options.budget))
    except (ReportError, ResultsError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{parser.prog}: cannot write: {os_error(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
