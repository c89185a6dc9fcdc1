"""Progress of long work, on standard error."""

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track

Item = TypeVar("Item")


def tracked(items: Sequence[Item], title: str, shown: bool = True) -> Iterable[Item]:
    """Iterate over items with a bar that disappears at the end; silent if not on a terminal."""
    quiet = not (shown and sys.stderr.isatty())
    console = Console(file=sys.stderr, quiet=quiet, markup=False, emoji=False)
    return track(items, escape(title), console=console, transient=True)
