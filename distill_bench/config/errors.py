"""Configuration errors, and the hint that ends a message about an unknown name."""

import difflib
from collections.abc import Sequence


class ConfigError(ValueError):
    """Invalid configuration; the message is one line."""


class MissingPackage(ConfigError):
    """A run needs a package that is not installed."""


def hint(name: str, known: Sequence[str]) -> str:
    """Hint that ends a message about an unknown name: the closest known name, or all names."""
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else f"; known: {', '.join(known)}"
