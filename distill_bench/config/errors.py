"""Errors of the configuration, one line each, and the suggestion that they end with."""

import difflib
from collections.abc import Sequence


class ConfigError(ValueError):
    """Bad input; the message is one line for the reader."""


class MissingPackage(ConfigError):
    """A run needs a package that is not installed."""


def hint(name: str, known: Sequence[str]) -> str:
    """End of a message about an unknown name: the closest known one, else all of them."""
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else f"; known: {', '.join(known)}"
