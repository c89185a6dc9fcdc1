"""TODO: config.errors."""

import difflib


class ConfigError(ValueError):
    """Bad input; the message is one line for the reader."""


class MissingPackage(ConfigError):
    """A run that asks for a package which is not installed."""


def hint(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else f"; known: {', '.join(known)}"
