"""TODO: config.overrides."""

import json
from collections.abc import Mapping
from typing import Any

from distill_bench.config.errors import ConfigError
from distill_bench.config.loading import parse_yaml
from distill_bench.config.schema import RunConfig


def override(text: str) -> tuple[str, Any]:
    """`key=value` of a command line."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r}: write key=value")
    return key.strip(), parse_yaml(value)


def lookup(config: RunConfig, key: str) -> Any:
    """The value of a dotted key of a run; `method` is its name; None where the run has no such key."""
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value["name"] if key == "method" else value


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with dotted keys laid over it; `method: name` is the same as `method.name: name`."""
    merged = json.loads(json.dumps(base))
    for key, value in overrides.items():
        *parents, leaf = key.split(".")
        at = merged
        for part in parents:
            if isinstance(at.get(part), str) and part == "method":
                at[part] = {"name": at[part]}
            at = at.setdefault(part, {})
        if key == "method" and isinstance(value, str) and isinstance(at.get("method"), dict):
            at["method"]["name"] = value
        else:
            at[leaf] = value
    return merged
