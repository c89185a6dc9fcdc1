"""Lines of the tables that parts print: one that fails says so and leaves the others."""

import sys
import traceback
from collections.abc import Callable, Sequence

from distill_bench.store.failures import first_line


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
