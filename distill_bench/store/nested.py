"""TODO: store.nested."""

from collections.abc import Mapping
from typing import Any


def flat(tree: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested mappings as joined keys."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result |= flat(value, separator, f"{prefix}{key}{separator}")
        else:
            result[f"{prefix}{key}"] = value
    return result


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Where two nested mappings differ, for instance "clips 144 and 256, references.teacher 1a2b3c4d and 5e6f7a8b"."""
    a, b = flat(mine), flat(theirs)
    return ", ".join(
        f"{key} {a.get(key)} and {b.get(key)}"
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key)
    )
