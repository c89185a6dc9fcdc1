"""Dotted keys of a run, such as `protocol.clips`: parse, apply and read them."""

import json
from collections.abc import Mapping
from typing import Any

from distill_bench.config.errors import ConfigError
from distill_bench.config.schema import RunConfig
from distill_bench.config.yaml_files import parse_yaml


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of `key=value` from a command line; the value is YAML.

    Raises:
        ConfigError: if there is no key or no `=`, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r}: write key=value")
    return key.strip(), parse_yaml(value)


def apply_overrides(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a run's data with dotted keys set.

    `method: NAME` means `method.name: NAME`.

    Raises:
        ConfigError: if a dotted key leads through something that is not a mapping.
    """
    result = json.loads(json.dumps(base))
    for key, value in overrides.items():
        *parents, leaf = key.split(".")
        node = result
        for part in parents:
            if part == "method" and isinstance(node.get(part), str):
                node[part] = {"name": node[part]}
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {part} = {node!r}: expected a mapping of keys to values")
        if key == "method" and isinstance(value, str) and isinstance(node.get("method"), dict):
            node["method"]["name"] = value
        else:
            node[leaf] = value
    return result


def run_value(config: RunConfig, key: str) -> Any:
    """Value of a dotted key; None if the run lacks the key. `method` is the method's name."""
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value["name"] if key == "method" else value
