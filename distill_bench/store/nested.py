"""Flattens nested mappings to dotted keys, and lists the differences between two mappings."""

from collections.abc import Callable, Mapping
from typing import Any


def flat(
    tree: Mapping[str, Any],
    separator: str = ".",
    prefix: str = "",
    is_value: Callable[[Mapping], bool] = lambda mapping: False,
) -> dict[str, Any]:
    """Flatten nested mappings; keys are joined by `separator`.

    Args:
        is_value: True for a mapping that stays whole.
    """
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and not is_value(value):
            result |= flat(value, separator, f"{prefix}{key}{separator}", is_value)
        else:
            result[f"{prefix}{key}"] = value
    return result


def describe_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Keys whose values differ, e.g. "clips 144 and 256, references.teacher 1a2b and 5e6f"."""
    a, b = flat(first), flat(second)
    return ", ".join(
        f"{key} {a.get(key)} and {b.get(key)}"
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key)
    )
