"""Arguments of all parts, and lines of their tables: one that fails leaves the others."""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

from distill_bench.store.failures import first_line

SIZES = ("wan-1.3b", "tiny")


def part_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """Parser of the arguments that `bench_gpu.py` gives to every part.

    Args:
        doc: docstring of the part's module.
    """
    parser = argparse.ArgumentParser(prog=name, description=doc.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default=SIZES[0])
    parser.add_argument("--seconds", type=float, default=600, help="no row begins after these")
    return parser


def show(cells: Sequence[str]) -> None:
    """Print a line of a Markdown table at once."""
    print(f"| {' | '.join(cells)} |", flush=True)


def show_row(name: Sequence[str], width: int, make: Callable[[], Sequence[str]] | None) -> bool:
    """Print a line of a table, and the traceback of an error.

    Args:
        name: first cells.
        width: number of all cells.
        make: returns the other cells; None: no time is left for this row.

    Returns:
        False if `make` raised an error.
    """
    reason = "no time was left"
    if make is not None:
        try:
            show([*name, *make()])
            return True
        except Exception as error:  # the other rows are still worth their time
            traceback.print_exc(file=sys.stderr)
            reason = f"failed: {first_line(error)}".replace("|", "/")
    show([*name, reason, *["-"] * (width - len(name) - 1)])
    return make is None
